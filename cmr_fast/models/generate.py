"""Generative models that make augmentations: texts of texts and images by transformers, images of texts by diffusers.

    Rewriter     LangRW (Fan et al. 2024) with the prompt of MAT's appendix A.1.1, any model that continues a text
    Captioner    any image-to-text model, asked what the image describes (OFA's prompt, appendix A.1.1)
    Painter      any text-to-image pipeline of diffusers (appendix A.1.2: Stable Diffusion v2.1)

All draw from torch's global generator, or from one a picture; what they draw depends on the batch that they are given.
"""

import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmr_fast.errors import InputError
from cmr_fast.models.hub import hub_for
from cmr_fast.models.text import transformers_library

CAPTION_PROMPT = "what does the image describe?"
DIFFUSERS = 'pip install "cmr-fast[diffusion]"'
TRIES = 5
"""How often a model is asked again that has given too few texts."""
EXAMPLES, WAYS = 3, 4
"""Images in the prompt, and rewritings that one prompt asks for at most."""
_BETWEEN = re.compile(r"\n|=>")


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn (the paper does not say).

    Attributes
    ----------
    temperature, top_p
        Of nucleus sampling.
    new_tokens
        The most that a text, or the rewritings of one, may take.
    """

    temperature: float = 0.9
    top_p: float = 0.95
    new_tokens: int = 160

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.new_tokens >= 1):
            raise InputError(
                "temperature must be above 0, top_p above 0 and at most 1, new_tokens at least 1; got "
                f"{self.temperature}, {self.top_p} and {self.new_tokens}"
            )

    def arguments(self) -> dict[str, Any]:
        """What `generate` of transformers takes."""
        return {
            "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0,
            "max_new_tokens": self.new_tokens,
        }  # fmt: skip


def rewrite_prompt(caption: str, examples: Sequence[Sequence[str]], count: int = 4) -> str:
    """The prompt of appendix A.1.1, which ends where the first rewriting begins.

    Parameters
    ----------
    caption
        To be rewritten.
    examples
        The captions of some images, 1 + count of each: the first, and what it may be rewritten to.
    count
        How many are asked for.
    """
    shown = ["\n=> ".join([own[0], *own[1 : 1 + count]]) for own in examples]
    return "\n\n".join([f"Rewrite image captions in {count} different ways.", *shown, f"{caption}\n=>"])


def rewritings(continuation: str) -> list[str]:
    """The texts of what a model has put after the prompt, up to the first empty line.

    Parameters
    ----------
    continuation
        Lines, or texts with => between them.
    """
    first = re.split(r"\n\s*\n", continuation.strip())[0]
    return [text for part in _BETWEEN.split(first) if (text := " ".join(part.split()))]


class Rewriter:
    """Texts that a language model makes of captions: `more = Rewriter("FOLDER")(captions, examples)`.

    Parameters
    ----------
    name
        A causal or an encoder-decoder model of transformers: a folder, or a name where the hub can be reached.
    sampling
        How texts are drawn.

    Raises
    ------
    InputError
        Where there is no such model.
    """

    def __init__(self, name: str, sampling: Sampling | None = None) -> None:
        transformers = transformers_library()
        self.sampling = sampling or Sampling()
        config = _loaded("AutoConfig", name)
        self._continues = not config.is_encoder_decoder
        kind = "AutoModelForCausalLM" if self._continues else "AutoModelForSeq2SeqLM"
        self.tokenizer: Any = _loaded("AutoTokenizer", name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left" if self._continues else "right"
        self.model: Any = _loaded(kind, name, dtype=_dtype()).to(_device()).eval()
        self.context: int | None = getattr(config, "max_position_embeddings", None) if self._continues else None
        transformers.utils.logging.set_verbosity_error()

    def __call__(
        self, captions: Sequence[str], examples: Callable[[int, int], Sequence[Sequence[str]]], count: int = 4
    ) -> list[list[str]]:
        """Up to `count` texts for each caption, none of them the caption itself, no two alike.

        Parameters
        ----------
        captions
            N of them.
        examples
            (row, try) -> captions of some images for the prompt.
        count
            Texts for each caption, WAYS a prompt. One that has fewer after TRIES times as many prompts as that takes
            keeps what it has.
        """
        ways = min(count, WAYS)

        def ask(rows: Sequence[int], again: int) -> list[list[str]]:
            prompts = [rewrite_prompt(captions[row], examples(row, again), ways) for row in rows]
            return [rewritings(text) for text in self._continued(prompts)]

        return _enough(captions, ask, count, TRIES * math.ceil(count / ways))

    @torch.no_grad()
    def _continued(self, prompts: Sequence[str]) -> list[str]:
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.model.device)
        inputs.pop("token_type_ids", None)
        length = inputs["input_ids"].shape[1]
        if self.context is not None and length + self.sampling.new_tokens > self.context:
            raise InputError(
                f"the prompt takes {length} tokens and {self.sampling.new_tokens} are to follow (new_tokens); the "
                f"model has a context of {self.context}"
            )
        out = self.model.generate(**inputs, **self.sampling.arguments(), pad_token_id=self.tokenizer.pad_token_id)
        return list(self.tokenizer.batch_decode(out[:, length if self._continues else 0 :], skip_special_tokens=True))


class Captioner:
    """Texts that a model makes of images: `texts = Captioner("FOLDER")(pictures)`.

    Parameters
    ----------
    name
        An image-to-text model of transformers: a folder, or a name where the hub can be reached.
    prompt
        What it is asked; "" for captioners that are asked nothing.
    sampling
        How texts are drawn.

    Raises
    ------
    InputError
        Where there is no such model, or it reads no prompt.
    """

    def __init__(self, name: str, prompt: str = CAPTION_PROMPT, sampling: Sampling | None = None) -> None:
        transformers = transformers_library()
        self.prompt, self.sampling = prompt, sampling or Sampling(new_tokens=40)
        self.model: Any = _loaded("AutoModelForImageTextToText", name, dtype=_dtype()).to(_device()).eval()
        self._reads = self.model.config.model_type != "vision-encoder-decoder"
        if self._reads:
            self.processor: Any = _loaded("AutoProcessor", name)
            self.tokenizer: Any = self.processor.tokenizer
        else:
            self.processor, self.tokenizer = _loaded("AutoImageProcessor", name), _loaded("AutoTokenizer", name)
        if prompt and not self._reads:
            raise InputError(f"{name}: reads no prompt, expected prompt ''; got {prompt!r}")
        self.tokenizer.padding_side = "left"
        transformers.utils.logging.set_verbosity_error()

    def __call__(self, pictures: Sequence[Any], count: int = 4) -> list[list[str]]:
        """Up to `count` texts for each picture, no two alike.

        Parameters
        ----------
        pictures
            N of Pillow's images.
        count
            Texts for each picture. One that has fewer after TRIES times keeps what it has.
        """
        return _enough([""] * len(pictures), lambda rows, _: self._told([pictures[row] for row in rows], count), count)

    @torch.no_grad()
    def _told(self, pictures: Sequence[Any], count: int) -> list[list[str]]:
        every = [picture for picture in pictures for _ in range(count)]
        inputs = self._inputs(every).to(self.model.device, self.model.dtype)
        out = self.model.generate(**inputs, **self.sampling.arguments())
        asked = inputs.get("input_ids")
        if asked is not None and out.shape[1] >= asked.shape[1] and bool((out[:, : asked.shape[1]] == asked).all()):
            out = out[:, asked.shape[1] :]
        texts = [" ".join(text.split()) for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]
        # captioners repeat what they go on from
        texts = [t[len(self.prompt) :].strip() if t.lower().startswith(self.prompt.lower()) else t for t in texts]
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _inputs(self, pictures: Sequence[Any]) -> Any:
        if not self.prompt:
            return self.processor(images=list(pictures), return_tensors="pt")
        prompt = self.prompt
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return self.processor(images=list(pictures), text=[prompt] * len(pictures), return_tensors="pt", padding=True)


def _enough(
    originals: Sequence[str],
    ask: Callable[[Sequence[int], int], Sequence[Sequence[str]]],
    count: int,
    tries: int = TRIES,
) -> list[list[str]]:
    """Ask (rows, try) until each row has `count` different texts, `tries` times at most."""
    found: list[list[str]] = [[] for _ in originals]
    for again in range(tries):
        rows = [row for row, texts in enumerate(found) if len(texts) < count]
        if not rows:
            break
        for row, texts in zip(rows, ask(rows, again), strict=True):
            known = {text.casefold() for text in (originals[row], *found[row])}
            for text in texts:
                if any(map(str.isalnum, text)) and text.casefold() not in known and len(found[row]) < count:
                    known.add(text.casefold())
                    found[row].append(text)
    return found


class Painter:
    """Images that a diffusion model makes of captions: `pictures = Painter("FOLDER")(captions, seeds)`.

    Parameters
    ----------
    name
        A text-to-image pipeline of diffusers: a folder, or a name where the hub can be reached.
    steps, guidance, size
        Of the denoising, of classifier-free guidance, pixels a side. None: the pipeline's own.

    Raises
    ------
    InputError
        Where diffusers is missing, and where there is no such pipeline.
    """

    def __init__(
        self, name: str, *, steps: int | None = None, guidance: float | None = None, size: int | None = None
    ) -> None:
        if importlib.util.find_spec("diffusers") is None:
            raise InputError(f"images are made by diffusers, which is not installed: {DIFFUSERS}")
        import diffusers

        transformers_library()  # without its bars: it loads the pipeline's text encoder
        diffusers.utils.logging.disable_progress_bar()
        half = {"torch_dtype": torch.float16} if torch.cuda.is_available() else {}
        try:
            with hub_for(name):
                self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(name, **half).to(_device())
        except Exception as error:  # OSError, ValueError, AttributeError, and those of its hub
            raise InputError(f"{name}: no pipeline of diffusers can be loaded ({_reason(error)}); {_ADVICE}") from error
        self.pipeline.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
        self._given = {key: value for key, value in given.items() if value is not None}

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        """A picture of Pillow for each caption.

        Parameters
        ----------
        captions, seeds
            N each; a picture's noise depends on its seed alone.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        made = self.pipeline(prompt=list(captions), generator=generators, **self._given)
        if blacked := sum(map(bool, getattr(made, "nsfw_content_detected", None) or ())):
            warnings.warn(f"the pipeline's safety checker made {blacked} of {len(captions)} images black", stacklevel=2)
        return list(made.images)


_ADVICE = (
    "expected a folder, or a name where the hub can be reached: fetch it where there is a network, then name the folder"
)


def _loaded(kind: str, name: str, **options: Any) -> Any:
    try:
        with hub_for(name):
            return getattr(transformers_library(), kind).from_pretrained(name, **options)
    except InputError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, and those of its hub
        what = "in this folder" if Path(name).is_dir() else "of this name"
        raise InputError(f"{name}: transformers finds no {_WHAT[kind]} {what} ({_reason(error)}); {_ADVICE}") from error


_WHAT = {
    "AutoConfig": "model",
    "AutoTokenizer": "tokenizer",
    "AutoProcessor": "processor",
    "AutoImageProcessor": "image processor",
    "AutoModelForCausalLM": "language model",
    "AutoModelForSeq2SeqLM": "text-to-text model",
    "AutoModelForImageTextToText": "image-to-text model",
}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype() -> Any:
    return "auto" if torch.cuda.is_available() else torch.float32


def as_pictures(pixels: torch.Tensor) -> list[Any]:
    """Pillow's images of uint8 (N, 3, H, W).

    Parameters
    ----------
    pixels
        On the CPU.
    """
    from PIL import Image

    return [Image.fromarray(np.ascontiguousarray(row.permute(1, 2, 0).numpy())) for row in pixels]
