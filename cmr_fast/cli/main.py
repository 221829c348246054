"""The program `cmr-fast`: finds the command and runs it. Each command is a module of its name."""

import codecs
import inspect
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from cmr_fast.errors import InputError

PROGRAM = "cmr-fast"
ABOUT = """Train, attack, defend, search and measure cross-modal (image and text) retrieval models.

Start with:  cmr-fast demo

Your own data:  cmr-fast train acmr --data PATH

Every command explains itself:  cmr-fast train acmr --help"""
PLAIN = {"…": "...", "→": "->", "—": "-", "–": "-", "×": "x", "’": "'"}  # noqa: RUF001
COMMANDS = (
    *("demo", "augment", "features", "train", "encode", "index", "search", "serve"),
    *("dedup", "evaluate", "attack", "report", "study", "reproduce", "doctor"),
)
EXTRAS = {"open_clip": "clip", "transformers": "text", "torchattacks": "attacks"}
EXTRAS |= dict.fromkeys(("faiss", "asv", "torchmetrics"), "bench")
EXTRAS |= dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "pydantic", "starlette"), "serve")
"""The extra that brings a package which not every command needs; all others come with `train`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the program's name; None: those of the process.

    Returns
    -------
    int
        The exit code: 0, 2 for bad input and errors of the system, 130 for an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_anything()
    try:
        with _warnings_of_one_line():
            _parse(arguments)()
    except InputError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "cmr_fast").partition(".")[0]
        if package == "cmr_fast":
            raise
        extra = EXTRAS.get(package, "train")
        return _fail(f'{package} is not installed, which this command needs: pip install "cmr-fast[{extra}]"')
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as error:
        path = error.filename2 or error.filename
        return _fail(f"{path}: {error.strerror}" if path else str(error))
    except KeyboardInterrupt as error:
        print("\ninterrupted", file=sys.stderr)
        if arguments[:1] == ["train"]:
            again = arguments if "--resume" in arguments else [*arguments, "--resume"]
            print(f"go on with: {PROGRAM} {shlex.join(again)}", file=sys.stderr)
        elif error.args:
            print(*error.args, file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # what safetensors makes of an OSError, such as a full disk
            raise
        return _fail(f"{error}; an earlier checkpoint, if there is one, is whole")
    return 0


@contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Warnings are printed without the line of Python that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _print_anything() -> None:
    """Print what the encoding of the output does not have in plain letters: ASCII locales, undecodable file names."""
    codecs.register_error("cmr_fast_plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="cmr_fast_plain")


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError):
        plain = PLAIN.get(error.object[error.start])
        if plain is not None:
            return plain, error.start + 1
    return codecs.backslashreplace_errors(error)


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _parse(arguments: list[str]) -> Any:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name == "--version":
        from cmr_fast import __version__

        print(f"{PROGRAM} {__version__}")
        raise SystemExit(0)
    if name == "train":
        train = import_module("cmr_fast.cli.train")
        if rest and rest[0] in train.METHODS:
            return _cli(train.flags_of(rest[0], train.preset_in(rest)), f"{PROGRAM} train {rest[0]}", rest[1:])
        choices = {method: train.flags_of(method) for method in train.METHODS}
        choices["mlm"] = import_module("cmr_fast.cli.mlm").TrainMLM
        if rest and rest[0] == "mlm":
            return _cli(choices["mlm"], f"{PROGRAM} train mlm", rest[1:])
        return _choose(choices, f"{PROGRAM} train", inspect.getdoc(train.Train) or "", rest or ["--help"])
    if name == "augment":
        augment = import_module("cmr_fast.cli.augment")
        return _choose(augment.KINDS, f"{PROGRAM} augment", inspect.getdoc(_augment_help) or "", rest or ["--help"])
    if name in COMMANDS:
        return _cli(_command(name), f"{PROGRAM} {name}", rest)
    # help, or a command that there is not: the parser of everything says so
    return _choose({command: _command(command) for command in COMMANDS}, PROGRAM, ABOUT, [name, *rest])


def _command(name: str) -> Any:
    """The dataclass of a command's flags, whose `__call__` runs it; of `train` and `augment` what their help says."""
    if name in ("train", "augment"):
        return _train_help if name == "train" else _augment_help
    return getattr(import_module(f"cmr_fast.cli.{name}"), name.capitalize())


def _train_help() -> None:
    """Train a method of the papers, then measure it beside the baselines."""


def _augment_help() -> None:
    """Make the captions and images that MA2T trains on beside the originals, and measure them.

    Example:  cmr-fast augment captions --data flickr8k --kind eda --out eda.json
    """


def _cli(what: Any, program: str, arguments: list[str]) -> Any:
    import tyro

    description = inspect.getdoc(what)
    return tyro.cli(what, prog=program, description=description, args=arguments, config=_settings())


def _choose(choices: dict[str, Any], program: str, about: str, arguments: list[str]) -> Any:
    import tyro

    return tyro.extras.subcommand_cli_from_dict(
        choices, prog=program, description=about, args=arguments, config=_settings()
    )


def _settings() -> tuple[Any, ...]:
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, PositionalMetavarFromFieldName

    return OmitArgPrefixes, FlagCreatePairsOff, PositionalMetavarFromFieldName
