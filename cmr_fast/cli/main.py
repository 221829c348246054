"""The command `cmr-fast`, made from dataclasses by tyro. Each command imports what it needs when it runs."""

import inspect
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, PositionalMetavarFromFieldName

from cmr_fast.cli import _commands, _index_commands
from cmr_fast.errors import InputError

PROGRAM = "cmr-fast"
ABOUT = """Train, attack, defend, search and measure cross-modal (image and text) retrieval models.

Start with:  cmr-fast demo

Your own data:  cmr-fast train acmr --data PATH

Every command explains itself:  cmr-fast train acmr --help"""
_SETTINGS = (OmitArgPrefixes, FlagCreatePairsOff, PositionalMetavarFromFieldName)


@dataclass(frozen=True)
class Demo:
    """The whole way on built-in data: train ACMR and CMIMH, index, search, attack, evaluate, report. About a minute.

    Example:  cmr-fast demo --out my-demo
    """

    out: Path = Path("cmr-fast-demo")
    """Folder for the demo's results; every run makes its own numbered folder in it."""
    seed: int = 0
    """Seed of the data, the weights and the batches."""

    def __call__(self) -> None:
        from cmr_fast.cli.demo import demo

        demo(self.out, seed=self.seed)


@dataclass(frozen=True)
class Encode:
    """Encode one modality of one split with a trained run; the .npy file feeds `index`, `search` and `evaluate`.

    Example:  cmr-fast encode runs/cmimh-wikipedia-seed0 --split database --modality image --out images.npy
    """

    trained: Positional[Path]
    """Run folder, or model.safetensors."""
    modality: Literal["image", "text"]
    """Which side of the pairs."""
    out: Path
    """The .npy file to write: uint8 (N, bytes) packed codes, or float32 (N, d)."""
    split: Literal["query", "database", "train", "valid"] = "database"
    """Which pairs; valid is what the run held out, the same pairs again."""
    data: str | None = None
    """Data set: `shapes`, a folder or file, or a name under $CMR_FAST_DATA. None: the run's own."""
    features: str | None = None
    """Text features, where the data set has several (Wikipedia: lda, tfidf). None: the run's own."""
    options: tuple[str, ...] = ()
    """Other options of the data set's loader, as name=value (see help(cmr_fast.data.load), for images load_images)."""
    real: bool = False
    """Write the real values (N, bits) of a method that makes codes, before their signs are taken."""
    bits: bool = False
    """Write the packed signs of a method that makes embeddings."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        _commands.encode(self)


@dataclass(frozen=True)
class Index:
    """Build a Hamming index from packed codes (uint8 .npy files, as `encode` writes them), or append to one.

    Example:  cmr-fast index images.npy more.npy --out db.cmrx

    Example:  cmr-fast index today.npy --out db.cmrx --append
    """

    codes: Positional[tuple[Path, ...]]
    """.npy files, uint8 (N, bytes), whose rows are numbered on; index files and faiss's IndexBinaryFlat or IDMap files,
    which bring their ids."""
    out: Path
    """The index file to write."""
    append: bool = False
    """Add to the index file there. It stays whole whatever happens."""
    ids: Path | None = None
    """int64 (N,) .npy of your own ids, one per row of all files together. None: 0, 1, 2, …"""
    bits: int | None = None
    """Code length. None: that of the first file, 8 x bytes for .npy."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        _index_commands.index(self)


@dataclass(frozen=True)
class Search:
    """The k nearest codes of an index for every query code: exact, sorted by distance, then by order of insertion.

    Example:  cmr-fast search db.cmrx queries.npy --k 10 --out hits.csv
    """

    index: Positional[Path]
    """Index file, from `cmr-fast index`, or a faiss IndexBinaryFlat or IDMap file."""
    queries: Positional[Path]
    """Packed query codes: uint8 (Q, bytes) .npy, or an index file."""
    k: int = 10
    """Hits per query."""
    out: Path | None = None
    """results.npz (arrays distances and ids, (Q, k)) or results.csv (query, rank, id, distance). None: only print."""
    threads: int | None = None
    """CPU threads. None: all that this process may use."""
    show: int = 5
    """Queries to print."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        _index_commands.search(self)


@dataclass(frozen=True)
class Evaluate:
    """mAP of a trained run, or of your own codes or embeddings, under a named convention and tie rule.

    Example:  cmr-fast evaluate runs/acmr-wikipedia-seed0 --convention every --k 50

    Example:  cmr-fast evaluate --query-codes q.npy --database-codes d.npy --query-labels a.npy --database-labels b.npy
    """

    trained: Positional[Path | None] = None
    """Run folder, or model.safetensors. None: the four files below."""
    data: str | None = None
    """Data set: `shapes`, a folder or file, or a name under $CMR_FAST_DATA. None: the run's own."""
    features: str | None = None
    """Text features, where the data set has several (Wikipedia: lda, tfidf). None: the run's own."""
    options: tuple[str, ...] = ()
    """Other options of the data set's loader, as name=value (see help(cmr_fast.data.load), for images load_images)."""
    query_codes: Path | None = None
    """.npy of the queries: packed codes uint8 (Q, bytes), or embeddings float (Q, d)."""
    database_codes: Path | None = None
    """.npy of the database, of the same kind."""
    query_labels: Path | None = None
    """.npy of labels: int (Q,) class ids or 0/1 (Q, C); relevant means at least one label shared."""
    database_labels: Path | None = None
    """.npy of the database's labels."""
    metric: Literal["cosine", "l2", "ip"] = "cosine"
    """How embeddings from files are compared."""
    bits: int | None = None
    """Length of codes from files. None: 8 x bytes."""
    convention: str = "all"
    """How AP is defined: all, topk_hits, topk_R, topk_min, map_at_r, first_k_hits, hits_skip, sephfamily; or every."""
    ties: str = "index"
    """How equal distances are ranked: index, tie_aware, optimistic, pessimistic; or every."""
    k: int | None = None
    """Cut of the ranking (mAP@k). None: the whole ranking."""
    out: Path | None = None
    """JSON file to write the table to."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        _commands.evaluate(self)


@dataclass(frozen=True)
class Attack:
    """Attack a trained run: what is left of a classifier's accuracy, or of a retriever's R@K with images as queries.

    Example:  cmr-fast attack runs/scatter-cifar10-seed0 --attacks clean pgd20 apgd-dlr cw100x5

    Attacks on classifiers:  clean, fgsm, pgdN, cwN, mifgsmN, targetedN, apgd-ce, apgd-dlr, apgd-t, local-search,
    square, fab, and transfer-pgdN and transfer-cwN from a --surrogate. N steps; xR after a name makes R restarts.
    """

    trained: Positional[Path]
    """Run folder, or model.safetensors."""
    attacks: tuple[str, ...] = ("clean", "pgd20", "apgd-dlr")
    """Names as above. A retriever is attacked by PGD and APGD on the ranking, and takes no names."""
    eps: float | None = None
    """Radius of the L-inf ball: of pixels from 0 to 1, or a share of the features' range. None: the run's own, else
    8/255."""
    images: int = 500
    """Test images to attack, each class its share and always the same; of a retriever the first queries."""
    restarts: int = 1
    """Random starts of each attack on a retriever."""
    surrogate: Path | None = None
    """A run that the transfer attacks are crafted on; the victim itself is refused."""
    save: Path | None = None
    """An .npz for the images, their labels, and the adversarial images of the last attack, float32 from 0 to 1."""
    out: Path | None = None
    """Of a classifier: a folder that keeps finished attacks, so that the command goes on where it was stopped. Of a
    retriever: a folder for the report, with plots and a verdict."""
    batch: int = 250
    """Images a batch."""
    seed: int = 0
    """Seed of the random starts."""
    fast: bool = False
    """Gradients in bfloat16; success is decided in float32."""
    data: str | None = None
    """Data set: `shapes`, a folder or file, or a name under $CMR_FAST_DATA. None: the run's own."""
    features: str | None = None
    """Text features, where the data set has several (Wikipedia: lda, tfidf). None: the run's own."""
    options: tuple[str, ...] = ()
    """Other options of the data set's loader, as name=value (see help(cmr_fast.data.load), for images load_images)."""
    force: bool = False
    """Overwrite the file to save, or an earlier report."""

    def __call__(self) -> None:
        from cmr_fast.cli import _attack_commands

        _attack_commands.attack(self)


@dataclass(frozen=True)
class Report:
    """Of retrievers the papers' figures and a results table; of classifiers a robustness report with a verdict.

    Example:  cmr-fast report runs/acmr-wikipedia-seed0 runs/cmimh-wikipedia-seed0 --out report

    Example:  cmr-fast report runs/scatter-cifar10-seed0 runs/madry --surrogate runs/plain --out robustness
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders; those on the same data share their plots. All retrievers, or all classifiers."""
    out: Path
    """Folder to write: PNG figures, results.csv (robustness.csv), README.md, index.html. The robustness report keeps
    finished attacks in it and goes on where it was stopped."""
    data: str | None = None
    """Data set of all runs. None: each run's own."""
    features: str | None = None
    """Text features, where the data set has several (Wikipedia: lda, tfidf). None: the run's own."""
    options: tuple[str, ...] = ()
    """Other options of the data set's loader, as name=value (see help(cmr_fast.data.load), for images load_images)."""
    baselines: bool = True
    """CCA, CCA-ITQ and random beside the runs; --no-baselines leaves them out."""
    tsne_points: int = 1000
    """Query pairs in the t-SNE plots (ACMR, Fig. 4: 1000); 0 draws none."""
    attacks: tuple[str, ...] = ()
    """Of classifiers: attacks by the names that `cmr-fast attack --help` lists. None: the rebuttal's and APGD."""
    eps: float | None = None
    """Of classifiers: radius of the L-inf ball, of pixels from 0 to 1. None: what the first run was trained with."""
    images: int = 500
    """Of classifiers: test images to attack; the local search and the checks see 100 of them."""
    surrogate: Path | None = None
    """Of classifiers: a run that the black-box attacks are crafted on."""
    fast: bool = False
    """Of classifiers: gradients in bfloat16; success is decided in float32."""
    force: bool = False
    """Overwrite the files of an earlier report in that folder."""

    def __call__(self) -> None:
        _commands.report(self)


@dataclass(frozen=True)
class Doctor:
    """Versions, instruction set, the backends of each op, extras and data: what is there, what is not, and why.

    Example:  cmr-fast doctor --json
    """

    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from cmr_fast.cli.doctor import examine, print_report

        found = examine()
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            print_report(found)


def train() -> None:
    """Train a method of the papers, then measure it beside the baselines.

    Example:  cmr-fast train acmr --data PATH --epochs 50 --out runs/first
    """


COMMANDS: dict[str, Any] = {
    "demo": Demo,
    "train": train,
    "encode": Encode,
    "index": Index,
    "search": Search,
    "evaluate": Evaluate,
    "attack": Attack,
    "report": Report,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 for an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _parse(arguments)()
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        if arguments[:1] == ["train"]:
            again = arguments if "--resume" in arguments else [*arguments, "--resume"]
            print(f"go on with: {PROGRAM} {shlex.join(again)}", file=sys.stderr)
        elif arguments[:1] in (["report"], ["attack"]):
            print("the same command goes on from the attacks that are finished and kept in --out", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _parse(arguments: list[str]) -> Any:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command == "train":
        return _parse_train(rest)
    if command in COMMANDS:
        return _cli(COMMANDS[command], f"{PROGRAM} {command}", rest)
    # help, --version or a command that there is not: the parser of everything says so
    if command == "--version":
        from cmr_fast import __version__

        print(f"{PROGRAM} {__version__}")
        raise SystemExit(0)
    return _choose(COMMANDS, PROGRAM, ABOUT, [command, *rest])


def _parse_train(arguments: list[str]) -> Any:
    from cmr_fast.methods import METHODS

    if arguments and arguments[0] in METHODS:
        name = arguments[0]
        return _cli(_train_arguments(name, _preset(arguments)), f"{PROGRAM} train {name}", arguments[1:])
    choices = {name: _train_arguments(name) for name in METHODS}
    return _choose(choices, f"{PROGRAM} train", inspect.getdoc(train) or "", arguments or ["--help"])


def _preset(arguments: list[str]) -> str:
    """The value of --preset: it sets the defaults of the flags that tyro is about to read."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--preset":
            return value
        if flag.startswith("--preset="):
            return flag.partition("=")[2]
    return TrainingData.preset


def _train_arguments(name: str, preset: str = "paper") -> type:
    """A dataclass of one method's flags: the data, the method's config and the run's."""
    from cmr_fast.methods import METHODS
    from cmr_fast.methods.loop import RunConfig

    kind = METHODS[name]
    presets = {"paper": kind.Config(), **kind.presets}
    if preset not in presets:
        raise InputError(f"--preset of {name} must be one of {', '.join(presets)}, got {preset!r}")
    paper = (sys.modules[kind.__module__].__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    settings = RunConfig(out=Path(f"runs/{name}-<data>-seed<seed>"))
    made = make_dataclass(
        f"Train{kind.__name__}",
        [
            ("data", TrainingData, TrainingData()),
            (name, kind.Config, field(default_factory=lambda: presets[preset])),
            ("run", RunConfig, settings),
        ],
        namespace={"__call__": lambda self: _commands.train(name, self.data, getattr(self, name), self.run)},
        frozen=True,
    )
    example = f"{PROGRAM} train {name} --data PATH --epochs 50 --seed 1 --out runs/first"
    made.__doc__ = f"{paper}\n\nExample:  {example}\n\nPresets:  {', '.join(presets)}"
    return made


@dataclass(frozen=True)
class TrainingData:
    """What to train on."""

    data: str = "shapes"
    """`shapes` (built in), a folder or file of a known layout, or a name under $CMR_FAST_DATA."""
    features: str | None = None
    """Text features, where the data set has several (Wikipedia: lda, tfidf). None: the first."""
    preset: str = "paper"
    """Settings to start from, which the flags below then change: `paper`, or what was chosen by validation on a data
    set (see Presets above), with which the tables in bench/results repeat."""
    options: tuple[str, ...] = ()
    """Other options of the data set's loader, as name=value (see help(cmr_fast.data.load), for images load_images)."""


def _cli(what: Any, program: str, arguments: list[str]) -> Any:
    return tyro.cli(what, prog=program, description=inspect.getdoc(what), args=arguments, config=_SETTINGS)


def _choose(choices: dict[str, Any], program: str, about: str, arguments: list[str]) -> Any:
    return tyro.extras.subcommand_cli_from_dict(
        choices, prog=program, description=about, args=arguments, config=_SETTINGS
    )
