"""Did B get slower than A? `python bench/compare.py A B`, two commits.

Both are checked out and built side by side. B's benchmark code (`bench/gate/cases.py`) measures both, each in processes
of its own: first that their results agree, then time and peak memory in rounds A B B A, then instructions by callgrind.
A time or a memory that looks worse is measured again in new processes, and counts where it is worse again.

Exit status: 0 nothing is worse; 1 something is worse, breaks, differs, is gone or was measured too little; 2 nothing
could be measured at all. A cost that is meant is named in a commit's message after A: `Accepted cost: CASE COST`,
other results `Accepted cost: CASE result`.
"""

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gate.measure import Broken, agree, described, instructions, pair, rounds, shim
from gate.trees import Unbuilt, accepted, checked_out, declared, git
from gate.verdict import FACTORS, Row, Samples, judged, line

HEAD = "| benchmark | cost | A | B | B / A (99 % interval) | |\n|---|---|---|---|---|---|"
Pairs = Collection[tuple[str, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="the commit before")
    parser.add_argument("b", help="the commit after")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these alone")
    parser.add_argument("--costs", nargs="+", metavar="COST", choices=sorted(FACTORS), default=list(FACTORS))
    parser.add_argument("--rounds", type=int, default=3, help="new processes; default %(default)s")
    parser.add_argument("--quads", type=int, default=8, help="A B B A a round; default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.008, help="a sample; default %(default)s")
    parser.add_argument(
        "--factor", type=float, default=FACTORS["time"], help="B / A from which a time is worse; default %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[1], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that worktrees and processes go when it is stopped
    if "instructions" in arguments.costs and not shutil.which("valgrind"):
        parser.error("counting instructions takes valgrind; leave them out by --costs time memory")
    try:
        commits = tuple(
            git(arguments.repo, "rev-parse", "--verify", f"{x}^{{commit}}") for x in (arguments.a, arguments.b)
        )
        rows, should = gate(arguments, commits)
    except (Unbuilt, Broken) as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 2
    measured = sum(row.measured for row in rows)
    failed = [row for row in rows if row.failed]
    said = f"{commits[0][:10]} and {commits[1][:10]}: {measured} of {should} costs measured, {len(failed)} failed."
    table = "\n".join([HEAD, *map(line, rows), "", said])
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table + "\n")
    if arguments.json:
        kept = {"a": commits[0], "b": commits[1], "rows": [number(asdict(row)) for row in rows]}
        arguments.json.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
    return 1 if failed or measured < should else 0


def gate(arguments: argparse.Namespace, commits: tuple[str, str]) -> tuple[list[Row], int]:
    """All rows, and how many of them have to hold a measurement."""
    say: Callable[[str], None] = lambda text: print(f"# {text}", file=sys.stderr, flush=True)  # noqa: E731
    with (
        checked_out(arguments.repo, commits, arguments.repo / ".asv" / "kernels") as trees,
        tempfile.TemporaryDirectory() as folder,
    ):
        code, now, before = trees[1], declared(trees[1]), declared(trees[0])
        if not now:
            raise Broken(f"{commits[1][:10]} declares no case")
        keep = {(case, cost) for case, cost in now if cost in arguments.costs}
        if arguments.cases:
            if unknown := set(arguments.cases) - {case for case, _ in now}:
                raise Broken(f"no case is called {', '.join(sorted(unknown))}")
            keep = {(case, cost) for case, cost in keep if case in arguments.cases}
        if not keep:
            raise Broken("no case has such a cost")
        allowed = accepted(arguments.repo, commits)
        rows = [] if arguments.cases or before is None else gone(before - now, allowed)
        new = keep - before if before is not None else set()
        say(f"{len(keep) - len(new)} costs to compare, {len(new)} new")
        faults, order = check(trees, code, sorted(keep), new, Path(folder), say)
        meant = {case for case, row in faults.items() if row.word == "DIFFERENT" and (case, "result") in allowed}
        rows += [replace(faults.pop(case), cost="result", word="accepted") for case in sorted(meant)]
        compared = [pair for pair in order if pair in keep - new and pair[0] not in faults]
        found = measured(arguments, trees, code, compared, Path(folder))
        suspects = [x for x in compared if found[x].word == "WORSE" and x[1] != "instructions"]  # a count repeats
        if suspects:
            say(f"once more: {', '.join(f'{case} {cost}' for case, cost in suspects)}")
            again = measured(arguments, trees, code, suspects, Path(folder))
            found |= {
                pair: second if second.failed else replace(second, said="not twice") for pair, second in again.items()
            }
        for pair_of in order:
            row = faults.get(pair_of[0]) or found.get(pair_of) or Row(*pair_of, "new")
            row = replace(row, case=pair_of[0], cost=pair_of[1])
            rows.append(replace(row, word="accepted") if row.word == "WORSE" and pair_of in allowed else row)
        return rows, len(keep - new)


def gone(pairs: Pairs, allowed: Pairs) -> list[Row]:
    """Costs that A declares and B does not: left out only where a commit says so."""
    return [Row(*x, "accepted" if (x[0], "gone") in allowed else "GONE", said="A has it") for x in sorted(pairs)]


def check(
    trees: tuple[Path, Path],
    code: Path,
    keep: list[tuple[str, str]],
    new: Pairs,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, Row], list[tuple[str, str]]]:
    """The correctness gate: cases that break or differ, and all costs in the order of the file."""
    faults: dict[str, Row] = {}
    with pair(trees, code) as workers:
        a, b = described(workers)
        if a["isas"][0] != b["isas"][0]:
            say(f"A has {a['isas'][0]} and B {b['isas'][0]}: both run the best that they have in common")
        declared_costs = b["cases"]
        order = [(case, cost) for case, costs in declared_costs.items() for cost in costs if (case, cost) in keep]
        if len(order) != len(keep):
            raise Broken(f"{len(keep)} costs are declared in the file and {len(order)} by its cases")
        for case in dict.fromkeys(case for case, _ in order):
            fresh = all(x in new for x in order if x[0] == case)
            try:
                agree([workers[1], workers[1]] if fresh else workers, case, folder)
            except Broken as error:
                faults[case] = Row(case, "", "BROKEN", said=str(error).splitlines()[0][:200])
            except AssertionError as error:
                faults[case] = Row(case, "", "DIFFERENT", said=str(error).splitlines()[0][:200])
    return faults, order


def measured(
    arguments: argparse.Namespace, trees: tuple[Path, Path], code: Path, wanted: list[tuple[str, str]], folder: Path
) -> dict[tuple[str, str], Row]:
    """A row for each cost wanted."""
    rows: dict[tuple[str, str], Row] = {}
    by_case: dict[str, tuple[str, ...]] = {}
    for case, cost in wanted:
        by_case[case] = (*by_case.get(case, ()), cost)
    counted = [case for case, cost in wanted if cost == "instructions"]
    if counted:
        for path in folder.glob("callgrind.*"):
            path.unlink()
        try:
            counts, broken = instructions(trees, code, counted, folder, shim(folder))
        except Broken as error:
            counts, broken = {}, dict.fromkeys(counted, str(error).splitlines()[0][:200])
        for case in counted:
            a, b = counts.get(case, (math.nan, math.nan))
            fault = None if case in counts and case not in broken else broken.get(case, "callgrind counted nothing")
            row = judged(case, "instructions", Samples([(a, b, b, a)]), 1)
            rows[case, "instructions"] = Row(case, "instructions", "BROKEN", said=fault) if fault else row
    if len(wanted) > len(counted):
        samples, broken = rounds(trees, code, by_case, arguments.rounds, arguments.quads, arguments.seconds)
        for (case, cost), kept in samples.items():
            least = arguments.rounds * (arguments.quads if cost == "time" else 1)
            fault = broken.get(case)
            factor = arguments.factor if cost == "time" else FACTORS[cost]
            row = judged(case, cost, kept, least, factor)
            rows[case, cost] = Row(case, cost, "BROKEN", said=fault) if fault else row
    return rows


def number(row: dict) -> dict:
    """JSON has no NaN."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


if __name__ == "__main__":
    raise SystemExit(main())
