"""What several commands share: the data flags, and opening runs, data sets and files. Imports wait in functions."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmr_fast._files import write_aside
from cmr_fast._terminal import busy
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cmr_fast.data.captions import CaptionedDataset
    from cmr_fast.data.images import ImageDataset
    from cmr_fast.data.pairs import PairedDataset
    from cmr_fast.methods.loop import Method


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which data; a command that takes a run takes the run's own where nothing is given."""

    data: str | None = None
    """Data set: `shapes`, a folder or file, or a name under $CMR_FAST_DATA. None: the run's own."""
    features: str | None = None
    """Text features, where the data set has several (Wikipedia: lda, tfidf). None: the run's own."""
    options: tuple[str, ...] = ()
    """Other options of the data set's loader, as name=value (see help(cmr_fast.data.load), for images load_images)."""

    def loader_options(self) -> dict[str, Any]:
        """The loader's options that --features and --options give."""
        options: dict[str, Any] = {} if self.features is None else {"features": self.features}
        for text in self.options:
            name, equals, value = text.partition("=")
            if not (name.isidentifier() and equals):
                raise InputError(f"--options expects name=value, got {text!r}")
            options[name] = _option(name, value)
        return options

    def source(self, trained: Path) -> tuple[str, dict[str, Any]]:
        """Where the data of the run at `trained` came from, and the loader's options; the flags go first."""
        source = _recorded(trained)
        if self.data is None and source["data"] is None:
            raise InputError(f"{trained}: does not say which data it was trained on; expected --data PATH")
        options = source["options"] if self.data is None else {}
        return self.data or source["data"], options | self.loader_options()

    def data_of(self, trained: Path) -> str | None:
        """Where the data come from, as `source` says; None where nothing says it."""
        return self.data if self.data is not None else _recorded(trained)["data"]

    def pairs_of(self, model: "Method", trained: Path) -> "PairedDataset":
        """The pairs to use the retriever `model` of the run `trained` on. InputError where they do not fit it."""
        if is_classifier(model):
            raise InputError(
                f"{trained}: a classifier, expected a retriever; `cmr-fast attack` and `report` measure it"
            )
        if reads_captions(model):
            raise InputError(
                f"{trained}: trained on captions, expected a retriever of pairs; `cmr-fast evaluate`, `encode` and "
                "`report` measure it"
            )
        dataset = load_pairs(*self.source(trained))
        for name in model.init_arguments:
            needed, seen = getattr(model, name), getattr(dataset, name)
            if name != "num_classes" and needed != seen:
                part, _, what = name.partition("_")
                what = "features of {} dimensions" if what == "dim" else "s of shape {}"
                raise InputError(
                    f"{trained}: expects {part}{' ' * (what[0] == 'f')}{what.format(needed)}, {dataset.name} has {seen}"
                )
        return dataset

    def captions_of(self, model: "Method", trained: Path) -> "CaptionedDataset":
        """The images with captions to use the model of the run `trained` on. InputError for other models."""
        if not reads_captions(model):
            raise InputError(f"{trained}: {model.name}, expected a run on captions (clip)")
        return load_captioned_images(*self.source(trained))

    def images_of(self, model: "Method", trained: Path) -> "ImageDataset":
        """The images to use the classifier `model` of the run `trained` on. InputError where they do not fit it."""
        if not is_classifier(model):
            raise InputError(f"{trained}: a retriever ({model.name}), expected a classifier (scatter)")
        dataset = load_labelled_images(*self.source(trained))
        if dataset.num_classes != model.num_classes:
            raise InputError(f"{trained}: has {model.num_classes} classes, {dataset.name} has {dataset.num_classes}")
        return dataset


def _recorded(trained: Path) -> dict[str, Any]:
    """What `record_source` noted of the run at `trained`."""
    from cmr_fast.methods._runfolder import SOURCE, read_json

    recorded = folder_of(trained) / SOURCE
    return read_json(recorded, data=str | None, options=dict) if recorded.is_file() else {"data": None, "options": {}}


COUNTS = {"count": 1, "train": 1, "query": 1, "test": 1, "seed": 0}
"""Loader options that are numbers, and the least of each; `database` is a number or a split's name."""


def _option(name: str, value: str) -> int | str:
    if value.removeprefix("-").isdecimal() and value.isascii():
        number = int(value)
        if number < COUNTS.get(name, number):
            raise InputError(f"--options {name} must be at least {COUNTS[name]}, got {value}")
        return number
    if name in COUNTS:
        raise InputError(f"--options {name} must be an integer of at least {COUNTS[name]}, got {value!r}")
    return value


def is_classifier(model: "Method | type[Method]") -> bool:
    """Whether a model, or a kind of models, classifies images."""
    from cmr_fast.methods.method import Classifier

    return issubclass(model if isinstance(model, type) else type(model), Classifier)


def reads_captions(model: "Method | type[Method]") -> bool:
    """Whether a model, or a kind of models, retrieves between images and their captions."""
    from cmr_fast.methods.method import CaptionRetriever

    return issubclass(model if isinstance(model, type) else type(model), CaptionRetriever)


def makes_codes(model: "Method") -> bool:
    """Whether the signs of what a model encodes are a code."""
    return bool(getattr(model, "binary", False))


def load_pairs(data: str, options: Mapping[str, Any]) -> "PairedDataset":
    """Read pairs; InputError for devices and FIFOs, which would be waited for."""
    from cmr_fast.data import load

    _check_regular(data)
    with busy(f"reading {data}"):
        return load(data, **options)


def load_captioned_images(data: str, options: Mapping[str, Any]) -> "CaptionedDataset":
    """Read images with captions; with the option `test`, which names what they are tested on, as a stream."""
    from cmr_fast.data import captions, load_captions, stream_captions
    from cmr_fast.data.streamed import is_shards

    if "test" in options and not isinstance(options["test"], int):
        with busy(f"reading {data}"):
            return stream_captions(data, **options)
    if is_shards(data) and not captions.holds(Path(data)):
        raise InputError(
            f"{data}: shards of pairs are streamed by `cmr-fast train`, and need --test DATA: what is measured on"
        )
    _check_regular(data)
    with busy(f"reading {data}"):
        return load_captions(data, **options)


def load_labelled_images(data: str, options: Mapping[str, Any]) -> "ImageDataset":
    """Read labelled images, whose options are checked first."""
    from cmr_fast.data import load_images

    _check_regular(data)
    known = ("train", "test", "seed")
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"labelled images take no option {unknown[0]!r}; they take {', '.join(known)}")
    if wrong := [name for name, value in options.items() if not isinstance(value, int)]:
        raise InputError(f"{wrong[0]} must be an integer, got {options[wrong[0]]!r}")
    with busy(f"reading {data}"):
        return load_images(data, **options)


def _check_regular(data: str) -> None:
    path = Path(data)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{data}: is a device, FIFO or socket, expected a data file or folder")


def load_run(trained: Path) -> "Method":
    """The model of a run folder or model file."""
    from cmr_fast.methods.loop import load_model

    check_exists(trained)
    return load_model(trained)


def open_run(trained: Path, flags: DataFlags) -> "tuple[Method, PairedDataset]":
    """The retriever of a run and the pairs that `flags` ask for."""
    model = load_run(trained)
    return model, flags.pairs_of(model, trained)


def folder_of(trained: Path) -> Path:
    """The run folder, of itself or of the model file in it."""
    return trained if trained.is_dir() else trained.parent


def split_of(dataset: "PairedDataset | CaptionedDataset", split: str, trained: Path) -> Any:
    """The pairs (or captioned images) of a split; train and valid as the run at `trained` divided them."""
    from cmr_fast.data.streamed import StreamedImages
    from cmr_fast.methods._runfolder import read_run

    if split in ("train", "valid") and dataset.valid is None:
        run = read_run(folder_of(trained))
        if run is not None and run["valid_fraction"] > 0:
            dataset = dataset.hold_out(run["valid_fraction"], run["seed"])
    pairs = getattr(dataset, split)
    if isinstance(pairs, StreamedImages):
        raise InputError(f"{dataset.name}: the {split} split is a stream, expected one that is held: test or valid")
    if pairs is None:
        raise InputError(f"{dataset.name}: has no {split} split, and {trained} held none out")
    return pairs


def check_exists(path: Path) -> None:
    """InputError where there is nothing at `path`."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")


def check_output(path: Path, force: bool, *inputs: Path | str | None) -> None:
    """Refuse to write over a file; --force allows it, but over none of the command's `inputs` nor a run's own files.

    inputs: files, and folders of data, whose files are inputs.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a device, FIFO or socket, expected the name of a file to write")
    if _among(path, [Path(given) for given in inputs if given is not None]):
        raise InputError(f"{path}: is an input of this command, expected another name for what it writes")
    if run := _run_of(path):
        raise InputError(f"{path}: is for the run in {run} itself, expected another name for what this command writes")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; --force overwrites it")
    check_folder(path.parent)


def _among(path: Path, inputs: list[Path]) -> bool:
    """Whether a file is one of `inputs`, or a data file in a folder of them, by whatever name."""
    from cmr_fast.data.readers import SUFFIXES

    if not path.exists():
        return False
    files = [given for given in inputs if given.is_file()]
    for folder in (given for given in inputs if given.is_dir() and not _is_run(given)):
        files += [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    return any(path.samefile(file) for file in files)


def _is_run(folder: Path) -> bool:
    from cmr_fast.methods._runfolder import CHECKPOINT, MODEL

    return (folder / MODEL).exists() or (folder / CHECKPOINT).exists()


def _run_of(path: Path) -> Path | None:
    """The run folder of which a file that is there or is to be is one that training writes."""
    from cmr_fast.methods._runfolder import CHECKPOINT, CONFIG, LOCK, METRICS, MODEL, RESULTS, SOURCE

    for place in (path, Path(os.path.realpath(path))):
        for name in (CHECKPOINT, CONFIG, LOCK, METRICS, MODEL, RESULTS, SOURCE):
            own = place.parent / name
            alike = place.name.casefold() == name or (place.exists() and own.exists() and place.samefile(own))
            if alike and _is_run(place.parent):
                return place.parent
    return None


def check_folder(folder: Path) -> None:
    """Refuse, before the work, a folder that cannot be made or written."""
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not above.is_dir():
        raise InputError(f"{folder}: cannot be made, since {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written, permission denied for {above}")


def check_report_folder(out: Path, force: bool) -> None:
    """Refuse a file where a report's folder is to be, and a report that is there; --force allows the second."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder to write")
    if _is_run(out):
        raise InputError(f"{out}: is a run folder, expected another one for the report, such as {out / 'report'}")
    if (out / "README.md").exists() and not force:
        raise InputError(f"{out}: holds a report already; --force writes over it")
    check_folder(out)


def check_least(**flags: tuple[int | None, int]) -> None:
    """InputError for a flag that is given and below its least: name=(value, least)."""
    for name, (value, least) in flags.items():
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")


def named_files(flag: str, given: tuple[str, ...]) -> dict[str, str]:
    """{NAME: FILE} of a flag's NAME=FILE values, each of which must be there."""
    files: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not (name and equals and file) or name in files:
            raise InputError(f"--{flag} expects NAME=FILE, each name once, got {text!r}")
        check_exists(Path(file))
        files[name] = file
    return files


def refuse_flags(given: Mapping[str, Any], why: str) -> None:
    """InputError for the first flag of `given` with a value, which the command would not use."""
    for name, value in given.items():
        if value is not None and value is not False and value != ():
            raise InputError(f"--{name.replace('_', '-')} {why}")


def read_array(path: Path) -> "np.ndarray":
    """A .npy file, mapped into memory; nothing in it is executed."""
    import numpy as np

    from cmr_fast.data import formats

    check_exists(path)
    head = formats.first_bytes(path)
    refused = formats.other_than_one_array(path, head, _SAVE)
    if refused or not head.startswith(b"\x93NUMPY"):
        raise InputError(f"{path}: not a .npy file; it {refused or f'begins with {head[:16]!r}'}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        if "object" in str(error).lower():
            raise InputError(f"{path}: {formats.OBJECTS}") from error
        raise InputError(f"{path}: begins like a .npy file, but is damaged or cut short ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise InputError(f"{path}: expected an array with rows, got a single {array.dtype}")
    return array


_SAVE = "numpy.save its array"


def write_arrays(arrays: "Mapping[Path, np.ndarray]") -> None:
    """What numpy.save writes, all files or none; its own error of a full disk says neither that nor which file."""
    from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0

    with ExitStack() as stack:
        for path, array in arrays.items():
            rows = array if array.flags.c_contiguous else array.copy()
            with open(stack.enter_context(write_aside(path)), "wb") as file:
                write_array_header_1_0(file, header_data_from_array_1_0(rows))
                file.write(rows.data)


@contextmanager
def naming(**files: Path | None) -> Iterator[None]:
    """An InputError from inside that begins with the name of an argument, or of two, names their files first."""
    try:
        yield
    except InputError as error:
        words = str(error).split(" ", 3)
        names = words[:1] if words[1:2] != ["and"] else words[:3:2]
        paths = dict.fromkeys(str(files[name]) for name in names if files.get(name) is not None)
        raise InputError(f"{', '.join(paths)}: {error}" if paths else str(error)) from error
