"""The history as a page of its own: `python bench/page.py [--results DIR] [--out FILE]`.

Reads what `asv run` wrote (`.asv/results`) and draws every benchmark over its commits, a line a set of parameters and
machine, as SVG inside one HTML file that asks no other host for anything. Lower is better everywhere.
"""

import argparse
import datetime
import html
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from asv.results import iter_results

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
WIDTH, HEIGHT, LEFT, TOP = 640, 220, 70, 12
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h2 { font-size: 1.05rem; margin: 2rem 0 .3rem } code { font-size: .95em } svg { width: 100%; height: auto }
ul.key { list-style: none; padding: 0; columns: 2; font-size: .85rem }
"""


@dataclass(frozen=True)
class Point:
    when: float  # milliseconds since 1970
    commit: str
    value: float


Series = dict[str, list[Point]]  # by parameters and machine


def history(results: Path) -> dict[str, Series]:
    """Every number that was measured, by benchmark; a skip or a failure is no point."""
    found: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    every = sorted(iter_results(str(results)), key=lambda result: result.date)
    versions: dict[str, str] = {}  # of the newest: what another version measured is another series
    for result in every:
        versions |= result.benchmark_version
    for result in every:
        machine = result.params.get("machine", "")
        for name in result.get_all_result_keys():
            if result.benchmark_version.get(name) != versions[name]:
                continue
            params = result.get_result_params(name)
            combinations = list(itertools.product(*params)) or [()]
            values = result.get_result_value(name, params)
            for combination, value in zip(combinations, values, strict=True):
                if value is not None and math.isfinite(value):
                    label = ", ".join(x.strip("'") for x in combination)
                    point = Point(result.date, result.commit_hash, value)
                    found[name][f"{label} on {machine}" if label else machine].append(point)
    return {name: dict(series) for name, series in sorted(found.items())}


def shown(value: float) -> str:
    return f"{value:.3g}"


def graph(series: Series) -> str:
    """The SVG: commits in their order on the x axis, equally far apart, values from 0 on the y axis."""
    commits = sorted({(point.when, point.commit) for points in series.values() for point in points})
    column = {commit: i for i, (_, commit) in enumerate(commits)}
    most = max(point.value for points in series.values() for point in points) or 1.0
    across, down = (WIDTH - LEFT - 20) / max(1, len(commits) - 1), HEIGHT - 2 * TOP - 20
    floor = TOP + down

    def place(point: Point) -> tuple[float, float]:
        return LEFT + column[point.commit] * across, floor - point.value / most * down

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for share in (0.0, 0.5, 1.0):
        y = floor - share * down
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        said = f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{shown(share * most)}</text>'
        parts.append(said)
    for commit, anchor in {commits[-1][1]: "end", commits[0][1]: "start"}.items():
        x = LEFT + column[commit] * across
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}" font-size="11">{commit[:8]}</text>')
    for colour, (label, points) in zip(itertools.cycle(COLOURS), series.items(), strict=False):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in points:
            x, y = place(point)
            said = html.escape(f"{label}: {shown(point.value)} at {point.commit[:10]}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{said}</title></circle>')
    return "".join([*parts, "</svg>"])


def section(name: str, series: Series) -> str:
    keys = "".join(
        f'<li><b style="color:{colour}">&#9679;</b> {html.escape(label)}: {shown(points[-1].value)}</li>'
        for colour, (label, points) in zip(itertools.cycle(COLOURS), series.items(), strict=False)
    )
    said = html.escape(name)
    return f'<section id="{said}"><h2><code>{said}</code></h2>{graph(series)}<ul class="key">{keys}</ul></section>'


def page(found: dict[str, Series]) -> str:
    latest = max(point.when for series in found.values() for points in series.values() for point in points)
    day = datetime.datetime.fromtimestamp(latest / 1000, datetime.UTC).date()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>cmr_fast</title><style>{STYLE}</style>'
        f"<h1>Benchmarks of cmr_fast</h1><p>{len(found)} benchmarks; the last commit measured is of {day}. Lower is "
        f"better: seconds, bytes, or our time as a share of an alternative's in the same process.</p>"
        + "".join(section(name, series) for name, series in found.items())
        + "</html>\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / ".asv" / "results", help="default %(default)s")
    out = ROOT / ".asv" / "html" / "cmr_fast.html"
    parser.add_argument("--out", type=Path, default=out, help="default %(default)s")
    arguments = parser.parse_args()
    found = history(arguments.results)
    if not found:
        parser.error(f"no results in {arguments.results}; asv run --set-commit-hash $(git rev-parse HEAD) writes some")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(found))
    print(arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
