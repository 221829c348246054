"""What the commands of cli.py do. Heavy imports stay inside the functions, so that --help is quick."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cmr_fast._files import write_aside
from cmr_fast._terminal import busy, new_table, show
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cmr_fast.cli import main as cli
    from cmr_fast.data.images import ImageDataset
    from cmr_fast.data.pairs import PairedDataset, Pairs
    from cmr_fast.methods.loop import Method, Run, RunConfig

SOURCE = "data.json"


class DataFlags(Protocol):
    @property
    def data(self) -> str | None: ...
    @property
    def features(self) -> str | None: ...
    @property
    def options(self) -> tuple[str, ...]: ...


def train(method: str, source: "cli.TrainingData", config: Any, settings: "RunConfig") -> None:
    from cmr_fast.data.pairs import PairedDataset
    from cmr_fast.methods import METHODS
    from cmr_fast.methods.loop import train as train_method
    from cmr_fast.reports.retrieval import baselines_for, print_results, score

    options = chosen(source)
    load = load_classified if METHODS[method].output == "logits" else load_data
    dataset = load(source.data, options)
    if _wants_a_gpu(config):
        print(
            f"WRN-{config.depth}-{config.width} on a CPU takes hours an epoch; --preset small is for one",
            file=sys.stderr,
        )
    out = str(settings.out).replace("<data>", dataset.name).replace("<seed>", str(settings.seed))
    run = train_method(method, config, dataset, replace(settings, out=Path(out)))
    record_source(run.path, source.data, options)
    if settings.quiet:
        return
    if not isinstance(dataset, PairedDataset):
        _after_classifier(run)
        return
    with busy("measuring beside the baselines"):
        rows = [score(method, run.model, dataset)]
        rows += [score(name, model, dataset) for name, model in baselines_for([run.model], dataset)]
    print_results(rows, title=f"{dataset.name}: {len(dataset.query)} queries, {len(dataset.database)} in the database")
    best, ended = run.results.get("best_epoch"), run.results["epochs"]
    early = f", training stopped early after epoch {ended} of {config.epochs}" if ended < config.epochs else ""
    print(f"\nRun folder: {run.path}" + (f" (weights of epoch {best}, the best by validation{early})" if best else ""))
    print("Next:")
    for line in next_commands(run.path, codes=run.model.output == "code"):
        print(f"  {line}")


def _wants_a_gpu(config: Any) -> bool:
    import torch

    return getattr(config, "depth", 0) * getattr(config, "width", 0) > 80 and not torch.cuda.is_available()


def _after_classifier(run: "Run") -> None:
    table = new_table("accuracy on the test split", "")
    results = run.results
    table.add_row("clean", f"{results['accuracy']:.1%}")
    table.add_row(f"PGD-20, {results['pgd20_images']} images", f"{results['pgd20_accuracy']:.1%}")
    show(f"{run.results['method']} on {run.results['data']}", table)
    print(f"\nRun folder: {run.path} (weights of epoch {run.results['best_epoch']})")
    print("PGD alone certifies nothing. Next:")
    print(f"  cmr-fast attack {run.path} --attacks clean pgd20 apgd-dlr apgd-t")
    print(f"  cmr-fast report {run.path} --out {run.path}/report")


def next_commands(run: Path, codes: bool) -> list[str]:
    """Commands to type after a training, each of which works as it stands."""
    bits = "" if codes else " --bits"
    return [
        f"cmr-fast evaluate {run} --convention every --k 50",
        f"cmr-fast encode {run} --modality image --split database{bits} --out {run}/images.npy",
        f"cmr-fast encode {run} --modality text --split query{bits} --out {run}/queries.npy",
        f"cmr-fast index {run}/images.npy --out {run}/images.cmrx",
        f"cmr-fast search {run}/images.cmrx {run}/queries.npy --k 10 --out {run}/hits.csv",
        f"cmr-fast report {run} --out {run}/report",
    ]


def encode(arguments: "cli.Encode") -> None:
    import numpy as np

    from cmr_fast.methods.evaluation import encode_all
    from cmr_fast.ops import pack_codes

    if arguments.real and arguments.bits:
        raise InputError("--real and --bits exclude each other: expected one of them or none")
    free(arguments.out, arguments.force)
    model, dataset = open_run(arguments.trained, arguments)
    pairs = split_of(dataset, arguments.split, arguments.trained)
    with busy(f"encoding {len(pairs)} {arguments.modality} rows"):
        values = encode_all(model, arguments.modality, getattr(pairs, arguments.modality))
    packed = arguments.bits or (model.output == "code" and not arguments.real)
    array = (pack_codes(values, threshold=0.0) if packed else values.float()).numpy()
    with write_aside(arguments.out) as aside, open(aside, "wb") as file:
        np.save(file, array)
    what = f"packed codes of {values.shape[1]} bits" if packed else f"values of {values.shape[1]} dimensions"
    print(f"{arguments.out}: {len(array)} {what}, {array.dtype} {array.shape}")


def evaluate(arguments: "cli.Evaluate") -> None:
    from cmr_fast.retrieval.conventions import CONVENTIONS, TIES, find_convention, find_ties

    if arguments.out is not None:
        free(arguments.out, arguments.force)
    conventions = CONVENTIONS if arguments.convention == "every" else (arguments.convention,)
    ties = TIES if arguments.ties == "every" else (arguments.ties,)
    settings = [{"convention": c, "ties": t, "k": arguments.k} for c in conventions for t in ties]
    files = [getattr(arguments, name) for name in _FILES]
    if arguments.trained is not None:
        if any(files):
            raise InputError("expected a run folder or the four files, got both")
        title, rows = _evaluate_run(*open_run(arguments.trained, arguments), settings)
    else:
        missing = [name for name, file in zip(_FILES, files, strict=True) if file is None]
        if missing:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise InputError(f"expected a run folder, or codes and labels of queries and database; not given: {flags}")
        title, rows = _evaluate_files(arguments, files, settings)
    cut = "the whole ranking" if arguments.k is None else f"k = {arguments.k}"
    columns = [name for name in rows[0] if name not in ("convention", "ties", "k")]
    table = new_table("convention", "ties", "average precision of a query")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        convention, rule = find_convention(row["convention"]), find_ties(row["ties"])
        table.add_row(convention.name, rule, convention.formula, *(_number(row[name]) for name in columns))
    show(f"mAP, {cut}: {title}", table)
    if any(row[name] is None for row in rows for name in columns):
        print("-: not defined, since which queries count would depend on the order of ties")
    if arguments.out is not None:
        with write_aside(arguments.out) as aside:
            aside.write_text(json.dumps(rows, indent=2) + "\n")
        print(f"{arguments.out}: {len(rows)} rows")


_FILES = ("query_codes", "database_codes", "query_labels", "database_labels")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _evaluate_run(
    model: "Method", dataset: "PairedDataset", settings: list[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    from cmr_fast.reports.retrieval import evaluate_many

    with busy("evaluating"):
        found = evaluate_many(model, dataset, settings)
    rows, refused = [], None
    for setting, both in zip(settings, found, strict=True):
        if isinstance(both, InputError):
            refused = both
            rows.append(setting | dict.fromkeys(("I2T", "T2I", "average")))
            continue
        i2t, t2i = both["i2t"].map, both["t2i"].map
        rows.append(setting | {"I2T": i2t, "T2I": t2i, "average": (i2t + t2i) / 2})
    if refused and all(row["average"] is None for row in rows):
        raise refused
    return f"{model.name} on {dataset.name}", rows


def _evaluate_files(
    arguments: "cli.Evaluate", files: list[Path], settings: list[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings

    queries, database, query_labels, database_labels = arrays = [read_array(path) for path in files]
    for path, array, labels in zip(files[:2], arrays[:2], arrays[2:], strict=True):
        if len(array) != len(labels):
            raise InputError(f"{path}: {len(array)} rows, but {len(labels)} labels; expected one per row")
    rows = []
    for setting in settings:
        with busy("evaluating"):
            both = query_labels, database_labels
            if queries.dtype.kind == "f":
                result = evaluate_embeddings(queries, database, *both, metric=arguments.metric, **setting)
            else:
                result = evaluate_codes(queries, database, *both, bits=arguments.bits, **setting)
        rows.append(setting | {"mAP": result.map})
    return f"{len(queries)} queries, {len(database)} in the database", rows


def report(arguments: "cli.Report") -> None:
    from cmr_fast.methods.loop import load_model
    from cmr_fast.reports.retrieval import print_results, write_report

    outputs = set()
    for path in arguments.runs:
        present(path)
        outputs.add(load_model(path).output == "logits")
    if outputs == {True}:
        from cmr_fast.cli import _attack_commands

        _attack_commands.report(arguments)
        return
    if len(outputs) > 1:
        raise InputError("a report is of retrievers or of classifiers, got both kinds of runs")
    for name in ("attacks", "eps", "surrogate"):
        if getattr(arguments, name):
            raise InputError(f"--{name} is for classifiers; `cmr-fast attack RUN --out FOLDER` attacks a retriever")
    loaded = [(path, *open_run(path, arguments)) for path in arguments.runs]
    with busy("drawing"):
        rows = write_report(
            loaded,
            arguments.out,
            with_baselines=arguments.baselines,
            tsne_points=arguments.tsne_points,
            force=arguments.force,
        )
    print_results(rows, title="Results")
    print(f"\nReport: {arguments.out / 'index.html'}")


def load_data(data: str, options: Mapping[str, Any]) -> "PairedDataset":
    from cmr_fast.data import load

    with busy(f"reading {data}"):
        return load(data, **options)


def load_classified(data: str, options: Mapping[str, Any]) -> "ImageDataset":
    from cmr_fast.data import load_images

    with busy(f"reading {data}"):
        return load_images(data, **checked_options(options))


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    known = ("train", "test", "seed")
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"labelled images take no option {unknown[0]!r}; they take {', '.join(known)}")
    if wrong := [name for name, value in options.items() if not isinstance(value, int)]:
        raise InputError(f"{wrong[0]} must be an integer, got {options[wrong[0]]!r}")
    return dict(options)


def chosen(flags: "DataFlags") -> dict[str, Any]:
    """The options of `load_data` that --features and --options give."""
    options: dict[str, Any] = {} if flags.features is None else {"features": flags.features}
    for text in flags.options:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            raise InputError(f"--options expects name=value, got {text!r}")
        options[name] = int(value) if value.isdecimal() else value
    return options


def record_source(run: Path, data: str, options: Mapping[str, Any]) -> None:
    """Note in a run folder where its data came from, so that later commands find them."""
    where = str(Path(data).resolve()) if Path(data).exists() else data
    with write_aside(run / SOURCE) as aside:
        aside.write_text(json.dumps({"data": where, "options": dict(options)}) + "\n")


def open_run(trained: Path, flags: DataFlags) -> "tuple[Method, PairedDataset]":
    """The model of a run, and the data that `flags` ask for (None: its own). InputError where they do not fit."""
    from cmr_fast.methods.loop import load_model

    present(trained)
    model = load_model(trained)
    if model.output == "logits":
        raise InputError(f"{trained}: a classifier, expected a retriever; `cmr-fast attack` and `report` measure it")
    dataset = load_data(*source_of(trained, flags))
    for name in ("image", "text"):
        needed, seen = getattr(model, f"{name}_dim"), getattr(dataset, f"{name}_dim")
        if needed != seen:
            raise InputError(f"{trained}: expects {name} features of {needed} dimensions, {dataset.name} has {seen}")
    return model, dataset


def source_of(trained: Path, flags: DataFlags) -> tuple[str, dict[str, Any]]:
    """Where a run's data came from, and the loader's options, unless `flags` say otherwise."""
    from cmr_fast.methods._runfolder import read_json

    recorded = (trained if trained.is_dir() else trained.parent) / SOURCE
    source: dict[str, Any] = read_json(recorded) if recorded.is_file() else {"data": None, "options": {}}
    if not {"data", "options"} <= set(source):
        raise InputError(f"{recorded}: damaged, expected data and options, got {', '.join(source) or 'nothing'}")
    if flags.data is None and source["data"] is None:
        raise InputError(f"{trained}: does not say which data it was trained on; expected --data PATH")
    options = source["options"] if flags.data is None else {}
    return flags.data or source["data"], options | chosen(flags)


def split_of(dataset: "PairedDataset", split: str, trained: Path) -> "Pairs":
    """The pairs of a split; train and valid as the run at `trained` divided them."""
    config = (trained if trained.is_dir() else trained.parent) / "config.json"
    if split in ("train", "valid") and dataset.valid is None and config.is_file():
        run = json.loads(config.read_text())["run"]
        if run["valid_fraction"] > 0:
            dataset = dataset.hold_out(run["valid_fraction"], run["seed"])
    pairs = getattr(dataset, split)
    if pairs is None:
        raise InputError(f"{dataset.name}: has no {split} split, and {trained} held none out")
    return pairs


def present(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")


def free(path: Path, force: bool) -> None:
    """Refuse to write over what is there; --force allows it, for files."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; --force overwrites it")


def read_array(path: Path) -> "np.ndarray":
    """A .npy file, mapped into memory; nothing in it is executed."""
    import numpy as np

    present(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy array of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise InputError(f"{path}: expected one .npy array, got {type(array).__name__}")
    return array


def check_codes(codes: "np.ndarray", path: Path) -> None:
    if codes.dtype.name != "uint8" or codes.ndim != 2:
        raise InputError(f"{path}: expected packed codes, uint8 (N, bytes), got {codes.dtype} {codes.shape}")
