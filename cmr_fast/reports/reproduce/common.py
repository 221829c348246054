"""What the papers' reports share: which items to make, runs that are not made twice, and the page.

An item is a table or figure of a paper. Its function gets the study (runs, data, seeds) and gives sections; it raises
`Missing` where the data at hand cannot make it, and the report then says what it needs and goes on. After another
`InputError` the other items are made as well, and the command fails in the end.
"""

import csv
import html
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch

from cmr_fast._files import write_aside
from cmr_fast._terminal import counting
from cmr_fast.data import load
from cmr_fast.data.pairs import PairedDataset
from cmr_fast.errors import InputError
from cmr_fast.methods._runfolder import CONFIG, described_data, held, read_json, record_source, write_json
from cmr_fast.methods.method import Dataset, Method, RunConfig

SCORES = "scores.json"
SECTIONS = "sections.json"
STUDY = "study.json"


class Missing(Exception):
    """The data at hand cannot make this item; the message says what it needs."""


class KilledError(InputError):
    """A process was killed, as for lack of memory: what comes next would be, too."""


@dataclass(frozen=True)
class Section:
    """A part of the report: words, a table, its notes, (file, caption) of figures."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Item:
    """A table or figure of the paper: "Table 5", and what makes it."""

    name: str
    title: str
    make: "Callable[[Any], Sequence[Section]]"

    @property
    def key(self) -> tuple[str, int]:
        """("table" or "figure", number)."""
        kind, _, number = self.name.partition(" ")
        return kind.lower(), int(number)


def chosen(items: Sequence[Item], tables: Sequence[int], figures: Sequence[int]) -> list[Item]:
    """The items asked for, in the paper's order; all where nothing is asked for. InputError for others."""
    if not tables and not figures:
        return list(items)
    wanted = [("table", n) for n in tables] + [("figure", n) for n in figures]
    known = [item.key for item in items]
    if unknown := [key for key in wanted if key not in known]:
        have = ", ".join(item.name for item in items)
        raise InputError(f"the paper's {unknown[0][0]} {unknown[0][1]} is not made here; expected some of {have}")
    return [item for item in items if item.key in wanted]


@dataclass(frozen=True)
class Training:
    """One training and what is measured of it: `measure(run, dataset)`, a function that processes can hand over.

    `source` is the data's path or name and its loader's options, where the data set is one as it was loaded.
    """

    name: str
    method: str
    config: Any
    dataset: Dataset
    measure: Callable[[Any, Any], dict[str, Any]]
    seed: int
    run: Mapping[str, Any]
    source: tuple[str, Mapping[str, Any]] | None = None

    def folder(self, out: Path) -> Path:
        """OUT/runs/NAME-seedN."""
        return out / "runs" / f"{slug(self.name)}-seed{self.seed}"


@dataclass
class Study:
    """What an item's function works with.

    Attributes
    ----------
    paper, data, out, seeds, quiet, jobs
        As of `reproduce`.
    cache
        Whatever items share, such as data sets that were read.
    """

    paper: str
    data: str
    out: Path
    seeds: int
    quiet: bool
    jobs: int = 1
    cache: dict[str, Any] = field(default_factory=dict)
    _loaded: list[tuple[PairedDataset, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"jobs must be 1 or more, got {self.jobs}")
        self.pool = Pool(self.jobs)

    def load(self, **options: Any) -> PairedDataset:
        """The data set, or it with other options of its loader; runs on it say so in their folders."""
        for dataset, before in self._loaded:
            if before == options:
                return dataset
        dataset = load(self.data, **options)
        self._loaded.append((dataset, options))
        return dataset

    def unvalidated(self, dataset: PairedDataset) -> PairedDataset:
        """The data set without its validation split: trainings on it choose no epoch."""
        if dataset.valid is None:
            return dataset
        rest = replace(dataset, valid=None)
        self._loaded += [(rest, options) for known, options in self._loaded if known is dataset]
        return rest

    def tuned(
        self, name: str, dataset: PairedDataset, tune: Callable[..., dict[str, Any]], grid: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What `tune` chooses of its grid for these data; kept in a file, as it takes long on wide features."""
        file = self.out / f"tuned-{name}.json"
        what = json.loads(json.dumps({"data": data_of(dataset), "grid": dict(grid)}))
        if file.is_file():
            kept = _read_kept(file, settings=dict)
            settings: dict[str, Any] = kept.pop("settings")
            if kept == what:
                return settings
        settings = tune(dataset, quiet=self.quiet)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(file, what | {"settings": settings})
        return settings

    def described(self) -> dict[str, Any]:
        """What a folder of this study is for; another's is refused."""
        return {"paper": self.paper, "data": data_of(self.load())}

    def trainings(
        self, name: str, method: str, config: Any, dataset: Dataset, measure: Callable[[Any, Any], dict[str, Any]],
        **run: Any,
    ) -> list[Training]:  # fmt: skip
        """A setting once a seed."""
        source = next(((self.data, options) for known, options in self._loaded if known is dataset), None)
        return [Training(name, method, config, dataset, measure, seed, run, source) for seed in range(self.seeds)]

    def scores(self, trainings: Sequence[Training]) -> list[dict[str, Any]]:
        """Of each training what was measured; those that are not there yet are made, `jobs` at a time.

        What is there already with the same config and data is read, not made again; a run that was stopped goes on.
        """
        wanted = {training.folder(self.out): training for training in trainings}
        missing = [training for training in wanted.values() if self._kept(training) is None]
        if self.jobs > 1 and len(missing) > 1:
            self.pool.run(_train, [(training, self.out, 1) for training in missing], self.quiet)
        else:
            for number, training in enumerate(missing, 1):
                self.say(f"{number} of {len(missing)}: {training.folder(self.out).name} ...")
                _train(training, self.out)
        return [cast(dict[str, Any], self._kept(training)) for training in trainings]

    def _kept(self, training: Training) -> dict[str, Any] | None:
        folder = training.folder(self.out)
        if not (folder / SCORES).is_file():
            return None
        kept = _read_kept(folder / SCORES, what=dict, scores=dict)
        if kept["what"] != _described(training):
            raise InputError(f"{folder}: holds a run of other settings or data; expected another --out")
        scores: dict[str, Any] = _with_nan(kept["scores"])
        return scores

    def say(self, text: str) -> None:
        """One line on standard output, unless quiet."""
        if not self.quiet:
            print(text, flush=True)


def _described(training: Training) -> Any:
    """Config, data and run as JSON has them."""
    config, data = asdict(training.config), data_of(training.dataset)
    return json.loads(json.dumps({"config": config, "data": data, "run": dict(training.run)}))


def data_of(dataset: Dataset) -> dict[str, Any]:
    """The name, every split's size and checksum: scores are of the test split as much as of what was trained on."""
    splits = {name: getattr(dataset, name, None) for name in ("valid", "query", "database", "test")}
    sums = {f"crc32 of {name}": split.fingerprint() for name, split in splits.items() if split is not None}
    return described_data(dataset) | sums


def _read_kept(file: Path, **kinds: Any) -> dict[str, Any]:
    try:
        return read_json(file, **kinds)
    except InputError as error:
        raise InputError(f"{error}; without this file it is made again") from error


def _with_nan(scores: Any) -> Any:
    """What `write_json` wrote, with NaN for numbers that JSON has none for."""
    if isinstance(scores, dict):
        return {name: _with_nan(value) for name, value in scores.items()}
    if isinstance(scores, list):
        return [_with_nan(value) for value in scores]
    return math.nan if scores is None else scores


def preset_for(kind: type[Method], dataset: PairedDataset) -> str:
    """The preset of a method that was made for these features, else "default"."""
    name = "default"
    if dataset.name.startswith("wikipedia"):  # SIFT with LDA's topics or tf-idf
        dims = dataset.image_dim, dataset.text_dim
        name = {(128, 10): "wikipedia", (128, 1000): "wikipedia-tfidf"}.get(dims, name)
    elif dataset.name == "flickr8k-24":  # with words; on sentence vectors the preset's input map is refused
        name = "flickr8k"
    return name if name in kind.presets else "default"


def _train(training: Training, out: Path, threads: int = 0) -> None:
    from cmr_fast.methods.loop import train

    folder = training.folder(out)
    run = RunConfig(out=folder, seed=training.seed, quiet=True, resume=True, threads=threads, **training.run)
    done = train(training.method, training.config, training.dataset, run)
    if training.source is not None:
        record_source(folder, *training.source)
    write_json(folder / SCORES, {"what": _described(training), "scores": training.measure(done, training.dataset)})
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


class Pool:
    """Processes of one thread each, begun when they are first needed and kept until `close`."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._executor: ProcessPoolExecutor | None = None

    def run(
        self, function: Callable[..., None], calls: Sequence[tuple[Any, ...]], quiet: bool, doing: str = "training"
    ) -> None:
        """function(*arguments) of each call, `jobs` at a time, with progress unless quiet.

        After an error what has not begun is left out and what runs is waited for; Ctrl-C ends it. KilledError where a
        process was killed.
        """
        if self._executor is None:
            self._executor = ProcessPoolExecutor(self.jobs, get_context("spawn"), _begin, (os.getpid(),))
        title = f"{doing}, {min(self.jobs, len(calls))} at a time"
        with nullcontext(lambda n: None) if quiet else counting(len(calls), title) as advance:
            try:
                waiting = [self._executor.submit(function, *arguments) for arguments in calls]
                for done in as_completed(waiting):
                    done.result()
                    advance(1)
            except BrokenProcessPool as error:
                self.close()
                raise KilledError(
                    f"{doing}: one of {self.jobs} processes was killed, as for lack of memory; what is finished is "
                    "kept: go on with fewer jobs"
                ) from error
            except Exception:
                self.close()
                raise
            except BaseException:  # Ctrl-C: what a process has been handed already would begin now
                for process in self._executor._processes.values():
                    process.terminate()
                self.close()
                raise

    def close(self) -> None:
        """End the processes, after what they run."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


def _begin(parent: int) -> None:
    """One thread. And end with a parent that is killed: this would train on for nobody, and hold the run's folder."""
    torch.set_num_threads(1)
    os.environ["CMR_FAST_THREADS"] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def changed(config: Any, **values: Any) -> Any:
    """`replace` that refuses a field which the config lacks, as a sweep over it would otherwise fail in the middle."""
    known = [f.name for f in fields(config)]
    if unknown := [name for name in values if name not in known]:
        raise InputError(f"{type(config).__name__} has no setting {unknown[0]!r}, expected one of {', '.join(known)}")
    return replace(config, **values)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds; of one the value; nan where one has none."""
    if any(math.isnan(value) for value in values):
        return "nan"
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def make(study: Study, title: str, items: Sequence[Item], every: Sequence[Item], note: str) -> None:
    """Make the items, say of each what was found or is missing, and write the report after every one.

    The report holds what was made before as well, in the paper's order.

    Raises
    ------
    InputError
        Where the folder is of another study or of something else, or in use; where none of the items can be made; where
        a process was killed; and in the end, where one was refused for more than data that are missing.
    """
    described = study.described()
    with held(study.out), closing(study.pool):
        _claim(study.out, described)
        _make(study, title, items, every, note)


def _claim(out: Path, described: Mapping[str, Any]) -> None:
    """InputError where the folder is not this study's; else it says from now on that it is."""
    if (out / STUDY).is_file():
        before, now = read_json(out / STUDY), json.loads(json.dumps(described))
        for name in sorted({*before, *now}, key=lambda name: (name != "paper", name)):
            if before.get(name) != now.get(name):
                seen = _differing(before.get(name), now.get(name), name)
                raise InputError(f"{out}: holds another study, {seen}; expected another folder")
        return
    if (out / SECTIONS).exists() or (out / "runs").exists():
        raise InputError(
            f"{out}: holds a report of an earlier version, which is not gone on with; expected another folder"
        )
    for name in (CONFIG, "README.md", "index.html"):
        if (out / name).exists():
            raise InputError(f"{out}: holds a {name} of something else, expected a folder for the report alone")
    write_json(out / STUDY, described)


def _differing(before: Any, now: Any, name: str) -> str:
    """The first thing that differs, of what was and what is asked for."""
    if isinstance(before, dict) and isinstance(now, dict):
        part = next(
            part
            for part in sorted({*before, *now}, key=lambda part: (part != "name", part))
            if before.get(part) != now.get(part)
        )
        return f"its {name}'s {part} is {before.get(part)!r}, asked for {now.get(part)!r}"
    return f"its {name} is {before!r:.60}, asked for {now!r:.60}"


def _make(study: Study, title: str, items: Sequence[Item], every: Sequence[Item], note: str) -> None:
    kept: dict[str, Any] = {}
    if (study.out / SECTIONS).is_file():
        kept = read_json(study.out / SECTIONS, items=dict)["items"]
    missing: list[str] = []
    refused: list[str] = []
    for item in items:
        study.say(f"{item.name}: {item.title}")
        try:
            parts = list(item.make(study))
            made = f"{study.data}, {study.seeds} {'seed' if study.seeds == 1 else 'seeds'}."
            parts[-1] = replace(parts[-1], notes=[*parts[-1].notes, f"Made of {made}"])
        except KilledError:
            raise
        except (Missing, InputError) as error:
            study.say(f"  not made: {error}")
            (missing if isinstance(error, Missing) else refused).append(f"{item.name}: {error}")
            if any(part["rows"] or part["figures"] for part in kept.get(item.name, [])):
                continue
            parts = [Section(item.title, notes=[f"Not made: {error}."])]
        kept[item.name] = [asdict(replace(part, title=f"{item.name}. {part.title}")) for part in parts]
        sections = [Section(**part) for known in every for part in kept.get(known.name, [])]
        write_sections(study.out, title, sections, note)
        write_json(study.out / SECTIONS, {"items": kept})
    study.say(f"\nReport: {study.out / 'index.html'}")
    if len(missing) + len(refused) == len(items):
        raise InputError(f"nothing was made. {'; '.join([*refused, *missing])}")
    if refused:
        raise InputError(f"not everything was made. {'; '.join(refused)}")


def write_sections(out: Path, title: str, sections: Sequence[Section], note: str) -> None:
    """README.md, index.html, and a CSV file for each table."""
    out.mkdir(parents=True, exist_ok=True)
    lines, body = [f"# {title}", "", note, ""], f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(note)}</p>\n"
    for section in sections:
        lines += [f"## {section.title}", ""]
        body += f"<h2>{html.escape(section.title)}</h2>\n"
        if section.rows:
            with write_aside(out / f"{slug(section.title)[:60]}.csv") as aside, open(aside, "w", newline="") as text:
                csv.writer(text).writerows([section.head, *section.rows])
            lines += [_row(section.head), _row(["---"] * len(section.head)), *map(_row, section.rows), ""]
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.head)
            rows = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in section.rows
            )
            body += f"<table><tr>{head}</tr>\n{rows}</table>\n"
        for text_line in section.notes:
            lines += [text_line, ""]
            body += f"<p>{html.escape(text_line)}</p>\n"
        for file, caption in section.figures:
            lines += [f"![{caption}]({file})", ""]
            alt = html.escape(caption)
            body += f'<figure><img src="{html.escape(file)}" alt="{alt}"><figcaption>{alt}</figcaption></figure>\n'
    with write_aside(out / "README.md") as aside:
        aside.write_text("\n".join(lines))
    with write_aside(out / "index.html") as aside:
        aside.write_text(_PAGE.format(title=html.escape(title), body=body))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; }} figcaption {{ color: #555; }}
</style>
{body}</html>
"""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def slug(name: str) -> str:
    """A name as a file or folder has it."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
