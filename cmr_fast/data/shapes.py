"""The built-in data set: scenes of one to three coloured shapes on small noisy images, described in five captions.

Everything follows from the seed, nothing is read from disk. A scene's labels are the colours and the shapes in it,
16 in all; two scenes are relevant to each other when they share one. It is made to be learnable and not trivial:
colours vary, shapes turn, shrink and overlap, and a caption may pass over an object or name it by a rarer word.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.data._checks import check_count
from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.images import ImageDataset, Images
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_seed

COLOURS = {
    "red": ((215, 40, 40), ("red", "crimson", "scarlet")),
    "orange": ((240, 140, 30), ("orange", "amber", "tangerine")),
    "yellow": ((235, 220, 50), ("yellow", "golden", "lemon")),
    "green": ((50, 170, 60), ("green", "emerald", "olive")),
    "cyan": ((60, 200, 210), ("cyan", "turquoise", "teal")),
    "blue": ((45, 80, 210), ("blue", "azure", "navy")),
    "purple": ((135, 50, 175), ("purple", "violet", "mauve")),
    "pink": ((240, 130, 190), ("pink", "rosy", "magenta")),
}
"""Name to mean RGB, and the words for it."""

SHAPES = {
    "circle": ("circle", "disc", "dot"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "star": ("star", "starfish", "asterisk"),
    "cross": ("cross", "plus", "crosshair"),
    "ring": ("ring", "hoop", "donut"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "crescent": ("crescent", "moon", "sickle"),
}
"""Name to the words for it."""

CLASSES = (*COLOURS, *SHAPES)
SIDE = 32

_SIZES = (("small", "little", "tiny"), ("large", "big", "huge"))
_PLACES = ("upper left", "upper right", "lower left", "lower right")
_COUNTS = ("one object", "two objects", "three objects")
# by what they tell: everything, or a part. {size} {colour} {shape} {place} are of the object that is described
_LISTING = "{size} {colour} {shape}"
_WHOLE = ("a picture of {all}", "{all} on a dark background", "this image shows {all}")
_PLACED = ("there is a {colour} {shape} in the {place} corner", "look at the {place} part to find a {colour} {shape}")
_COUNTED = ("{count} among them a {colour} {shape}", "a scene with {count} where one is a {size} {shape}")
_VAGUE = ("something {colour} and {size} can be seen", "a {shape} of some colour lies in the {place} area")
_CASUAL = ("i can see a {size} {colour} {shape} here", "just a {colour} {shape} and whatever is around it")


class Scenes(NamedTuple):
    """N scenes of up to three objects, in the corners of the image; entries past `number` mean nothing."""

    number: np.ndarray  # (N,) 1 to 3
    colour: np.ndarray  # (N, 3) into COLOURS
    shape: np.ndarray  # (N, 3) into SHAPES
    size: np.ndarray  # (N, 3) 0 small, 1 large
    place: np.ndarray  # (N, 3) into the four corners


def load(
    *,
    form: str = "features",
    train: int = 2000,
    query: int = 500,
    database: int = 1500,
    seed: int = 0,
    count: int | None = None,
) -> PairedDataset:
    """Draw the three splits, which share no scene; the same arguments and numpy give the same data.

    Parameters
    ----------
    form : {"features", "raw"}
        "raw": image uint8 (N, 3, 32, 32), text N tuples of five captions; "features": `image_features` and
        `bag_of_words` of each scene's first caption. Row i is the same scene in both forms.
    train, query, database : int
        Pairs in each split.
    seed : int
        What everything follows from.
    count : int, optional
        Sets all three sizes at once, as 4:1:3 parts of it.

    Returns
    -------
    PairedDataset
        Labels are multi-hot over `CLASSES`, the eight colours and the eight shapes.

    Raises
    ------
    InputError
        Where a split would be empty, or an option is of another kind.
    """
    if form not in ("features", "raw"):
        raise InputError(f"form must be 'features' or 'raw', got {form!r}")
    as_seed(seed)
    if count is not None:
        check_count("count", count, least=8)
        train, query = count // 2, count // 8
        database = count - train - query
    sizes = {"train": train, "query": query, "database": database}
    for split, size in sizes.items():
        check_count(split, size)
    raw = {}
    for number, (split, size) in enumerate(sizes.items()):
        random = np.random.default_rng([seed, number])
        scenes = draw(size, random)
        images, captions = render(scenes, random), describe(scenes, random)
        raw[split] = Pairs(torch.from_numpy(images), captions, torch.from_numpy(labels(scenes)))
    if form == "features":
        reference = [caption for captions in raw["train"].text for caption in captions]
        for split, pairs in raw.items():
            first = bag_of_words([captions[0] for captions in pairs.text], reference)
            raw[split] = Pairs(image_features(pairs.image), first, pairs.labels)
    return PairedDataset("shapes", raw["train"], raw["query"], raw["database"], class_names=CLASSES)


def load_images(*, train: int = 4000, test: int = 1000, seed: int = 0) -> ImageDataset:
    """One object an image, its class the shape of it, eight in all: raw images for classifiers."""
    as_seed(seed)
    for name, value in (("train", train), ("test", test)):
        check_count(name, value)
    random = [np.random.default_rng([seed, 100 + split]) for split in range(2)]
    return ImageDataset("shapes", _single(train, random[0]), _single(test, random[1]), class_names=tuple(SHAPES))


def load_captions(
    *, train: int = 2000, test: int = 500, size: int = SIDE, seed: int = 0, count: int | None = None
) -> CaptionedDataset:
    """The scenes of `load` with their five captions, `size` pixels a side; `count` sets both splits, as 4:1 parts."""
    if count is not None:
        check_count("count", count, least=5)
        test = count // 5
        train = count - test
    check_count("size", size, least=16)
    raw = load(form="raw", train=train, query=test, database=1, seed=seed)
    parts = []
    for pairs in (raw.train, raw.query):
        image = pairs.image
        if size != SIDE:
            image = F.interpolate(image.float(), (size, size), mode="bicubic").clamp(0, 255).round().byte()
        parts.append(CaptionedImages(image, cast(Any, pairs.text), torch.arange(len(pairs))))
    return CaptionedDataset("shapes", *parts)


def _single(count: int, random: np.random.Generator) -> Images:
    scenes = draw(count, random)._replace(number=np.ones(count, dtype=np.int64))
    shape = torch.from_numpy(scenes.shape[:, 0].astype(np.int64))
    return Images(torch.from_numpy(render(scenes, random)), shape)


def draw(count: int, random: np.random.Generator) -> Scenes:
    """Scenes at random: half of them with one object, three in ten with two, the rest with three."""
    return Scenes(
        number=random.choice([1, 2, 3], size=count, p=[0.5, 0.3, 0.2]),
        colour=random.integers(len(COLOURS), size=(count, 3)),
        shape=random.integers(len(SHAPES), size=(count, 3)),
        size=random.integers(2, size=(count, 3)),
        place=random.random((count, 4)).argsort(axis=1)[:, :3],
    )


def labels(scenes: Scenes) -> np.ndarray:
    """uint8 (N, 16): which colours and shapes are there."""
    mask = np.arange(3) < scenes.number[:, None]
    rows, slots = mask.nonzero()
    result = np.zeros((len(scenes.number), len(CLASSES)), dtype=np.uint8)
    result[rows, scenes.colour[rows, slots]] = 1
    result[rows, len(COLOURS) + scenes.shape[rows, slots]] = 1
    return result


def render(scenes: Scenes, random: np.random.Generator) -> np.ndarray:
    """uint8 (N, 3, 32, 32), antialiased; later objects cover earlier ones."""
    total = len(scenes.number)
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    slope = random.uniform(-1, 1, (2, total, 1, 1)).astype(np.float32)
    shade = random.uniform(20, 110, (total, 1, 1)).astype(np.float32)
    background = shade + slope[0] * (grid[None, :, None] - SIDE / 2) + slope[1] * (grid[None, None, :] - SIDE / 2)
    images = np.repeat(background[:, None], 3, axis=1)
    palette = np.array([rgb for rgb, _ in COLOURS.values()], dtype=np.float32)
    for slot in range(3):
        rows = (scenes.number > slot).nonzero()[0]
        if len(rows) == 0:
            continue
        place, size = scenes.place[rows, slot], scenes.size[rows, slot]
        centre = np.stack([place // 2, place % 2]) * 16.0 + 8 + random.uniform(-3, 3, (2, len(rows)))
        radius = (np.where(size == 1, 7.0, 4.0) + random.uniform(-0.8, 0.8, len(rows))).astype(np.float32)
        angle = random.uniform(-0.35, 0.35, len(rows))
        dy = grid[None, :, None] - centre[0].astype(np.float32)[:, None, None]
        dx = grid[None, None, :] - centre[1].astype(np.float32)[:, None, None]
        cos, sin = (f(angle).astype(np.float32)[:, None, None] / radius[:, None, None] for f in (np.cos, np.sin))
        x, y = dx * cos + dy * sin, dy * cos - dx * sin
        distance = np.empty_like(x)
        for index, name in enumerate(SHAPES):
            same = scenes.shape[rows, slot] == index
            distance[same] = _distance(name, x[same], y[same])
        cover = np.clip(0.5 - distance * radius[:, None, None], 0, 1)[:, None]
        light = random.normal(1, 0.12, (len(rows), 1)) + random.normal(0, 0.08, (len(rows), 3))
        rgb = (palette[scenes.colour[rows, slot]] * light).astype(np.float32)[:, :, None, None]
        images[rows] += cover * (rgb - images[rows])
    images += 12 * random.standard_normal(images.shape, dtype=np.float32)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """About the signed distance to the edge of a shape of radius 1, negative inside; y points down."""
    r = np.hypot(x, y)
    match shape:
        case "circle":
            return r - 0.9
        case "square":
            return np.maximum(abs(x), abs(y)) - 0.8
        case "triangle":
            return np.maximum(abs(x) * 0.87 - y * 0.5, y) - 0.5
        case "star":
            return 0.7 * (r - 0.65 - 0.35 * np.cos(5 * np.arctan2(x, -y)))
        case "cross":
            return np.minimum(np.maximum(abs(x) - 0.3, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - 0.3))
        case "ring":
            return abs(r - 0.75) - 0.22
        case "diamond":
            return (abs(x) * 1.5 + abs(y) - 1) * 0.6
        case "crescent":
            return np.maximum(r - 0.95, 0.8 - np.hypot(x - 0.5, y))
    raise AssertionError(shape)


def describe(scenes: Scenes, random: np.random.Generator) -> tuple[tuple[str, ...], ...]:
    """Five captions a scene, in random order: one tells of every object, the others of one object each."""
    total = len(scenes.number)
    colours, shapes = [words for _, words in COLOURS.values()], list(SHAPES.values())
    kinds = (_PLACED, _COUNTED, _VAGUE, _CASUAL)
    # the common word for a thing half of the time
    word = random.choice(3, size=(total, 5, 3, 3), p=[0.5, 0.25, 0.25]).tolist()
    about = (random.random((total, 4)) * scenes.number[:, None]).astype(int).tolist()
    variant = random.integers(6, size=(total, 5)).tolist()
    order = random.random((total, 5)).argsort(axis=1).tolist()
    number, colour, shape, size, place = (part.tolist() for part in scenes)

    def words(i: int, caption: int, slot: int) -> dict[str, str]:
        a, b, c = word[i][caption][slot]
        return {
            "colour": colours[colour[i][slot]][a],
            "shape": shapes[shape[i][slot]][b],
            "size": _SIZES[size[i][slot]][c],
            "place": _PLACES[place[i][slot]],
            "count": _COUNTS[number[i] - 1],
        }

    captions = []
    for i in range(total):
        every = " and ".join("a " + _LISTING.format(**words(i, 4, slot)) for slot in range(number[i]))
        made = [_WHOLE[variant[i][4] % len(_WHOLE)].format(all=every)]
        for j, kind in enumerate(kinds):
            made.append(kind[variant[i][j] % len(kind)].format(**words(i, j, about[i][j])))
        captions.append(tuple(re.sub(r"\ba (?=[aeo])", "an ", made[j]) for j in order[i]))
    return tuple(captions)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, in alphabetical order."""
    templates = (*_WHOLE, *_PLACED, *_COUNTED, *_VAGUE, *_CASUAL, *_PLACES, *_COUNTS, "a an and")
    result = {word for text in templates for word in tokens(re.sub(r"\{\w+\}", " ", text))}
    for group in (*(words for _, words in COLOURS.values()), *SHAPES.values(), *_SIZES):
        result.update(group)
    return tuple(sorted(result))


def tokens(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def bag_of_words(captions: Sequence[str], reference: Sequence[str]) -> Tensor:
    """float32 (len(captions), len(vocabulary())): tf-idf in rows of unit length; unknown words are passed over.

    reference: the captions that the document frequencies are counted in; of a `load`, all captions of its raw train
    split. idf = log((1 + n) / (1 + df)) + 1, as scikit-learn has it.
    """
    column = {word: i for i, word in enumerate(vocabulary())}
    frequency = np.zeros(len(column))
    for caption in reference:
        frequency[[column[word] for word in set(tokens(caption)) if word in column]] += 1
    result = np.zeros((len(captions), len(column)))
    for row, caption in zip(result, captions, strict=True):
        for word in tokens(caption):
            if word in column:
                row[column[word]] += 1
    result *= np.log((1 + len(reference)) / (1 + frequency)) + 1
    result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
    return torch.from_numpy(result.astype(np.float32))


def image_features(images: Tensor) -> Tensor:
    """float32 (N, 204) of uint8 (N, 3, 32, 32): saturated pixels by 12 hues, the image at 3x4x4, and gradients.

    The gradients are the usual histogram: 4x4 cells, 8 unsigned directions weighted by magnitude, and the mean
    magnitude of each cell; each of the four blocks has unit length.
    """
    # in pieces that stay in cache
    return torch.cat([_image_features(part) for part in images.split(128)])


def _image_features(images: Tensor) -> Tensor:
    pixels = images.numpy().astype(np.float32) / 255
    high, low = pixels.max(axis=1), pixels.min(axis=1)
    chroma = high - low
    red, green, blue = pixels.transpose(1, 0, 2, 3)
    hue = np.arctan2(np.float32(3**0.5) * (green - blue), 2 * red - green - blue)
    hues = _soft_histogram(hue / (2 * np.pi), np.where(chroma > 0.2, chroma, 0), 12)
    whole = hues.sum(axis=(2, 3))
    small = pixels.reshape(-1, 3, 4, 8, 4, 8).mean(axis=(3, 5)).reshape(len(pixels), -1)
    grey = np.pad(high, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down, right = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1], grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    strength = np.hypot(down, right)
    cells = _soft_histogram(np.arctan2(down, right) / np.pi, strength, 8).reshape(len(pixels), -1)
    energy = strength.reshape(-1, 4, 8, 4, 8).mean(axis=(2, 4)).reshape(len(pixels), -1)
    blocks = [whole, small, cells, energy]
    return torch.from_numpy(np.concatenate([_unit(block) for block in blocks], axis=1, dtype=np.float32))


def _soft_histogram(turn: np.ndarray, weight: np.ndarray, bins: int) -> np.ndarray:
    """(N, bins, 4, 4) of (N, 32, 32): `weight` by `turn` (periodic in 1), shared by the two nearest bins, per cell."""
    at = (turn % 1) * bins
    low = np.floor(at).astype(np.int64)
    share = at - low
    cell = np.arange(SIDE) // 8
    base = (np.arange(len(turn))[:, None, None] * bins * 16) + cell[:, None] * 4 + cell
    flat = np.zeros(len(turn) * bins * 16)
    for bin_, part in ((low % bins, weight * (1 - share)), ((low + 1) % bins, weight * share)):
        flat += np.bincount((base + bin_ * 16).ravel(), part.ravel(), minlength=len(flat))
    return flat.reshape(-1, bins, 4, 4)


def _unit(block: np.ndarray) -> np.ndarray:
    return block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-6)
