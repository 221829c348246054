"""`cmr-fast attack`: what attacks leave of a classifier's accuracy, or of a retriever's R@K or mAP."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from cmr_fast._files import write_aside
from cmr_fast.cli.common import (
    DataFlags,
    check_folder,
    check_least,
    check_output,
    check_report_folder,
    is_classifier,
    load_run,
    makes_codes,
    open_run,
    reads_captions,
    refuse_flags,
)
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.methods.loop import Method
    from cmr_fast.reports.robustness import Settings

EPS = 8 / 255
DEFAULT = ("clean", "pgd20", "apgd-dlr")
CAPTIONS_EPS = 2 / 255  # as Co-Attack, SGA and MAT
CAPTIONS_DEFAULT = ("pgd20", "character")
CAPTIONS_WORDS = ("pgd20", "bert-attack", "co-attack", "sga")
BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Attack(DataFlags):
    """Attack a trained run: what is left of a classifier's accuracy, or of a retriever's R@K with images as queries.

    Example:  cmr-fast attack runs/scatter-cifar10-seed0 --attacks clean pgd20 apgd-dlr cw100x5

    Attacks on classifiers:  clean, fgsm, fgsm-random (from a random start), pgdN, cwN, mifgsmN, targetedN, noiseN,
    apgd-ce, apgd-dlr, apgd-t (apgdN-ce, apgdN-dlr, apgdN-t), local-search (in the ball), local-search-pixels (its
    paper's: a few pixels by any amount), square, fab, and transfer-pgdN and transfer-cwN from a --surrogate. N steps
    (of noise, points); xR after a name makes R restarts.

    Example:  cmr-fast attack runs/dcmh-flickr8k-24-seed0 --attacks cmla100 cgat --images 100 --out attacked

    Attacks on hash codes (train dcmh, ssah, cmimh, djsrh):  cmla, cmla-positives, cmla-both, cmla-nointra, cmla-single,
    cmla-turns, cmla-sign, cmla-compat, cgat, dhta.

    Example:  cmr-fast attack runs/clip-flickr8k-seed0 --attacks bert-attack sga pgd20 --mlm runs/mlm --images 100

    Attacks on images and captions (train clip):  bert-attack, bert-attack-l2, bert-attack-similarity, character,
    co-attack, co-attack-image, co-attack-separate, sga, sga-single-scale, dra, sa-aet, and of images alone pgdN, cwN,
    apgdN-ce and apgdN-dlr; those that change words, all the named ones but character, take a masked language model,
    --mlm, which `cmr-fast train mlm` makes.
    """

    trained: Positional[Path]
    """Run folder, or model.safetensors."""
    attacks: tuple[str, ...] = ()
    """Names as above. None: clean, pgd20 and apgd-dlr; of a run on captions pgd20, and character or, with --mlm,
    bert-attack, co-attack and sga. A retriever is attacked by PGD and APGD on the ranking; one that
    makes codes by those on hash codes where they are named, CMLA with the steps after the name or none (500), and by
    the database's codes cgat (100 steps), and dhta (2000), which leads each query to another label."""
    eps: float | None = None
    """Radius of the L-inf ball: of pixels from 0 to 1, or a share of the features' range. None: the run's own, else
    8/255; of CMLA 10/255 for images, and 0.01 for texts, which stay in that proportion; of images with captions
    2/255."""
    images: int = 500
    """Test images to attack, each class its share and always the same; of a retriever the first queries."""
    restarts: int | None = None
    """Random starts of each attack on a retriever. None: 1. Of a classifier's attack they are in its name."""
    surrogate: Path | None = None
    """A run that the transfer attacks are crafted on; the victim itself is refused."""
    save: Path | None = None
    """Of a classifier: an .npz for the images, their labels, and the adversarial images of the last attack, float32
    from 0 to 1. Of a run on captions: a folder for PNG and JPEG files of each attack's images, rounded within the ball,
    and captions.csv; the files are read again by each decoder, and what is left of the attack is a table."""
    out: Path | None = None
    """Of a classifier: a folder that keeps finished attacks, so that the command goes on where it was stopped. Of a
    retriever: a folder for the report, with plots and a verdict."""
    batch: int = BATCH
    """Images a batch. Attacks on codes take their own."""
    seed: int = 0
    """Seed of the random starts, and of the labels that dhta leads to. CMLA has none."""
    mlm: Path | None = None
    """Of a run on captions: a masked language model's folder, which the words come from (`cmr-fast train mlm`)."""
    defence: Literal["ttc"] | None = None
    """Of a run on captions: attack it undefended and under a defence at test time, which the attack knows of, or does
    not. ttc: a counterattack on each image before it is embedded."""
    threshold: float | None = None
    """Of ttc: images whose embedding noise moves by this share or more keep the noise alone. None: 0.2."""
    fast: bool = False
    """Of a classifier or a run on captions: the attack in bfloat16; success is decided in float32."""
    force: bool = False
    """Overwrite the file to save, or an earlier report."""

    def __call__(self) -> None:
        """Run the command."""
        least = {"images": (self.images, 1), "batch": (self.batch, 1), "restarts": (self.restarts, 1)}
        check_least(**least, seed=(self.seed, 0))
        if self.save is not None and self.save.suffix == ".npz":
            if not self.save.parent.is_dir():
                raise InputError(f"{self.save}: expected the name of an .npz in a folder that is there")
            check_output(self.save, self.force, self.trained, self.surrogate, self.data_of(self.trained))
        if self.out is not None:  # whether it holds a report already, is for those that write one
            check_report_folder(self.out, force=True)
        model = load_run(self.trained)
        if not reads_captions(model):
            flags = {"mlm": self.mlm, "defence": self.defence, "threshold": self.threshold}
            refuse_flags(flags, "is for runs on captions")
            if self.save is not None and self.save.suffix != ".npz":
                raise InputError(f"{self.save}: expected the name of an .npz; folders are for runs on captions")
        if is_classifier(model):
            self._classifier(model)
        elif reads_captions(model):
            self._captions(model)
        elif self.attacks and makes_codes(model):
            self._codes(model)
        else:
            self._retriever(model)

    def _classifier(self, model: "Method") -> None:
        from cmr_fast.reports import robustness

        refuse_flags(
            {"restarts": self.restarts},
            f"is for retrievers; of a classifier's attack it is in the name, like pgd20x{self.restarts}",
        )
        attacks = self.attacks or DEFAULT
        robustness.check_names(attacks)
        if not any(name.startswith("transfer-") for name in attacks):
            refuse_flags({"surrogate": self.surrogate}, f"is for transfer attacks; none of {' '.join(attacks)} is one")
        dataset = self.images_of(model, self.trained)
        eps = eps_of(model, self.eps)
        settings = robustness.Settings(eps=eps, images=self.images, batch=self.batch, seed=self.seed, fast=self.fast)
        x, y = robustness.pixels_of(dataset.test, settings.images)
        surrogate = load_surrogate(self.surrogate)
        outcomes = robustness.attack_all(model, x, y, attacks, settings, surrogate=surrogate, keep=self.out)
        title = f"{self.trained}: {len(x)} test images of {dataset.name}, eps {eps * 255:.3g}/255"
        robustness.print_outcomes(title, {"accuracy": outcomes})
        if self.save is not None:
            _save(self.save, attacks[-1], model, x, y, settings, surrogate)

    def _codes(self, model: "Method") -> None:
        """CMLA, CgAT and DHTA: perturbed images and texts as queries, all four tasks."""
        from cmr_fast.methods.hardening import BY_CODES
        from cmr_fast.methods.method import Retriever
        from cmr_fast.reports import hashing

        refuse_flags(
            {
                "save": self.save,
                "restarts": self.restarts,
                "surrogate": self.surrogate,
                "fast": self.fast,
                "batch": None if self.batch == BATCH else self.batch,
            },
            "is for other attacks than those on codes",
        )
        if not any(name.startswith(tuple(BY_CODES)) for name in self.attacks):
            refuse_flags({"seed": self.seed or None}, f"is for attacks that draw: {' and '.join(BY_CODES)}")
        if self.out is not None:
            check_report_folder(self.out, self.force)
        dataset = self.pairs_of(model, self.trained)
        assert isinstance(model, Retriever)
        names = [name for name in self.attacks if name != "clean"]
        result = hashing.examine(model, dataset, names, count=self.images, share=self.eps, seed=self.seed)
        queries = len(result.queries["clean"])
        title = f"{model.name} on {dataset.name}, {queries} queries, {len(dataset.database)} in the database"
        hashing.print_report(result, title)
        if self.out is not None:
            hashing.write_report(result, self.out, title)
            print(f"\nReport: {self.out / 'index.html'}")

    def _captions(self, model: "Method") -> None:
        """Images and all of their captions, both as queries and as the gallery."""
        import torch

        from cmr_fast.attacks.multimodal import registry
        from cmr_fast.attacks.multimodal.ttc import THRESHOLD, Counterattack
        from cmr_fast.methods.method import CaptionRetriever
        from cmr_fast.models.mlm import MaskedLM
        from cmr_fast.reports import attacked_captions, defended_captions

        if self.defence is None:
            refuse_flags({"threshold": self.threshold}, "is for --defence ttc")
        else:
            refuse_flags({"save": self.save}, "is for attacks without a defence")
        refuse_flags(
            {
                "restarts": self.restarts,
                "surrogate": self.surrogate,
                "batch": None if self.batch == BATCH else self.batch,
            },
            "is for other runs than those on captions",
        )
        if self.out is not None:
            check_report_folder(self.out, self.force)
        if self.save is not None:
            check_folder(self.save)
            if self.save.suffix == ".npz":
                raise InputError(f"{self.save}: of a run on captions images are saved as files, expected a folder")
            if self.save.is_dir() and any(self.save.iterdir()) and not self.force:
                raise InputError(f"{self.save}: is not empty, expected a new folder; --force writes into it")
        attacks = self.attacks or (CAPTIONS_DEFAULT if self.mlm is None else CAPTIONS_WORDS)
        registry.check_names(attacks, words=self.mlm is not None)
        mlm = None if self.mlm is None else MaskedLM.load(self.mlm)
        eps = CAPTIONS_EPS if self.eps is None else self.eps
        dataset = self.captions_of(model, self.trained)
        split = dataset.test.select(torch.arange(min(self.images, len(dataset.test))))
        assert isinstance(model, CaptionRetriever)
        dtype = torch.bfloat16 if self.fast else None
        title = f"{self.trained}: {len(split)} test images of {dataset.name}, with captions, eps {eps * 255:.3g}/255"
        if self.defence is not None:
            threshold = THRESHOLD if self.threshold is None else self.threshold
            model_defended = Counterattack(model.dual, threshold=threshold, seed=self.seed)
            defended = defended_captions.defend(
                model_defended, split, attacks, mlm=mlm, eps=eps, seed=self.seed, dtype=dtype
            )
            defended_captions.print_report(defended, title)
            if self.out is not None:
                defended_captions.write_report(defended, self.out, title)
        else:
            result = attacked_captions.examine(
                model.dual, split, attacks, mlm=mlm, eps=eps, seed=self.seed, dtype=dtype, save=self.save
            )
            attacked_captions.print_report(result, title)
            if self.out is not None:
                attacked_captions.write_report(result, self.out, title)
        if self.out is not None:
            print(f"\nReport: {self.out / 'index.html'}")

    def _retriever(self, model: "Method") -> None:
        """Image features are the queries, all texts of the database the gallery."""
        import torch

        from cmr_fast.ops.labels import share_label
        from cmr_fast.reports import recall

        kind = f"{model.name} is" if makes_codes(model) else f"{model.name} makes embeddings, which are"
        refuse_flags(
            {"save": self.save, "attacks": self.attacks, "fast": self.fast},
            f"is for classifiers; {kind} attacked by PGD and APGD on the ranking",
        )
        share = EPS if self.eps is None else self.eps
        if not 0 < share <= 1:
            raise InputError(f"--eps must be above 0 and at most 1, a share of the features' range, got {share}")
        if self.out is not None:
            check_report_folder(self.out, self.force)
        dataset = self.pairs_of(model, self.trained)
        query, database = dataset.query, dataset.database
        rows = torch.arange(min(self.images, len(query)))
        relevant = share_label(query.labels[rows], database.labels)
        mask = relevant.any(dim=1)
        x = query.image[rows].float()[mask]
        low, high = float(query.image.min()), float(query.image.max())
        surrogate = None
        if self.surrogate is not None:
            other = open_run(self.surrogate, self)[0]
            if makes_codes(other) != makes_codes(model):
                kinds = ["codes" if makes_codes(m) else "embeddings" for m in (other, model)]
                raise InputError(f"{self.surrogate}: makes {kinds[0]}, expected {kinds[1]} as the victim does")
            surrogate = recall.queried(other, database.text)
        encoder, gallery = recall.queried(model, database.text)
        result = recall.examine(
            encoder, x, gallery, relevant[mask],
            eps=share * (high - low), bounds=(low, high), restarts=1 if self.restarts is None else self.restarts,
            surrogate=surrogate, codes=makes_codes(model), batch=self.batch, seed=self.seed, check=False,
        )  # fmt: skip
        title = f"{model.name} on {dataset.name}, image features within {share:.3g} of their range"
        recall.print_report(result, f"{title}: {len(x)} queries, {len(database)} texts, clean")
        if self.out is not None:
            recall.write_report({model.name: result}, self.out, title, share * (high - low))
            print(f"\nReport: {self.out / 'index.html'}")


def eps_of(model: "Method", given: float | None) -> float:
    """The radius that is given, else what the classifier was trained with, else 8/255."""
    return given if given is not None else getattr(model.config, "eps", 0.0) or EPS


def load_surrogate(path: Path | None) -> "Method | None":
    """The classifier that transfer attacks are crafted on."""
    if path is None:
        return None
    model = load_run(path)
    if not is_classifier(model):
        raise InputError(f"{path}: a retriever ({model.name}), expected a classifier as the surrogate")
    return model


def _save(
    path: Path, attack: str, model: "Method", x: Any, y: Any, settings: "Settings", surrogate: "Method | None"
) -> None:
    import numpy as np
    import torch

    from cmr_fast.reports import robustness

    atk = robustness.attack_of(attack, model, settings, surrogate=surrogate)
    rows = torch.arange(len(x)).split(settings.batch)
    adversarial = x if atk is None else torch.cat([atk(x[r], y[r], index=r) for r in rows])
    with write_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, images=x.numpy(), labels=y.numpy(), adversarial=adversarial.numpy())
    print(f"{path}: {len(x)} images and what {attack} made of them")
