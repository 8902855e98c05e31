import io

import numpy as np
import pytest
from PIL import Image

from omni_train.data.image import decode_image, image_facts, patchify
from omni_train.data.media_tokens import MediaGeometry, image_grid

RNG = np.random.default_rng(0)


def file_of(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def random_rgb(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_rgb_png_comes_back_exactly():
    pixels = random_rgb(5, 7)
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(pixels))), pixels)


def test_transparency_lies_on_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0] = 255  # red: opaque, half, invisible
    pixels[0, :, 3] = (255, 128, 0)
    decoded = decode_image(file_of(Image.fromarray(pixels)))
    np.testing.assert_array_equal(decoded[0], [(255, 0, 0), (255, 127, 127), (255, 255, 255)])


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode_image(file_of(image))[0], [(10, 20, 30), (40, 50, 60)])
    np.testing.assert_array_equal(decode_image(file_of(image, transparency=1))[0], [(10, 20, 30), (255, 255, 255)])


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.array([[0, 256, 32_768, 65_535]], dtype=np.uint16)
    decoded = decode_image(file_of(Image.fromarray(grey)))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 1, 128, 255])
    assert decoded.shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")]
)
def test_every_mode_becomes_rgb(mode, kind):
    decoded = decode_image(file_of(Image.new("RGB", (6, 4), "white").convert(mode), kind))
    assert decoded.shape == (4, 6, 3) and decoded.dtype == np.uint8
    assert decoded.min() >= 250


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_turns_the_picture_and_its_facts_alike(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (48, 32), "black")
    image.paste("white", (0, 0, 16, 16))  # the corner that EXIF moves
    data = file_of(image, kind, exif=exif)
    decoded, facts = decode_image(data), image_facts("i", data)
    assert decoded.shape[:2] == (facts.height, facts.width) == ((32, 48) if orientation < 5 else (48, 32))
    bright = decoded[..., 0] > 128
    corner = (int(bright[-1].any()), int(bright[:, -1].any()))  # (at the bottom, on the right)
    expected = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    assert corner == expected[orientation]


def test_patches_by_hand():
    # 4 patches of 1 pixel each make one token: order (0,0) (0,1) (1,0) (1,1); in a row: channel, then time twice
    geometry = MediaGeometry(patch_size=1, merge_size=2, min_pixels=4, max_pixels=64)
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    patches, grid = patchify(pixels, geometry)
    assert grid == (1, 2, 4) and patches.shape == (8, 6)
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    for row, (y, x) in zip(patches, order, strict=True):
        np.testing.assert_allclose(row, np.repeat(pixels[y, x], 2) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (31, 97), (100, 100), (333, 64)])
def test_facts_foretell_the_grid(size):
    geometry = MediaGeometry(patch_size=8, min_pixels=1_024, max_pixels=65_536)
    data = file_of(Image.fromarray(random_rgb(*size)))
    facts = image_facts("i", data)
    patches, grid = patchify(decode_image(data), geometry)
    assert grid == image_grid(facts.width, facts.height, geometry)
    assert patches.shape == (grid[1] * grid[2], geometry.patch_dim) and patches.dtype == np.float32


def test_what_is_no_picture_is_refused():
    whole = file_of(Image.fromarray(random_rgb(64, 64)))
    for data, message in [(b"", "is empty"), (b"nothing", "cannot read picture of 7 bytes")]:
        with pytest.raises(ValueError, match=message):
            image_facts("i", data)
    with pytest.raises(ValueError, match="cannot decode picture"):
        decode_image(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="too long"):
        image_facts("i", file_of(Image.new("RGB", (401, 2))))
    with pytest.raises(ValueError, match="floating-point"):
        decode_image(file_of(Image.new("F", (4, 4)), "TIFF"))
