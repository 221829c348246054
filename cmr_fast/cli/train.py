"""`cmr-fast train METHOD`: its flags are the data, the method's config and the run's."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cmr_fast._terminal import busy, new_table, show
from cmr_fast.cli.common import (
    DataFlags,
    is_classifier,
    load_captioned_images,
    load_labelled_images,
    load_pairs,
    makes_codes,
    reads_captions,
    refuse_flags,
)
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS

if TYPE_CHECKING:
    from cmr_fast.data.pairs import PairedDataset
    from cmr_fast.methods.loop import Run


@dataclass(frozen=True, kw_only=True)
class TrainingData(DataFlags):
    """What to train on."""

    data: str = "shapes"
    """`shapes` (built in), a folder or file of a known layout, or a name under $CMR_FAST_DATA. With --test: shards of
    photos with captions that memory need not hold, a folder of .tar or .parquet files or a pattern: 'shards/*.tar'."""
    test: str | None = None
    """Stream the shards that --data names, and test on this: the test split of a data set of images with captions, or
    other shards. Options of the stream are --options buffer=4096 (samples mixed with each other), size=128,
    image=COLUMN, text=COLUMN, broken=skip (see help(cmr_fast.data.stream_captions))."""
    valid: str | None = None
    """Of a stream: the data set whose validation split is chosen by, or shards. None: that of --test, if it has one."""
    features: str | None = None
    """Text features, where the data set has several (Wikipedia: lda, tfidf). None: the first."""
    preset: str = "default"
    """Settings to start from, which the flags below then change: `default`, `paper` (as printed, as far as it is), or
    made for a data set (see Presets above). It sets the method's config, and what its protocol says of the run."""
    adversarial: tuple[int, ...] = ()
    """Of a hashing method: after the training, fine-tune it on so many adversarial samples of CMLA as well, in a run of
    its own for each number and one on none for comparison, and attack every one anew. None: no such training."""
    adversarial_attack: str = "cmla"
    """The attack on codes, for the samples and for what is left: a variant of CMLA, cgat or dhta, its steps after it
    where not its own: cmla-nointra100. What it costs grows with samples times steps: cmla takes 500, cgat 100 and dhta
    2000."""


@dataclass(frozen=True)
class Train:
    """Train a method of the papers, then measure it beside the baselines.

    Example:  cmr-fast train acmr --data PATH --epochs 50 --out runs/first
    """

    method: ClassVar[str]
    source: TrainingData
    config: Any
    run: Any

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.data.pairs import PairedDataset
        from cmr_fast.methods._runfolder import refuse_used
        from cmr_fast.methods.hardening import check_name
        from cmr_fast.methods.loop import train
        from cmr_fast.ops._tensors import MAX_BITS

        bits = getattr(self.config, "bits", None)
        if bits is not None and bits > MAX_BITS:
            raise InputError(f"--bits must be at most {MAX_BITS}, got {bits}")
        kind = METHODS[self.method]
        options = self._data_options(kind)
        load: Callable[[str, Mapping[str, Any]], Any] = load_pairs
        if reads_captions(kind):
            load = load_captioned_images
        elif is_classifier(kind):
            load = load_labelled_images
        if self.source.adversarial and not getattr(METHODS[self.method], "binary", False):
            raise InputError(f"--adversarial is for hashing methods; {self.method} makes no codes")
        if any(count < 1 for count in self.source.adversarial):
            raise InputError(f"--adversarial must be 1 or more, got {' '.join(map(str, self.source.adversarial))}")
        check_name(self.source.adversarial_attack)
        self._refuse_idle_flags()
        if not self.run.resume and "<data>" not in str(self.run.out):  # before the data are read
            refuse_used(self._folder(""))
        dataset = load(self.source.data, options)
        if _wants_a_gpu(self.config):
            print(
                f"WRN-{self.config.depth}-{self.config.width} on a CPU takes hours an epoch; --preset small is for one",
                file=sys.stderr,
            )
        on_the_fly = getattr(self.config, "defence", "none") != "none"
        config = replace(self.config, defence="none") if on_the_fly else self.config
        settings = replace(self.run, out=self._folder(dataset.name))
        if self.source.adversarial or on_the_fly:  # before hours of training
            from cmr_fast.reports.hashing import check_defences

            check_defences(dataset, settings, self.source.adversarial, cgat=on_the_fly)
        if self.run.devices > 1 and (self.source.adversarial or on_the_fly):
            raise InputError("--adversarial and --defence are of one process, expected --devices 1")
        run = train(self.method, config, dataset, settings)
        if run.rank:
            return
        from cmr_fast.methods._runfolder import record_source

        record_source(run.path, self.source.data, options)
        if self.source.adversarial or on_the_fly:
            self._harden(run, dataset, options, on_the_fly)
        if self.run.quiet:
            return
        if is_classifier(run.model):
            _print_classifier(run)
        elif reads_captions(run.model):
            _print_captions(run)
        else:
            assert isinstance(dataset, PairedDataset)
            _print_retriever(run, dataset, self.config.epochs)

    def _data_options(self, kind: Any) -> dict[str, Any]:
        """The loader's options, of a stream what it is tested on among them."""
        held_out = {"test": self.source.test, "valid": self.source.valid}
        if not reads_captions(kind):
            refuse_flags(held_out, f"is for methods on images with captions; {self.method} holds its data")
        if self.source.test is None:
            refuse_flags(held_out, "is for a stream, which has --test too")
        return {name: value for name, value in held_out.items() if value is not None} | self.source.loader_options()

    def _refuse_idle_flags(self) -> None:
        """InputError for settings of a defence that is not asked for."""
        if getattr(self.config, "defence", "none") == "none":
            own = {f.name: f.default for f in fields(self.config) if f.name.startswith("cgat_")}
            given = {name: getattr(self.config, name) for name, default in own.items()}
            refuse_flags({name: x for name, x in given.items() if x != own[name]}, "is for --defence cgat")
            if not self.source.adversarial:
                attack = self.source.adversarial_attack
                idle = {"adversarial_attack": None if attack == TrainingData.adversarial_attack else attack}
                refuse_flags(idle, "is for --adversarial and --defence")

    def _folder(self, data: str) -> Path:
        return Path(str(self.run.out).replace("<data>", data).replace("<seed>", str(self.run.seed)))

    def _harden(self, run: "Run", dataset: Any, options: dict[str, Any], on_the_fly: bool) -> None:
        from cmr_fast.methods._runfolder import record_source
        from cmr_fast.methods.method import Retriever
        from cmr_fast.reports import hashing

        assert isinstance(run.model, Retriever)
        settings = replace(self.run, out=run.path)
        counts, attack = self.source.adversarial, self.source.adversarial_attack
        rows = hashing.defend(run.model, dataset, settings, counts, attack=attack, cgat=on_the_fly)
        for row in rows:
            if row.run is not None:
                record_source(row.run, self.source.data, options)
        title = f"{self.method} on {dataset.name}, {attack}: mAP after adversarial training"
        hashing.write_defences(rows, run.path / "defences", title)
        if not self.run.quiet:
            hashing.print_defences(rows, title)
            print(f"\nReport: {run.path / 'defences' / 'index.html'}\n")


def flags_of(method: str, preset: str = "default") -> type[Train]:
    """`Train` for one method, its defaults those of a preset."""
    from cmr_fast.methods.loop import RunConfig

    kind = METHODS[method]
    presets = kind.all_presets()
    if preset not in presets:
        raise InputError(f"--preset of {method} must be one of {', '.join(presets)}, got {preset!r}")
    module = sys.modules[kind.__module__]
    about = inspect.getdoc(module if module.__name__.endswith(f".{method}") else kind) or ""
    paper = about.partition("\n\n")[0].replace("\n", " ")
    settings = RunConfig(out=Path(f"runs/{method}-<data>-seed<seed>"), **kind.run_settings(preset))
    flags = make_dataclass(
        f"Train{kind.__name__}",
        [
            ("source", TrainingData, TrainingData()),
            ("config", kind.Config, field(default_factory=lambda: presets[preset])),
            ("run", RunConfig, settings),
        ],
        bases=(Train,),
        namespace={"method": method},
        frozen=True,
    )
    length = "--max-steps 300" if hasattr(kind.Config(), "max_steps") else "--epochs 50"
    example = f"cmr-fast train {method} --data PATH {length} --seed 1 --out runs/first"
    flags.__doc__ = f"{paper}\n\nExample:  {example}\n\nPresets:  {', '.join(presets)}"
    return flags


def preset_in(arguments: list[str]) -> str:
    """The value of --preset: it sets the defaults of the flags that tyro is about to read."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--preset":
            return value
        if flag.startswith("--preset="):
            return flag.partition("=")[2]
    return TrainingData.preset


def next_commands(run: Path, codes: bool) -> list[str]:
    """Commands to type after the training of a retriever, each of which works as it stands."""
    bits = "" if codes else " --bits"
    return [
        f"cmr-fast evaluate {run} --convention every --k 50",
        f"cmr-fast encode {run} --modality image --split database{bits} --out {run}/images.npy",
        f"cmr-fast encode {run} --modality text --split query{bits} --out {run}/queries.npy",
        f"cmr-fast index {run}/images.npy --out {run}/images.cmrx",
        f"cmr-fast search {run}/images.cmrx {run}/queries.npy --k 10 --out {run}/hits.csv",
        f"cmr-fast report {run} --out {run}/report",
    ]


def _wants_a_gpu(config: Any) -> bool:
    import torch

    return getattr(config, "depth", 0) * getattr(config, "width", 0) > 80 and not torch.cuda.is_available()


def _print_retriever(run: "Run", dataset: "PairedDataset", epochs: int) -> None:
    from cmr_fast.methods.evaluation import final_results
    from cmr_fast.reports.retrieval import Score, baselines_for, print_results

    rows = [Score.of(run.results["method"], dataset.name, run.results)]
    with busy("measuring the baselines"):
        for name, model in baselines_for([run.model], dataset):
            rows.append(Score.of(name, dataset.name, final_results(model, dataset)))
    print_results(rows, title=f"{dataset.name}: {len(dataset.query)} queries, {len(dataset.database)} in the database")
    best, ended = run.results.get("best_epoch"), run.results["epochs"]
    early = f", training stopped early after epoch {ended} of {epochs}" if ended < epochs else ""
    print(f"\nRun folder: {run.path}" + (f" (weights of epoch {best}, the best by validation{early})" if best else ""))
    print("Next:")
    for line in next_commands(run.path, codes=makes_codes(run.model)):
        print(f"  {line}")


def _print_captions(run: "Run") -> None:
    from cmr_fast.reports.captions import print_results

    results = run.results
    print_results({results["method"]: results}, f"{results['data']}: test split, every caption of an image its own")
    if "perturbation" in results:
        print(f"\nTrained on: {results['perturbation']}")
    print(f"\nRun folder: {run.path} (weights of epoch {results['best_epoch']})")
    print("Next:")
    print(f"  cmr-fast evaluate {run.path}")
    print(f"  cmr-fast attack {run.path} --images 100")
    print(f"  cmr-fast report {run.path} --out {run.path}/report")


def _print_classifier(run: "Run") -> None:
    table = new_table("accuracy on the test split", "")
    results = run.results
    table.add_row("clean", f"{results['accuracy']:.1%}")
    table.add_row(f"PGD-20, {results['pgd20_images']} images", f"{results['pgd20_accuracy']:.1%}")
    show(f"{results['method']} on {results['data']}", table)
    print(f"\nRun folder: {run.path} (weights of epoch {results['best_epoch']})")
    print("PGD alone certifies nothing. Next:")
    print(f"  cmr-fast attack {run.path} --attacks clean pgd20 apgd-dlr apgd-t")
    print(f"  cmr-fast report {run.path} --out {run.path}/report")
