"""`cmr-fast report`: the papers' figures of retrievers, or the robustness of classifiers."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from cmr_fast._terminal import busy
from cmr_fast.cli.attack import eps_of, load_surrogate
from cmr_fast.cli.common import (
    DataFlags,
    check_least,
    check_report_folder,
    folder_of,
    is_classifier,
    load_run,
    reads_captions,
    refuse_flags,
)
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.methods.loop import Method


@dataclass(frozen=True, kw_only=True)
class Report(DataFlags):
    """Of retrievers the papers' figures and a results table; of classifiers a robustness report with a verdict.

    Example:  cmr-fast report runs/acmr-wikipedia-seed0 runs/cmimh-wikipedia-seed0 --out report

    Example:  cmr-fast report runs/scatter-cifar10-seed0 runs/madry --surrogate runs/plain --out robustness
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders; those on the same data share their plots, and those that differ in the seed alone get a row of their
    mean and deviation. All retrievers, or all classifiers."""
    out: Path
    """Folder to write: PNG figures (of curves the values as CSV too), results.csv (robustness.csv), README.md,
    index.html. The robustness report keeps finished attacks in it and goes on where it was stopped."""
    baselines: bool = True
    """CCA, semantic matching, CCA-ITQ and random beside the runs; --no-baselines leaves them out."""
    tsne_points: int | None = None
    """Query pairs in the t-SNE plots. None: 1000 (ACMR, Fig. 4); 0 draws none."""
    attacks: tuple[str, ...] = ()
    """Of classifiers: attacks by the names that `cmr-fast attack --help` lists. None: the rebuttal's and APGD."""
    eps: float | None = None
    """Of classifiers: radius of the L-inf ball, of pixels from 0 to 1. None: what the first run was trained with."""
    images: int | None = None
    """Of classifiers: test images to attack. None: 500; the local search and the checks see 100 of them."""
    surrogate: Path | None = None
    """Of classifiers: a run that the black-box attacks are crafted on. Where it is among the runs, it is left out."""
    fast: bool = False
    """Of classifiers: gradients in bfloat16; success is decided in float32."""
    force: bool = False
    """Overwrite the files of an earlier report in that folder."""

    def __call__(self) -> None:
        """Run the command."""
        check_report_folder(self.out, self.force)
        check_least(tsne_points=(self.tsne_points, 0), images=(self.images, 1))
        models = [load_run(path) for path in self.runs]
        kinds = {(is_classifier(model), reads_captions(model)) for model in models}
        if len(kinds) > 1:
            raise InputError(
                "a report is of retrievers or of classifiers, of pairs or of captions; got several kinds of runs"
            )
        classifiers, captions = kinds.pop()
        if classifiers:
            self._classifiers(models)
        elif captions:
            self._captions(models)
        else:
            self._retrievers(models)

    def _captions(self, models: "list[Method]") -> None:
        from cmr_fast.reports.captions import print_results, write_report

        others = {name: getattr(self, name) for name in ("attacks", "eps", "images", "surrogate", "fast")}
        others |= {"tsne_points": self.tsne_points, "no-baselines": not self.baselines}
        refuse_flags(others, "is for other runs than those on captions")
        runs = [(path, model, self.captions_of(model, path)) for path, model in zip(self.runs, models, strict=True)]
        with busy("ranking and drawing"):
            results = write_report(dict(zip(_names(self.runs), runs, strict=True)), self.out, force=self.force)
        print_results(results, "Results, test split")
        print(f"\nReport: {self.out / 'index.html'}")

    def _retrievers(self, models: "list[Method]") -> None:
        from cmr_fast.reports.retrieval import TSNE_POINTS, print_results, write_report

        refuse_flags(
            {name: getattr(self, name) for name in ("attacks", "eps", "images", "surrogate", "fast")},
            "is for classifiers; `cmr-fast attack RUN --out FOLDER` attacks a retriever",
        )
        runs = [(path, model, self.pairs_of(model, path)) for path, model in zip(self.runs, models, strict=True)]
        points = TSNE_POINTS if self.tsne_points is None else self.tsne_points
        with busy("drawing"):
            rows = write_report(runs, self.out, with_baselines=self.baselines, tsne_points=points, force=self.force)
        print_results(rows, title="Results")
        print(f"\nReport: {self.out / 'index.html'}")

    def _classifiers(self, models: "list[Method]") -> None:
        from cmr_fast.reports import robustness

        refuse_flags({"tsne_points": self.tsne_points, "no-baselines": not self.baselines}, "is for retrievers")
        runs, models = self._without_surrogate(models)
        datasets = [self.images_of(model, path) for path, model in zip(runs, models, strict=True)]
        data = datasets[0].name
        if any(dataset.name != data for dataset in datasets):
            raise InputError("classifiers of one report must be of one data set; expected runs on the same --data")
        eps = eps_of(models[0], self.eps)
        images = 500 if self.images is None else self.images
        settings = robustness.Settings(eps=eps, images=images, fast=self.fast)
        if self.attacks:
            robustness.check_names(self.attacks)
        surrogate = load_surrogate(self.surrogate)
        results = []
        for name, model, dataset in zip(_names(runs), models, datasets, strict=True):
            x, y = robustness.pixels_of(dataset.test, settings.images)
            names = list(self.attacks) or None
            folder = self.out / "attacks" / name
            results.append(
                robustness.examine(name, model, x, y, settings, names=names, surrogate=surrogate, keep=folder)
            )
        title = f"{data}, eps {eps * 255:.3g}/255"
        robustness.write_report(results, self.out, title, settings)
        robustness.print_outcomes(f"Accuracy, {title}", {r.name: r.outcomes for r in results})
        for result in results:
            print(f"\n{result.name}: {result.verdict()}")
        print(f"\nReport: {self.out / 'index.html'}")

    def _without_surrogate(self, models: "list[Method]") -> "tuple[tuple[Path, ...], list[Method]]":
        """The runs to attack: a surrogate among them, as of FOLDER/*, is no victim of its own."""
        if self.surrogate is None:
            return self.runs, models
        surrogate = folder_of(self.surrogate).resolve()
        kept = [n for n, path in enumerate(self.runs) if folder_of(path).resolve() != surrogate]
        if not kept:
            raise InputError(f"{self.surrogate}: the surrogate is the one run given, expected another to attack")
        if len(kept) < len(models):
            print(f"{self.surrogate} is the surrogate and left out of the runs that are attacked", file=sys.stderr)
        return tuple(self.runs[n] for n in kept), [models[n] for n in kept]


def _names(runs: tuple[Path, ...]) -> list[str]:
    from cmr_fast.reports.page import folder_names

    return folder_names([folder_of(path) for path in runs])
