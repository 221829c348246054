"""A report's page: one table as CSV, and README.md and index.html with the words, the table and the figures."""

import csv
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmr_fast._files import write_aside


def write_page(
    out: Path, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str,
    pages: Sequence[tuple[str, str]], words: Sequence[str] = (), table: str = "results.csv",
) -> None:  # fmt: skip
    """`table` (CSV), README.md and index.html: words to read first, the table, its note, (file, caption)s."""
    with write_aside(out / table) as aside, open(aside, "w", newline="") as text:
        csv.writer(text).writerows([head, *rows])
    text_columns = sum(not any(c.isdigit() for c in cell) for cell in rows[0]) if rows else 0
    aligned = [head, ["---"] * text_columns + ["---:"] * (len(head) - text_columns), *rows]
    lines = [
        f"# {title}",
        "",
        *(f"- {line}" for line in words),
        *([""] if words else []),
        *map(_row, aligned),
        "",
        note,
        "",
    ]
    for file, caption in pages:
        lines += [f"## {caption}", "", f"![{caption}]({file})", ""]
    with write_aside(out / "README.md") as aside:
        aside.write_text("\n".join(lines))
    cells = "".join(f"<tr>{_cells('td', row)}</tr>\n" for row in rows)
    body = "".join(_FIGURE.format(file=html.escape(file), caption=html.escape(caption)) for file, caption in pages)
    said = "".join(f"<li>{html.escape(line)}</li>\n" for line in words)
    with write_aside(out / "index.html") as aside:
        aside.write_text(
            _PAGE.format(
                title=html.escape(title), said=f"<ul>{said}</ul>\n" if said else "", head=_cells("th", head),
                cells=cells, note=note, body=body, first=text_columns + 1,
            )
        )  # fmt: skip


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Names that tell folders apart: their own, with their parents' where two are the same, else with numbers."""
    whole = [folder.resolve() for folder in folders]
    short = [folder.name for folder in whole]
    longer = [f"{folder.parent.name}-{folder.name}" for folder in whole]
    for names in (short, longer):
        if len(set(names)) == len(names):
            return names
    return [f"{number + 1}-{name}" for number, name in enumerate(short)]


_FIGURE = '<figure><img src="{file}" alt="{caption}"><figcaption>{caption}</figcaption></figure>\n'
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>cmr-fast report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #ddd; }}
td:nth-child(n+{first}) {{ text-align: right; font-variant-numeric: tabular-nums; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; height: auto; }} figcaption {{ color: #555; }}
</style>
<h1>{title}</h1>
{said}<table><tr>{head}</tr>
{cells}</table>
<p>{note}</p>
{body}</html>
"""


def _cells(tag: str, values: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
