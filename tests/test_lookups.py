"""Lookups: what is asked was stated before, the text stays, and the same documents are held out with them."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from t2r.convert.evict import blocks
from t2r.data import lookups
from t2r.data.lookups import EPISODE, with_lookups
from t2r.data.packing import Rows, batch
from t2r.data.prepare import RunData, parts, training, validation
from t2r.data.sources import resolve
from t2r.data.tokens import Tokens, request, tokenise
from t2r.errors import UserError
from t2r.schema import PartConfig, load_run

FIRST, LAST = ("river", "castle", "bridge", "market"), ("ford", "wick", "town", "gate", "moor", "dale", "ham", "ley")
PLACES = [a + b for a in FIRST for b in LAST]


def article(number):
    lines = (
        f"{a.capitalize()} lies {i + number} miles from {PLACES[i - 5]}, behind a hill." for i, a in enumerate(PLACES)
    )
    return " ".join([*lines, *(f"Of {a} nothing is left!\n\n" for a in PLACES)])


@pytest.mark.parametrize("kind", [lookups.NEAR, lookups.AGAIN])
def test_what_is_asked_was_stated(monkeypatch, kind):
    monkeypatch.setattr(lookups, "FORMS", [("<S {key} {value}>", "<Q {key} {value}>")])
    kinds, later = set(), [0, 0, 0]  # questions for facts of up to so many thousand characters before
    for number in range(40):
        text = article(number) * 10
        made = with_lookups(text, kind)
        assert made == with_lookups(text, kind)
        assert re.sub(r"<.*?> ", "", made) == text  # and nothing else was changed
        open_facts, questions = {}, 0
        for found in re.finditer(r"<([SQ]) (\S+) (\S+)>", made):
            what, key, value = found.groups()
            assert key in text
            if what == "S":
                open_facts[key] = value, found.start()
            else:
                questions += 1
                told, at = open_facts[key]
                assert told == value
                later[min(2, (found.start() - at) // EPISODE)] += 1
            kinds.add(value.isdigit())
        assert questions >= len(text) // EPISODE
    assert kinds == {True, False}
    if kind == lookups.AGAIN:
        assert min(later) > max(later) / 4
    else:
        assert later[0] > 100 and later[2] == 0


@pytest.mark.parametrize("kind", [lookups.NEAR, lookups.AGAIN])
def test_answers_are_marked_with_where_they_were_said(kind, tmp_path, tiny_llama):
    """Of each answer the place, and that of the fact's last mention: in the text, in tokens, and in rows."""
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_llama), [article(n) * 4 for n in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (shard,) = tokenise(request([f"{kind}{tmp_path / 'text.jsonl'}"], "text", 1), tokenizer, tmp_path / "cache").shards
    expected, forms = np.zeros(len(shard.ids), int), 0
    for start, made in zip(shard.starts, (with_lookups(text, kind) for text in texts), strict=True):
        at = np.array(tokenizer(made, return_offsets_mapping=True)["offset_mapping"])
        for begin, end, said in made.answers:
            value = made[begin:end]
            assert re.fullmatch(r"\w+", value) and value in made[said : said + 120] and said + 3 < begin
            forms |= 1 << value.isdigit()
            first = min(i for i, (_, high) in enumerate(at) if high > said)
            for i, (low, high) in enumerate(at):
                if low < end and high > begin:
                    expected[start + i] = i - first
    assert forms == 3 and np.array_equal(shard.back, expected)
    assert shard.back.max() > (1500 if kind == lookups.AGAIN else 500)

    rows, found = Rows(Tokens([shard]), 256), 0
    for n in range(len(shard.ids) // 256):
        known = [i for i in range(1, 257) if 0 < expected[256 * n + i] <= i]
        assert (rows.read(n).answers + 1).tolist() == known
        found += len(known)
    assert 0 < found < np.count_nonzero(expected)
    first = rows.read(0), rows.read(1)
    assert batch(first, 1.0).answers.tolist() == [*first[0].answers, *(first[1].answers + 256), 0]


def test_a_short_text_stays_as_it_is():
    assert with_lookups("Too short. For that.") == "Too short. For that."


@pytest.fixture
def run(tmp_path, tiny_llama):
    rows = "".join(json.dumps({"text": article(n)}) + "\n" for n in range(30))
    (tmp_path / "text.jsonl").write_text(rows)
    words = [f"source={tiny_llama}", f"data.cache={tmp_path / 'cache'}", "data.validation=[]", "data.held_out=0.3"]
    words += ["data.train=[text.jsonl]", "data.lookups=0.25", "stages.0.validation_tokens=512", "device=cpu"]
    return words


def test_a_share_of_the_rows_has_lookups(run, tmp_path, tiny_llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_run("quickstart", run)
    assert parts(settings.data) == [
        PartConfig(["text.jsonl"], 0.75),
        PartConfig(["lookups-again:text.jsonl"], 0.25),
    ]
    data = RunData(settings, AutoTokenizer.from_pretrained(tiny_llama))
    assert data.rows(settings.stages[0], 0).counts == [750, 250]
    plain, made, (held,) = *training(settings), validation(settings)
    taken = [
        [one.take(d, source) for source in one.sources for d in source.documents("text")] for one in (plain, made, held)
    ]
    assert [x is None for x in taken[0]] == [x is None for x in taken[1]] == [x is not None for x in taken[2]]
    assert 0 < sum(x is not None for x in taken[2]) < 30
    for before, after in zip(*taken[:2], strict=True):
        assert after == (before and with_lookups(before, lookups.AGAIN))


def test_answers_need_a_tokenizer_that_tells_places(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_run("quickstart", [*run, "stages.0.kind=distill"])
    with pytest.raises(UserError, match="cannot say where answers are"):
        RunData(settings, SimpleNamespace(is_fast=False))


def test_texts_come_from_every_source_in_turn(run, tmp_path, tiny_llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = blocks(tokenizer, ["text.jsonl", "lookups:text.jsonl"], texts=5, context=100)
    texts = [f(article(n)[:1600]) for n in range(3) for f in (str, with_lookups)][:5]  # not more than it takes
    assert ids.tolist() == [tokenizer(text).input_ids[:100] for text in texts]


@pytest.mark.parametrize(
    "spec, nearest",
    [("lookup-again:shipped:train", "lookups-again:shipped:train"), ("shiped:train", "shipped:train")],
)
def test_a_misspelt_prefix_is_named(spec, nearest):
    with pytest.raises(UserError, match=f"no data at {spec}.*nearest valid: {nearest}$"):
        resolve([spec])


def test_a_chat_is_refused(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    (source,) = resolve([f"lookups:{file}"])
    with pytest.raises(UserError, match="document 1 is a chat"):
        list(source.documents("messages"))


def test_a_share_out_of_range_is_told(run, tmp_path):
    with pytest.raises(UserError, match="data.lookups is 1.5, a share of the rows"):
        load_run("quickstart", [*run, "data.lookups=1.5"])
