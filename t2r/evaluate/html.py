"""report.html: one file that needs nothing else, for a screen, a phone and paper."""

from html import escape
from pathlib import Path

from t2r.evaluate.report import (
    LONG,
    RECOVERY,
    about,
    folded,
    headline,
    models_table,
    recovery_table,
    tables,
    texts,
    title,
)
from t2r.evaluate.results import Results

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
nav a { margin-right: .8rem; display: inline-block; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
thead th:first-child { white-space: normal; }
.warning { border-left: .3rem solid #d55e00; padding: .4rem .8rem; background: #fdf1e7; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; max-width: 44rem; }
pre { overflow-x: auto; white-space: pre-wrap; background: #f5f5f5; padding: .6rem; font-size: .85rem; }
small { color: #555; }
@page { margin: 15mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { white-space: normal; padding: .1rem .3rem; }
  th:first-child, td:first-child { position: static; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
}
"""


def html(results: Results, folder: Path, images: dict[str, str]) -> str:
    """The page. images: task -> file of its plot in `folder`, whose .svg is put into the page."""
    parts = [f"<p>{escape(headline(results)).replace('`', '')}</p>"]
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in results.warnings()]
    parts += [f"<p>{escape(note)}</p>" for note in results.facts["notes"]]
    names = ["Recovery"] if results.recoveries() else []
    names += [task.name for task in results.tasks]
    parts.append("<nav>" + "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names) + "</nav>")
    parts.append(table(*models_table(results)))
    if results.recoveries():
        parts += [heading("Recovery"), f"<p>{escape(RECOVERY)}</p>", table(*recovery_table(results))]
    for task in results.tasks:
        parts += [heading(task.name), f"<p>{escape(about(results, task))}</p>"]
        if task.name in images:
            parts.append(inline((folder / images[task.name]).with_suffix(".svg"), task.name))
        parts += [table(head, rows) for head, rows in tables(results, task)]
        for label, text in texts(results, task):
            body = f"<pre>{escape(text)}</pre>"
            parts.append(f"<p>{escape(label)}</p>{body}" if len(text) < LONG else folded(escape(label), body))
    fingerprints = ", ".join(f"{label} {m['fingerprint']}" for label, m in results.models.items())
    parts.append(f"<p><small>Models: {escape(fingerprints)}. The numbers are in report.json.</small></p>")
    return page(title(results), parts)


def page(name: str, parts: list[str]) -> str:
    """A whole page with this title and body."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><h1>{escape(name)}</h1>"
    )
    return head + "\n".join(parts) + "</body></html>\n"


def heading(name: str) -> str:
    return f'<h2 id="{escape(name)}">{escape(name)}</h2>'


def table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def inline(file: Path, name: str) -> str:
    """A drawing as a figure, its identifiers made its own: a page holds several."""
    text = file.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = text.replace('id="', f'id="{name}-').replace('"#', f'"#{name}-').replace("url(#", f"url(#{name}-")
    return f"<figure>{text}</figure>"
