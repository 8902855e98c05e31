"""Pictures: bytes → RGB → patches, equal to what stock Qwen3-Omni is fed (``Qwen2VLImageProcessorPil``, mean and std
0.5)."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from omni_train.data.contracts import MediaFacts
from omni_train.data.media_tokens import MediaGeometry, check_aspect_ratio, smart_resize

Image.init()  # NOTE: Pillow knows a format by name only after its plug-in was loaded.
# What it may open, whatever a member is called. Not EPS, which it would hand to Ghostscript, nor other vector formats.
_FORMATS: list[str] = [
    f for f in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM") if f in Image.OPEN
]
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on damaged files besides ValueError; RuntimeError comes from its AVIF decoder.
_DAMAGE = (
    OSError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Every byte value after rescale (in float64, as upstream does) and normalisation with mean 0.5 and std 0.5.
_NORMALISED = ((np.arange(256, dtype=np.float64) / 255).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def image_facts(member: str, data: bytes) -> MediaFacts:
    """Width and height in pixels as ``decode_image`` will return them, from the header (a PNG without EXIF before its
    pixels is read whole: it may stand behind them). Raises ValueError for what cannot be read."""
    with _open(data) as image:
        width, height = image.size
        if _orientation(image) in _SIDEWAYS:
            width, height = height, width
    check_aspect_ratio(height, width)
    return MediaFacts(member=member, kind="image", width=width, height=height)


def decode_image(data: bytes) -> np.ndarray:
    """The picture as uint8 RGB [h, w, 3]: turned as EXIF says, transparency over white, 16 bits cut to 8, first frame
    only.

    Raises ValueError for what cannot be read.
    """
    with _open(data) as image:
        try:
            image.load()
            turn = _TURNS.get(_orientation(image))
            return np.asarray(_to_rgb(image if turn is None else image.transpose(turn)))
        except _DAMAGE as error:
            raise ValueError(f"cannot decode picture of {len(data):,} bytes: {error}") from error


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("picture is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"picture is too large: {error}; store it smaller") from error
    except _DAMAGE as error:
        raise ValueError(f"cannot read picture of {len(data):,} bytes: {error}; use jpg, png or webp") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8), 1 (upright) where there is none."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DAMAGE as error:
        raise ValueError(f"cannot read picture: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        # NOTE: Pillow's own convert("RGB") clips 16-bit grey at 255, which turns most of the picture white.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65_535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("picture has floating-point pixels of unknown range; store it as 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def patchify(image: np.ndarray, geometry: MediaGeometry) -> tuple[np.ndarray, tuple[int, int, int]]:
    """(patches float32 [h*w, 3*temporal*patch*patch], grid (1, h, w)) of an RGB picture uint8 [height, width, 3].

    Bicubic resize to ``smart_resize``; the layout is that of ``patches_of`` with the same picture twice.
    """
    height, width = smart_resize(image.shape[0], image.shape[1], geometry)
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    pair = np.broadcast_to(image, (geometry.temporal_patch_size, *image.shape))
    grid = (1, height // geometry.patch_size, width // geometry.patch_size)
    return patches_of(pair, grid, geometry), grid


def patches_of(frames: np.ndarray, grid: tuple[int, int, int], geometry: MediaGeometry) -> np.ndarray:
    """Patches float32 [t*h*w, patch_dim], −1 … 1, of frames uint8 [t * temporal, h * patch, w * patch, 3].

    Rows run over time, then 2×2 blocks of patches (the ones that become one token), row-major; within a row: channel,
    time, y, x.
    """
    t, h, w = grid
    size, merge, times = geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size
    blocks = frames.reshape(t, times, h // merge, merge, size, w // merge, merge, size, 3)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, geometry.patch_dim)
    return _NORMALISED[blocks]
