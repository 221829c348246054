"""`cmr-fast augment`: files of captions and images for MA2T, by generative models or without one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmr_fast.cli.common import (
    DataFlags,
    check_folder,
    check_least,
    check_output,
    check_report_folder,
    load_captioned_images,
    named_files,
    refuse_flags,
)
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.data.captions import CaptionedImages


@dataclass(frozen=True, kw_only=True)
class Making(DataFlags):
    """What both kinds of files share."""

    data: str | None = None
    """Images with captions: `shapes`, a folder or file, or a name under $CMR_FAST_DATA. Those of the training split are
    augmented, captions by their first one."""
    images: int | None = None
    """The first so many images. None: all."""
    count: int = 4
    """Texts or pictures for each."""
    batch: int = 8
    """Images that are worked on at a time. A batch has a seed of its own, so another size makes other texts."""
    seed: int = 0
    """Of all draws."""
    force: bool = False
    """Begin anew where a file was begun or made already."""

    def split(self) -> "CaptionedImages":
        """The images to augment."""
        import torch

        if self.data is None:
            raise InputError("expected --data, images with captions")
        refuse_flags({"features": self.features}, "is for pairs; these are images with captions")
        check_least(images=(self.images, 1), count=(self.count, 1), batch=(self.batch, 1), seed=(self.seed, 0))
        train = load_captioned_images(self.data, self.loader_options()).train
        return train if self.images is None else train.select(torch.arange(min(self.images, len(train))))

    def described(self, split: "CaptionedImages", **more: Any) -> dict[str, Any]:
        """The settings that a file is begun with."""
        return {"data": self.data, "crc32": split.fingerprint(), "count": self.count, "seed": self.seed, **more}


@dataclass(frozen=True, kw_only=True)
class Captions(Making):
    """Make captions: {"123.jpg": ["a caption", ...], ...}, for --augment-text of `cmr-fast train mat`.

    A run that was stopped goes on with the same command, without --force.

    Example:  cmr-fast augment captions --data flickr8k --kind rewrite --model FOLDER --out texts.json
    """

    kind: Literal["rewrite", "caption", "eda", "mlm"] = "rewrite"
    """`rewrite`: a language model rewrites the caption (LangRW); `caption`: an image-to-text model tells what it sees;
    `eda`: words replaced, inserted, swapped, deleted; `mlm`: words replaced by what a masked language model puts
    there."""
    model: str | None = None
    """A model of transformers, a folder or a name; of `mlm` the folder of one that `cmr-fast train mlm` made."""
    out: Path
    """The JSON file that is written."""
    examples: str | None = None
    """Of `rewrite`: a file of images with captions, a folder with one or a name, whose captions the prompt shows (the
    paper: COCO's), three images with five each; photos need not be there. None: other images of the
    training split."""
    prompt: str | None = None
    """Of `caption`: what the model is asked; "" for captioners that are asked nothing. None: the paper's, "what does
    the image describe?"."""
    temperature: float = 0.9
    """Of the sampling, of `rewrite` and `caption`."""
    top_p: float = 0.95
    """Of the sampling."""
    new_tokens: int | None = None
    """The most tokens that a caption, or the rewritings of one, may take. None: 40 and 160."""
    wordnet: Path | None = None
    """Of `eda`: WordNet's dict folder. None: it swaps and deletes words alone."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.data.augmented import make_texts, partial_of
        from cmr_fast.methods.candidates import names_of

        self._refuse_idle_flags()
        partial = partial_of(self.out)
        check_output(self.out, self.force or partial.exists(), self.data)  # a file begun with --force goes on
        split = self.split()
        settings = self.described(split, kind=self.kind, model=self.model, **self._settings())
        make = getattr(self, f"_{self.kind}")(split)
        try:
            made = make_texts(
                self.out, names_of(split), make, settings=settings, batch=self.batch, force=self.force
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_go_on(self.force and partial.exists())) from None
        few = [name for name, texts in made.items() if len(texts) < self.count]
        if few:
            print(f"{len(few)} of {len(made)} images have fewer than {self.count} texts, {few[0]} first")
        print(f"{self.out}: texts of {len(made)} images; train with --augment-text {self.out}")

    def _refuse_idle_flags(self) -> None:
        asked = {"rewrite": ("examples",), "caption": ("prompt",), "eda": ("wordnet",), "mlm": ()}
        for kind, names in asked.items():
            if kind != self.kind:
                refuse_flags({name: getattr(self, name) for name in names}, f"is for --kind {kind}")
        if self.kind in ("eda", "mlm"):
            own = {name: getattr(self, name) for name in ("temperature", "top_p", "new_tokens")}
            own = {name: value for name, value in own.items() if value != getattr(Captions, name)}
            refuse_flags(own, "is for --kind rewrite and caption")
        if self.kind == "eda":
            refuse_flags({"model": self.model}, "is for the other kinds")
        elif not self.model:
            raise InputError(f"--kind {self.kind} needs --model, a folder of transformers or a name")

    def _settings(self) -> dict[str, Any]:
        """What else texts depend on, by kind."""
        if self.kind == "eda":
            return {"wordnet": None if self.wordnet is None else str(self.wordnet)}
        if self.kind == "mlm":
            return {}
        more = {"examples": self.examples} if self.kind == "rewrite" else {"prompt": self.prompt}
        return more | {"temperature": self.temperature, "top_p": self.top_p, "new_tokens": self.new_tokens}

    def _sampling(self, tokens: int) -> Any:
        from cmr_fast.models.generate import Sampling

        return Sampling(self.temperature, self.top_p, tokens if self.new_tokens is None else self.new_tokens)

    def _eda(self, split: "CaptionedImages") -> Callable[[range], Sequence[Sequence[str]]]:
        from cmr_fast.data import EDA, WordNet
        from cmr_fast.methods.ma2t import ALPHA

        synonyms = None if self.wordnet is None else WordNet(self.wordnet)
        return _words(EDA(ALPHA, self.count, synonyms=synonyms, seed=self.seed), split)

    def _mlm(self, split: "CaptionedImages") -> Callable[[range], Sequence[Sequence[str]]]:
        from cmr_fast.data import EDA, MaskedSynonyms
        from cmr_fast.methods.ma2t import ALPHA
        from cmr_fast.models.mlm import MaskedLM

        synonyms = MaskedSynonyms(MaskedLM.load(str(self.model)))
        return _words(EDA(ALPHA, self.count, synonyms=synonyms, operations=("replace",), seed=self.seed), split)

    def _rewrite(self, split: "CaptionedImages") -> Callable[[range], Sequence[Sequence[str]]]:
        import numpy as np

        from cmr_fast.data.texts import load_caption_groups
        from cmr_fast.models.generate import EXAMPLES, WAYS, Rewriter, rewrite_prompt

        shown = split.text if self.examples is None else load_caption_groups(self.examples)
        ways = min(self.count, WAYS)
        rich = [row for row, own in enumerate(shown) if len(own) > ways]
        if len(rich) < EXAMPLES + (self.examples is None):
            raise InputError(
                f"the prompt shows {EXAMPLES} other images with {1 + ways} captions each, {len(rich)} have as "
                "many; expected --examples DATA, or a smaller --count"
            )
        own = {row: place for place, row in enumerate(rich)} if self.examples is None else {}

        def examples(row: int, again: int) -> list[tuple[str, ...]]:
            """The captions of three images, none of them the row's own."""
            random = np.random.default_rng([self.seed, int(split.labels[row]), again])
            places = [i for i in random.permutation(len(rich))[: EXAMPLES + 1].tolist() if i != own.get(row)]
            return [shown[rich[i]] for i in places[:EXAMPLES]]

        model = Rewriter(str(self.model), self._sampling(160))
        print(f"The prompt, of the first image:\n\n{rewrite_prompt(split.text[0][0], examples(0, 0), ways)}\n")

        def make(rows: range) -> list[list[str]]:
            captions = [split.text[row][0] for row in rows]
            with _drawing(self.seed, rows.start):
                return model(captions, lambda place, again: examples(rows[place], again), self.count)

        return make

    def _caption(self, split: "CaptionedImages") -> Callable[[range], Sequence[Sequence[str]]]:
        import torch

        from cmr_fast.data.photos import Photos
        from cmr_fast.models.generate import CAPTION_PROMPT, Captioner, as_pictures

        prompt = CAPTION_PROMPT if self.prompt is None else self.prompt
        model = Captioner(str(self.model), prompt, self._sampling(40))
        print(f"The prompt: {prompt or 'none'}\n")

        def make(rows: range) -> list[list[str]]:
            image = split.image[torch.tensor(rows)]
            with _drawing(self.seed, rows.start):
                return model(as_pictures(image.pixels() if isinstance(image, Photos) else image), self.count)

        return make


def _go_on(forced: bool) -> str:
    return "go on with the same command" + (", without --force" if forced else "")


def _words(eda: Any, split: "CaptionedImages") -> Callable[[range], Sequence[Sequence[str]]]:
    labels = split.labels.tolist()
    return lambda rows: eda([split.text[row][0] for row in rows], index=[labels[row] for row in rows])


def _drawing(seed: int, start: int) -> Any:
    """torch's random numbers of a batch, and as they were after."""
    from contextlib import contextmanager

    import numpy as np
    import torch

    @contextmanager
    def drawing() -> Any:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(np.random.default_rng([seed, start]).integers(2**63)))
            yield

    return drawing()


@dataclass(frozen=True, kw_only=True)
class Images(Making):
    """Make images of captions, for --augment-image of `cmr-fast train mat`: 123_0.png, ... of 123.jpg.

    A run that was stopped goes on with the same command, without --force. Needs diffusers:
    pip install "cmr-fast[diffusion]".

    Example:  cmr-fast augment images --data flickr8k --model FOLDER --out images
    """

    model: str
    """A text-to-image pipeline of diffusers, a folder or a name (the paper: Stable Diffusion v2.1-base)."""
    out: Path
    """The folder that is written; images.json in it, at the end, says which file is of which image."""
    steps: int | None = None
    """Of the denoising. None: the pipeline's own number."""
    guidance: float | None = None
    """Of classifier-free guidance. None: the pipeline's own."""
    size: int | None = None
    """Pixels a side. None: the pipeline's own."""

    def __call__(self) -> None:
        """Run the command."""
        import numpy as np

        from cmr_fast.data.augmented import IMAGES, make_images
        from cmr_fast.methods.candidates import names_of
        from cmr_fast.models.generate import Painter

        check_least(steps=(self.steps, 1), size=(self.size, 8))
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out}: is a file, expected a folder to write")
        if (self.out / IMAGES).exists() and not self.force:
            raise InputError(f"{self.out}: its images are made already; --force makes them anew")
        check_folder(self.out)
        split = self.split()
        model = Painter(self.model, steps=self.steps, guidance=self.guidance, size=self.size)

        def make(rows: range) -> list[list[Any]]:
            captions = [split.text[row][0] for row in rows for _ in range(self.count)]
            seeds = [
                int(np.random.default_rng([self.seed, int(split.labels[row]), number]).integers(2**63))
                for row in rows for number in range(self.count)
            ]  # fmt: skip
            made = model(captions, seeds)
            return [made[start : start + self.count] for start in range(0, len(made), self.count)]

        settings = self.described(split, model=self.model, steps=self.steps, guidance=self.guidance, size=self.size)
        try:
            stored = make_images(
                self.out, names_of(split), make, count=self.count, settings=settings, batch=self.batch,
                force=self.force,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_go_on(self.force)) from None
        print(f"{self.out}: {self.count} images for each of {len(stored)}; train with --augment-image {self.out}")


@dataclass(frozen=True, kw_only=True)
class Measure(DataFlags):
    """Measure alignment and diversity of augmentations in a reference model: MAT's Figures 1 and 2, without training.

    EDA, Human, RandAug, and what files hold. The figures, their numbers and what they say are written.

    Example:  cmr-fast augment measure --data flickr8k --reference runs/clip --out augmentations
    """

    data: str | None = None
    """Images with captions: `shapes`, a folder or file, or a name under $CMR_FAST_DATA. None: those of the
    reference."""
    split: Literal["train", "test"] = "train"
    """Of which split: files have the training images, those of the test split are new to the reference."""
    reference: str
    """A run on captions (`cmr-fast train clip`), or a pretrained model such as open_clip/ViT-B-16-quickgelu@openai."""
    images: int = 200
    """The first so many images."""
    augment_text: tuple[str, ...] = ()
    """NAME=FILE of captions that `cmr-fast augment captions` made, such as LangRW=langrw.json."""
    augment_image: tuple[str, ...] = ()
    """NAME=FOLDER (or images.json) of what `cmr-fast augment images` made, such as SD=images."""
    wordnet: str = ""
    """WordNet's dict folder, for EDA. None: it swaps and deletes words alone."""
    out: Path
    """The folder that is written."""
    force: bool = False
    """Write over a report that is there."""

    def __call__(self) -> None:
        """Run the command."""
        import torch

        from cmr_fast._terminal import show, table_of_numbers
        from cmr_fast.methods._runfolder import write_json
        from cmr_fast.methods.candidates import reference_model
        from cmr_fast.reports import mat_figures
        from cmr_fast.reports.page import write_page

        check_report_folder(self.out, self.force)
        check_least(images=(self.images, 2))
        refuse_flags({"features": self.features}, "is for pairs; these are images with captions")
        files = (named_files(f"augment-{s}", getattr(self, f"augment_{s}")) for s in ("text", "image"))
        texts, images = mat_figures.check_names(*files)
        reference = reference_model(self.reference)
        dataset = load_captioned_images(*self.source(Path(self.reference)))
        split = getattr(dataset, self.split)
        split = split.select(torch.arange(min(self.images, len(split))))
        found = mat_figures.measure(reference, split, texts=texts, images=images, wordnet=self.wordnet)
        self.out.mkdir(parents=True, exist_ok=True)
        told, pages = mat_figures.write_densities(found, self.out)
        words, table = mat_figures.words_of(found), mat_figures.table_of(found)
        title = f"Augmentations of {len(split)} images of {dataset.name}, {self.split} split"
        about = {"data": dataset.name, "split": self.split, "images": len(split), "reference": self.reference}
        write_json(self.out / "figures.json", {**about, "densities": told, "words": words})
        note = "Alignment: the cosine of image and text; diversity: the distance from the original's embedding, L2."
        write_page(self.out, title, mat_figures.HEAD, table, note, pages, words=words, table="densities.csv")
        show(title, table_of_numbers(mat_figures.HEAD, table))
        for line in words:
            print(line)
        print(f"\nReport: {self.out / 'index.html'}")


KINDS: dict[str, Any] = {"captions": Captions, "images": Images, "measure": Measure}
