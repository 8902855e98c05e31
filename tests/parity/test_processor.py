"""Our encoding against the stock parts of Qwen3-Omni's processor and against ``get_rope_index``.

``Qwen3OmniMoeProcessor`` itself needs torchvision; its parts do not. Tolerance is 0 unless a test says otherwise.
"""

import io
import random

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from stock import sound_in_video, stock_positions
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as stock_image
from transformers.models.qwen3_omni_moe import processing_qwen3_omni_moe as stock_processor

from omni_train.data.audio import log_mel
from omni_train.data.contracts import Sample
from omni_train.data.encode import Encoder
from omni_train.data.image import patchify
from omni_train.data.media_tokens import MediaGeometry, audio_num_frames, audio_num_tokens, smart_resize
from omni_train.data.positions import audio_video_order, tm_rope_positions
from omni_train.data.tokenizer import load_tokenizer, token_ids, train_tokenizer

GEOMETRY = MediaGeometry()
SMALL = MediaGeometry(patch_size=8, min_pixels=1_024, max_pixels=65_536)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user\nassistant\nwhat is this? a cat, a dog\n"] * 8, 350, out)
    return load_tokenizer(out)


def speech_like(num_samples, seed=0):
    """A gliding voice with harmonics, pauses and a little noise: float32 [num_samples]."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 3 * time)) / 16_000
    voice = sum(np.sin(k * phase) / k for k in range(1, 20)) * (np.sin(2 * np.pi * 2 * time) > -0.3)
    return (0.1 * voice + 0.002 * rng.standard_normal(num_samples)).astype(np.float32)


def stock_mel(waves):
    extractor = WhisperFeatureExtractor(feature_size=128)
    kwargs = {"sampling_rate": 16_000, "padding": True, "truncation": False, "return_attention_mask": True}
    out = extractor(waves, return_tensors="np", **kwargs)
    return out["input_features"], out["attention_mask"].sum(-1)


@pytest.mark.parametrize("num_samples", [201, 319, 320, 321, 1_599, 8_000, 15_999, 16_000, 16_161, 40_077, 480_000])
def test_mel_and_its_length(num_samples):
    wave = speech_like(num_samples, seed=num_samples)
    features, lengths = stock_mel(wave)
    assert lengths.tolist() == [audio_num_frames(num_samples)]
    np.testing.assert_array_equal(log_mel(wave), features[0])


def test_stock_frames_of_a_padded_clip_depend_on_its_neighbours():
    """Why there is no parity with a stock *batch*: beside a longer clip a started frame counts, alone it does not."""
    short, long = speech_like(8_001), speech_like(16_000)
    assert stock_mel([short, long])[1].tolist() == [51, 100]
    assert stock_mel(short)[1].tolist() == [50] == [audio_num_frames(8_001)]


def test_audio_tokens_for_every_length_up_to_a_minute():
    frames = torch.arange(6_001)
    expected = stock_processor._get_feat_extract_output_lengths(frames).tolist()
    assert [audio_num_tokens(n) for n in range(6_001)] == expected


@pytest.mark.parametrize("geometry", [GEOMETRY, SMALL, MediaGeometry(max_pixels=1_310_720)])
def test_resize_of_random_sizes(geometry):
    rng = random.Random(0)
    for _ in range(3_000):
        height, width = int(10 ** rng.uniform(0, 3.7)), int(10 ** rng.uniform(0, 3.7))
        if max(height, width) <= 200 * min(height, width):
            limits = {"min_pixels": geometry.min_pixels, "max_pixels": geometry.max_pixels}
            expected = stock_image.smart_resize(height, width, geometry.factor, **limits)
            assert smart_resize(height, width, geometry) == expected


def stock_patches(pictures, geometry):
    processor = stock_image.Qwen2VLImageProcessorPil(
        patch_size=geometry.patch_size,
        merge_size=geometry.merge_size,
        temporal_patch_size=geometry.temporal_patch_size,
        min_pixels=geometry.min_pixels,
        max_pixels=geometry.max_pixels,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    out = processor(pictures, return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"]


@pytest.mark.parametrize("size", [(64, 64), (480, 640), (1, 1), (1, 180), (33, 700), (721, 97), (500, 333)])
@pytest.mark.parametrize("geometry", [GEOMETRY, SMALL])
def test_patches(size, geometry):
    rng = np.random.default_rng(size[1])
    noise = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    picture = np.asarray(noise.resize(size[::-1], Image.Resampling.BICUBIC))
    patches, grid = patchify(picture, geometry)
    expected, grids = stock_patches(Image.fromarray(picture), geometry)
    assert grids.tolist() == [list(grid)]
    np.testing.assert_array_equal(patches, expected)


def random_document(ids, rng, kinds):
    """(input ids, media) of text with media of ``kinds`` in random order and size."""
    tokens, media = [], {"frames": [], "images": [], "videos": [], "seconds": []}
    for _ in range(rng.randrange(1, 6)):
        tokens += [1] * rng.randrange(4)
        kind = rng.choice(kinds)
        grid = (rng.randrange(1, 5), 2 * rng.randrange(1, 6), 2 * rng.randrange(1, 6))
        # NOTE: whole seconds where there is sound: upstream's order of ties hangs on the rounding error of k / 13
        seconds = float(rng.randrange(1, 4)) if kind == "video_audio" else rng.randrange(1, 30) / 13
        num_frames = rng.randrange(1, 700)
        num_audio = audio_num_tokens(num_frames)
        if kind == "audio":
            tokens += [ids.audio_start, *[ids.audio_pad] * num_audio, ids.audio_end]
        elif kind == "image":
            grid = (1, *grid[1:])
            tokens += [ids.vision_start, *[ids.image_pad] * (grid[1] * grid[2] // 4), ids.vision_end]
        elif kind == "video":
            tokens += [ids.vision_start, *[ids.video_pad] * (grid[0] * grid[1] * grid[2] // 4), ids.vision_end]
        elif kind == "video_audio":
            tokens += [ids.vision_start, *sound_in_video(ids, grid, seconds, num_audio), ids.vision_end]
        if kind in ("audio", "video_audio"):
            media["frames"].append(num_frames)
        if kind == "image":
            media["images"].append(grid)
        if kind in ("video", "video_audio"):
            media["videos"].append(grid)
            media["seconds"].append(seconds)
    return np.array(tokens + [1] * rng.randrange(1, 4)), media


@pytest.mark.parametrize(
    "kinds",
    [
        ("text",),
        ("audio",),
        ("image",),
        ("image", "audio"),
        ("video",),
        ("text", "video", "image", "audio"),
        ("video_audio",),
        ("text", "video_audio", "image", "audio"),
    ],
    ids="+".join,
)
def test_positions_of_random_documents(kinds, tokenizer):
    ids = token_ids(tokenizer)
    rng = random.Random(str(kinds))
    for _ in range(60):
        input_ids, media = random_document(ids, rng, kinds)
        has_sound = "video_audio" in kinds
        positions = tm_rope_positions(
            input_ids,
            ids,
            [audio_num_tokens(n) for n in media["frames"]],
            media["images"],
            media["videos"],
            media["seconds"],
            [has_sound] * len(media["videos"]),
            GEOMETRY,
        )
        assert positions.dtype == np.int64
        # upstream multiplies in float32, so a whole number can come out 1e-6 beside itself
        expected = stock_positions(input_ids, ids, **media, with_sound=has_sound)
        np.testing.assert_allclose(positions, expected, rtol=0, atol=1e-3)


def test_order_of_sound_and_video_is_that_of_the_stock_processor(tokenizer):
    ids = token_ids(tokenizer)
    for seconds, num_audio in ((1.0, 40), (1.0, 5), (2.0, 27), (3.0, 1)):
        stock = sound_in_video(ids, (3, 4, 6), seconds, num_audio)
        times = np.repeat(np.arange(3) * int(13 * seconds), 6)
        ours = np.where(audio_video_order(times, num_audio) < 18, ids.video_pad, ids.audio_pad)
        assert ours.tolist() == stock[1:-1]


def test_fractional_times_are_rounded_down(tokenizer):
    """0.08 s a pair is 1.04 ids: upstream keeps the fraction, we do not, and so sample video at multiples of 1/13 s."""
    ids = token_ids(tokenizer)
    tokens = np.array([ids.vision_start, ids.video_pad, ids.video_pad, ids.video_pad, ids.vision_end])
    stock = stock_positions(tokens, ids, videos=[(3, 2, 2)], seconds=[0.08])
    ours = tm_rope_positions(tokens, ids, (), (), [(3, 2, 2)], [0.08], [False], GEOMETRY)
    np.testing.assert_allclose(stock[0], [0, 1, 2.04, 3.08, 4.08], atol=1e-5)
    assert ours[0].tolist() == [0, 1, 2, 3, 4]


def test_whole_document(tokenizer):
    """Ids, mel, patches and positions of a conversation with two clips and two pictures, from files to features."""
    waves = [speech_like(9_999), speech_like(24_321)]
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((70, 40), (100, 220))]
    members = {}
    for name, wave in zip("ab", waves, strict=True):
        out = io.BytesIO()
        soundfile.write(out, wave, 16_000, format="WAV", subtype="FLOAT")
        members[name] = out.getvalue()
    for name, picture in zip("ij", pictures, strict=True):
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG")
        members[name] = out.getvalue()
    kinds = {"a": "audio", "b": "audio", "i": "image", "j": "image"}
    parts = [{"type": kinds[name], kinds[name]: name} for name in "aijb"]
    messages = [
        {"role": "user", "content": [*parts[:2], {"type": "text", "text": "\nwhat is this? "}, *parts[2:]]},
        {"role": "assistant", "content": "a cat\n"},
    ]
    document = Encoder(tokenizer, SMALL).encode(Sample("s", "t", "k", {"messages": messages}, members))

    text = tokenizer.apply_chat_template(messages, tokenize=False)
    expanded, frames = text, [stock_mel(wave)[1].item() for wave in waves]
    patches, grids = stock_patches([Image.fromarray(picture) for picture in pictures], SMALL)
    for count in stock_processor._get_feat_extract_output_lengths(torch.tensor(frames)).tolist():
        expanded = expanded.replace("<|audio_pad|>", "<audio>" * count, 1)
    for grid in grids:
        expanded = expanded.replace("<|image_pad|>", "<image>" * int(grid.prod() // 4), 1)
    expanded = expanded.replace("<audio>", "<|audio_pad|>").replace("<image>", "<|image_pad|>")
    input_ids = tokenizer(expanded)["input_ids"]

    assert document.input_ids.tolist() == input_ids
    for mel, wave in zip(document.mels, waves, strict=True):
        np.testing.assert_array_equal(mel, stock_mel(wave)[0][0])
    np.testing.assert_array_equal(np.concatenate(document.image_patches), patches)
    expected = stock_positions(input_ids, token_ids(tokenizer), frames, grids.tolist())
    np.testing.assert_array_equal(document.position_ids, expected)
