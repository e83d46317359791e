"""report.html and leaderboard.html as a browser reads them: well-formed, complete, made for a phone and for paper."""

import json
import re
from html.parser import HTMLParser

import pytest

from t2r.evaluate import compare
from t2r.evaluate.leaderboard import leaderboard

VOID = {"meta", "br", "hr", "img", "link", "input"}  # have no end
FETCHES = {"src", "srcset", "href", "xlink:href", "data", "action", "poster"}


class Strict(HTMLParser):
    """Raises AssertionError where a tag is not closed, or another is; keeps what the page is made of."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.text = [], [], [], [], []
        self.meta, self.style = {}, ""
        self.feed(page)
        self.close()
        assert not self.open and not self.rawdata, "the page ends early"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        named = dict(attributes)
        assert len(named) == len(attributes), f"<{tag}> has an attribute twice"
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in FETCHES]
        self.links += [url for _, value in attributes for url in re.findall(r"url\(([^)]*)\)", value or "")]
        self.ids += [named["id"]] if "id" in named else []
        if tag == "meta":
            self.meta[named.get("name")] = named.get("content")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text.append(data)


def test_a_checker_that_can_fail():
    for page in ("<p>", "<p></b>", "</p>", "<b><i></b></i>", '<a id="1" id="2"></a>', "<p></p"):
        with pytest.raises(AssertionError):
            Strict(page)


@pytest.fixture(scope="module")
def pages(folders, tmp_path_factory):
    """A report with plots on a model whose label is no HTML, and a leaderboard with such a one."""
    out = tmp_path_factory.mktemp("pages")
    tasks = [{"kind": "perplexity", "block": 64, "edges": [0, 16, 64], "totals": [64], "items": 3}]
    tasks += [
        {"kind": "recall", "distances": [8, 16], "items": 2},
        {"kind": "multiple_choice", "name": "piqa", "items": 2},
    ]
    tasks += [{"kind": "generation", "prompts": ["<b>1 & 2"], "new": 8}]
    (out / "recipe.yaml").write_text(json.dumps({"tasks": tasks}))  # JSON is YAML
    compare([str(folders / "llama"), f"a<b&c={folders / 'gsa'}"], str(out / "recipe.yaml"), str(out / "report"))
    (out / "made").mkdir()
    made = {"schema_version": 2, "recipe": {"name": "r"}, "models": {"o": {}, "a<b&c": {"trained_tokens": 9}}}
    made["recovery"] = {"piqa": {"metric": "acc", "a<b&c": {"recovery": 0.5}}}
    (out / "made" / "report.json").write_text(json.dumps(made))
    leaderboard(str(out), str(out / "board"))
    return {"report": out / "report" / "report.html", "leaderboard": out / "board" / "leaderboard.html"}


@pytest.mark.parametrize("name", ["report", "leaderboard"])
def test_a_page_needs_nothing_else(name, pages):
    page = Strict(text := pages[name].read_text(encoding="utf-8"))
    assert text.startswith("<!doctype html><html lang=") and '<meta charset="utf-8">' in text[:100]
    assert {"title", "h1", "table", "svg", "path"} <= set(page.tags) and not {"script", "link", "img"} & set(page.tags)
    assert page.links and all(link[:1] == "#" or link.startswith("data:") for link in page.links)
    assert len(set(page.ids)) == len(page.ids) and {link[1:] for link in page.links if link[0] == "#"} <= {*page.ids}
    assert "@import" not in page.style and "url(" not in page.style
    assert page.meta["viewport"] == "width=device-width, initial-scale=1" and "@media print {" in page.style
    assert page.style.count("{") == page.style.count("}")
    assert "a<b&c" in page.text  # escaped in the page
