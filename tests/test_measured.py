"""The numbers of README's and docs' tables stand in bench/results, rounded to the digits that are printed.

A table of results names its files in the line above it: `<!-- bench/results: a.json b.md -->`. A record is one line of
an .md or .csv there, or one object of a .json with the keys that lead to it; its numbers are those that it writes, and
the ratios of an object's fields. Every number of a row stands in a record that also has the numbers of the row's first
cell and of the column's name; `a ± b` in the same one, and of `a / b` or `a and b` in a name one is enough.
`<!-- bench/results: none, REASON -->` says that there is no file.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"<!-- bench/results: (.*) -->")
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e-?\d+)?"
WRITTEN = re.compile(rf"(?:(?<=[\s|(\[])-)?{NUMBER}")  # in a record: also the 16 of dcmh-16
PRINTED = re.compile(rf"(?<![\w.@])(?<!\w-)(-?{NUMBER})(?:\s?(%|ms\b|hours\b))?")  # in a table: not the 10 of PGD-10
SCALES = {"%": (1.0, 100.0), "ms": (1e3,), "hours": (1 / 3600,), "": (1.0,)}
MEASURED = re.compile(r"(?<![\w.-])\d+\.\d|\dx\b|\d ?%")


@dataclass(frozen=True)
class Table:
    line: int
    files: list[str] | None  # None: not marked; []: no file, for the reason that the mark gives
    rows: list[list[str]]  # the first of them names the columns


def tables(text: str) -> list[Table]:
    found, lines = [], text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("|") and (not i or not lines[i - 1].startswith("|"))]
    for start in starts:
        body = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body]
        mark = MARK.fullmatch(lines[start - 1]) if start else None
        files = None if mark is None else [] if mark[1].startswith("none, ") else mark[1].split()
        found.append(Table(start + 1, files, [rows[0], *rows[2:]]))
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


def matches(printed: str, unit: str, values: list[float]) -> bool:
    mantissa, _, exponent = printed.lower().partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    near = 0.5 * 10.0**-digits * (1 + 1e-9)
    return any(abs(value * scale - number(printed)) <= near for value in values for scale in SCALES[unit])


def records(path: Path) -> list[list[float]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [[number(found) for found in WRITTEN.findall(line)] for line in text.splitlines()]
    found: list[list[float]] = []

    def collect(node: object, keys: list[str]) -> None:
        if isinstance(node, list) and any(isinstance(item, (dict, list)) for item in node):
            for item in node:
                collect(item, keys)
        elif isinstance(node, dict):
            values = [v for v in node.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
            lists = [v for v in node.values() if isinstance(v, list) and all(isinstance(x, (int, float)) for x in v)]
            said = [*keys, *(v for v in node.values() if isinstance(v, str))]
            ratios = [a / b for a, b in itertools.permutations(values, 2) if b]
            words = [number(found) for text in said for found in WRITTEN.findall(text)]
            found.append([*values, *itertools.chain(*lists), *ratios, *words])
            for key, value in node.items():
                if isinstance(value, (dict, list)):
                    collect(value, [*keys, key])

    collect(json.loads(text), [])
    return found


def groups(cell: str, joined: str) -> list[list[tuple[str, str]]]:
    """The numbers of a cell with their units, those that `joined` stands between together."""
    found: list[list[tuple[str, str]]] = []
    end = None
    for match in PRINTED.finditer(cell):
        if end is not None and re.fullmatch(joined, cell[end : match.start()]):
            found[-1].append(match.groups(default=""))  # type: ignore[arg-type]
        else:
            found.append([match.groups(default="")])  # type: ignore[list-item]
        end = match.end()
    return found


def strays(table: Table) -> list[str]:
    """The numbers of a table that its files do not hold."""
    everything = [record for name in table.files or [] for record in records(RESULTS / name)]
    columns, *rows = table.rows
    missing = []
    for row in rows:
        for column, cell in zip(columns[1:], row[1:], strict=True):
            named = groups(row[0], r" ?(?:/|and) ?") + groups(column, r" ?(?:/|and) ?")
            near = [
                record for record in everything if all(any(matches(*one, record) for one in group) for group in named)
            ]
            for group in groups(cell, " ± "):
                if not any(all(matches(*one, record) for one in group) for record in near):
                    missing.append(f"{' ± '.join(a + b for a, b in group)} of {row[0]!r}, {column!r}")
    return missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_numbers_of_tables_stand_in_the_results(path):
    found = tables(path.read_text(encoding="utf-8"))
    unmarked = [t.line for t in found if t.files is None and MEASURED.search(str([row[1:] for row in t.rows[1:]]))]
    assert not unmarked, f"{path.name}: the tables of lines {unmarked} do not name their bench/results"
    missing = [f"{path.name}:{table.line}: {stray}" for table in found if table.files for stray in strays(table)]
    assert not missing, "\n".join(missing)


def test_every_table_of_the_readme_with_results_has_a_file():
    assert any(table.files for table in tables((ROOT / "README.md").read_text(encoding="utf-8")))
    assert not [table for table in tables((ROOT / "README.md").read_text(encoding="utf-8")) if table.files == []]


def test_a_wrong_number_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path)
    rows = [{"comparison": "top-k 64 bits, k=10", "speedup": 15.04, "ours_s": 0.0206, "theirs_s": 0.25}]
    (tmp_path / "a.json").write_text(json.dumps({"machine": {"isa": "avx2"}, "rows": rows}))
    (tmp_path / "b.md").write_text("| dcmh-16 | 0.564 ± 0.008 |\n| dcmh-32 | 0.616 ± 0.005 |\n")

    def wrong(name: str, value: str, column: str = "speed-up") -> list[str]:
        text = f"<!-- bench/results: a.json b.md -->\n| what | {column} |\n|---|---|\n| {name} | {value} |\n"
        return strays(tables(text)[0])

    assert not wrong("10 of 64 bits", "**15x** or 15.04, 20.6 ms, 8.24% of theirs, PGD-20, `cmla100`")
    assert not wrong("16 / 64 bits", "15.0x") and not wrong("what", "0.564 ± 0.008", "16 bits")
    assert wrong("10 of 64 bits", "16x") == ["16 of '10 of 64 bits', 'speed-up'"]
    assert wrong("10 of 32 bits", "15x") and wrong("what", "0.564 ± 0.008", "32 bits")
    assert wrong("what", "0.564 ± 0.005") == ["0.564 ± 0.005 of 'what', 'speed-up'"]
    assert wrong("what", "15.05x") and wrong("what", "9%")
