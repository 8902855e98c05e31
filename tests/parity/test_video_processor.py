"""Videos: our encoding against stock's whole Qwen3OmniMoeProcessor, built from the files that an export writes.

Stock's video processor needs torchvision; ``torchvision_for_tests`` says how to get it. Tolerance 1e-4. Where stock
contradicts itself, or does otherwise than we on purpose, a test of its own states what differs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from clips import grey, noise, steady_video
from stock import MICRO, encoder_of, processor_inputs, sample, sound_in_video, stock_positions
from support import tokenizer_folder
from torchvision_for_tests import import_torchvision

from omni_train.data.contracts import Document
from omni_train.data.image import patches_of
from omni_train.data.media_tokens import MediaGeometry, audio_num_tokens, video_grid
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.video import decode_video, resized, size_px
from omni_train.engine.export import write_processor

TOLERANCE = 1e-4
needs_torchvision = pytest.mark.skipif(bool(import_torchvision()), reason=import_torchvision())
KINDS = ("video", "video_and_picture", "video_audio", "two_videos", "one_frame", "long_video", "all")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """What an export writes beside the weights."""
    folder = tmp_path_factory.mktemp("export")
    load_tokenizer(tokenizer_folder()).save_pretrained(folder)
    write_processor(MICRO, folder)
    return folder


@needs_torchvision
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_features(kind, export, tmp_path):
    """Ids, order of sound and picture, grids, patches, mel: from the same files."""
    document = encoder_of().encode(sample(kind, tmp_path))
    stock = processor_inputs(kind, tmp_path, export, document)
    assert document.input_ids.tolist() == stock["input_ids"][0].tolist()
    assert stock["video_grid_thw"].tolist() == [list(grid) for grid in document.video_grids]
    np.testing.assert_allclose(document.video_seconds_per_grid, stock["video_second_per_grid"], rtol=1e-6)
    patches = np.concatenate(document.video_patches)
    np.testing.assert_allclose(patches, stock["pixel_values_videos"], rtol=0, atol=TOLERANCE)
    if document.image_patches:
        np.testing.assert_array_equal(np.concatenate(document.image_patches), stock["pixel_values"])
    mels = stock["input_features"].numpy() if document.mels else ()
    for ours, theirs in zip(document.mels, mels, strict=True):
        length = ours.shape[1]
        # NOTE: where stock pads a clip for a longer neighbour, the clip's last frame sees silence and not its mirror.
        whole = length if theirs.shape[1] == length else length - 1
        np.testing.assert_allclose(ours[:, :whole], theirs[:, :whole], rtol=0, atol=TOLERANCE)


def positions_of(document: Document, has_sound: bool) -> np.ndarray:
    """What stock's ``get_rope_index`` gives for a document."""
    return stock_positions(
        document.input_ids,
        encoder_of().ids,
        [mel.shape[1] for mel in document.mels],
        document.image_grids,
        document.video_grids,
        document.video_seconds_per_grid,
        has_sound,
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "two_videos"])
def test_positions(kind, tmp_path):
    document = encoder_of().encode(sample(kind, tmp_path))
    stock = positions_of(document, has_sound=any(document.video_has_sound))
    np.testing.assert_allclose(document.position_ids, stock, rtol=0, atol=TOLERANCE)


def test_positions_of_two_videos_of_which_one_has_sound(tmp_path):
    """Stock's ``use_audio_in_video`` is for all videos or none: beside one with sound it does not count a silent one,
    whose tokens then get the positions of text. Taken one by one, its positions are ours."""
    document = encoder_of().encode(sample("two_videos", tmp_path))
    assert document.video_has_sound == [True, False]
    cut = document.input_ids.tolist().index(encoder_of().ids.vision_end) + 1
    first = replace(
        document,
        input_ids=document.input_ids[:cut],
        video_grids=document.video_grids[:1],
        video_seconds_per_grid=document.video_seconds_per_grid[:1],
    )
    second = replace(
        document,
        input_ids=document.input_ids[cut:],
        mels=[],
        video_grids=document.video_grids[1:],
        video_seconds_per_grid=document.video_seconds_per_grid[1:],
    )
    stock = positions_of(first, has_sound=True)
    stock = np.concatenate([stock, positions_of(second, has_sound=False) + stock.max() + 1], axis=1)
    np.testing.assert_allclose(document.position_ids, stock, rtol=0, atol=TOLERANCE)
    both = positions_of(document, has_sound=True)
    assert (both[:, cut:] == both[0, cut:]).all(), "stock takes the silent video for text; if mended, compare directly"


def test_order_of_sound_where_a_pair_spans_a_fraction_of_a_second(tmp_path):
    """A pair of 17/13 s starts exactly with an audio token. Stock compares floats (the processor in 64 bits,
    ``get_rope_index`` in 32), so that rounding decides which comes first, not always the same in both; in exact
    arithmetic its order is ours, and its positions are those of ours in another order of ties."""
    encoder = encoder_of()
    document = encoder.encode(sample("long_video_audio", tmp_path))
    (grid,), (seconds,) = document.video_grids, document.video_seconds_per_grid
    assert round(seconds * 13, 9) == 17
    exact = sound_in_video(
        encoder.ids, grid, Fraction(17, 13), audio_num_tokens(document.mels[0].shape[1]), ids_per_second=13
    )
    ours = document.input_ids.tolist()
    start = ours.index(encoder.ids.audio_start)
    assert ours[start : start + len(exact)] == exact
    stock = positions_of(document, has_sound=True)
    ordered = [rows[:, np.lexsort(rows.round(3))] for rows in (document.position_ids, stock)]
    np.testing.assert_allclose(*ordered, rtol=0, atol=TOLERANCE)


@needs_torchvision
@pytest.mark.parametrize("height, width", [(1080, 1920), (1, 1), (17, 999), (431, 77), (352, 416), (300, 2)])
@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_patches_of_the_published_sizes(height, width, num_frames):
    """Resize and values with the published preprocessor's limits; an odd number of frames repeats the last one."""
    from transformers import Qwen2VLVideoProcessor

    geometry = MediaGeometry()
    limits = {"shortest_edge": geometry.video_min_pixels, "longest_edge": geometry.video_max_pixels}
    processor = Qwen2VLVideoProcessor(
        patch_size=geometry.patch_size, size=limits, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    frames = np.stack([noise(number, (width, height)) for number in range(num_frames)])
    stock = processor(
        [frames],
        cap_pixels_per_frame=False,
        input_data_format="channels_last",  # or stock takes a frame of 1 or 3 lines for one of 1 or 3 channels
        return_tensors="np",
    )
    num_grids = -(-num_frames // 2)
    grid = (num_grids, *video_grid(width, height, 2 * num_grids, 2.0, geometry)[1:])
    assert stock["video_grid_thw"].tolist() == [list(grid)]
    even = frames[np.minimum(np.arange(2 * num_grids), num_frames - 1)]
    ours = patches_of(resized(even, size_px(grid, geometry)), grid, geometry)
    np.testing.assert_allclose(ours, stock["pixel_values_videos"], rtol=0, atol=TOLERANCE)


def test_the_export_says_the_bound_on_a_whole_video(tmp_path):
    """In tokens, of which stock takes nine tenths, and not at all where there is none."""
    write_processor(MICRO, tmp_path)
    path = tmp_path / "video_preprocessor_config.json"
    assert not {"cap_pixels_per_frame", "max_video_tokens"} & set(json.loads(path.read_text()))
    factor = MICRO.vision.patch_size * MICRO.vision.spatial_merge_size
    write_processor(replace(MICRO, vision=replace(MICRO.vision, video_total_pixels=900 * factor**2)), tmp_path)
    found = json.loads(path.read_text())
    assert found["cap_pixels_per_frame"] is True and found["max_video_tokens"] == 1_000


@needs_torchvision
@pytest.mark.parametrize("max_video_tokens", [300, 600, 100_000])
@pytest.mark.parametrize("height, width", [(1080, 1920), (240, 320), (431, 77)])
def test_a_bound_on_a_whole_video_is_that_of_stock(height, width, max_video_tokens):
    """Down to 1.05 times the least that a frame has, and without effect on what is below it."""
    from transformers import Qwen2VLVideoProcessor

    geometry = MediaGeometry(video_total_pixels=int(max_video_tokens * 32**2 * 0.9))
    limits = {"shortest_edge": geometry.video_min_pixels, "longest_edge": geometry.video_max_pixels}
    processor = Qwen2VLVideoProcessor(
        patch_size=geometry.patch_size, size=limits, cap_pixels_per_frame=True, max_video_tokens=max_video_tokens
    )
    frames = np.zeros((4, height, width, 3), np.uint8)
    stock = processor([frames], input_data_format="channels_last", return_tensors="np")
    assert stock["video_grid_thw"].tolist() == [list(video_grid(width, height, 4, 2.0, geometry))]


def looked_at(num_frames: int, fps: Fraction | int) -> list[int]:
    """Numbers of the frames that we look at, read from their greys."""
    encoder = encoder_of()
    found = decode_video(steady_video(num_frames, fps, (32, 32), picture=grey), encoder.geometry)
    values = found.patches.reshape(found.grid[0], -1, 3, 2, encoder.geometry.patch_size**2).mean(axis=(1, 2, 4))
    return (((values.flatten() * 0.5 + 0.5) * 255 - 20) / 10).round().astype(int).tolist()


@needs_torchvision
@pytest.mark.parametrize(
    "num_frames, fps, stock, ours",
    [
        pytest.param(12, 6, [0, 3, 6, 9], [1, 4, 7, 10], id="2 s: as many, the first of a share or its middle one"),
        pytest.param(11, 6, [0, 2, 5, 8], [1, 4, 7, 10], id="1.8 s: stock spreads them, ours stay half a second apart"),
        pytest.param(6, 6, [0, 1, 3, 4], [1, 4], id="1 s: at least four for stock, which counts them as 2 s"),
        pytest.param(3, 6, [0, 1], [1, 2], id="half a second"),
        pytest.param(
            20,
            Fraction(2),
            [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18],
            [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 18, 19],
            id="10 s, limit 16: stock counts them as 8 s",
        ),
    ],
)
def test_sampling_differs_on_purpose(num_frames, fps, stock, ours, export):
    """Which frames are looked at, 2 a second. Stock takes the frame at the start of each share of the frames, and its
    time a pair is 2 / fps whatever came of it. Ours is on screen in the middle of its share of the time, and the time
    a pair is the true one, so that sound and picture stay together."""
    from transformers import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    processor = Qwen2VLVideoProcessor.from_pretrained(export)
    metadata = VideoMetadata(total_num_frames=num_frames, fps=float(fps))
    assert processor.sample_frames(metadata, fps=2.0).tolist() == stock
    assert looked_at(num_frames, fps) == ours


@needs_torchvision
def test_stock_cannot_sample_a_single_frame(export):
    from transformers import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    with pytest.raises(ZeroDivisionError):
        Qwen2VLVideoProcessor.from_pretrained(export).sample_frames(VideoMetadata(1, fps=2.0), fps=2.0)
    assert looked_at(1, 2) == [0, 0]


@needs_torchvision
def test_stock_puts_published_limits_before_those_of_the_export(export):
    """Why ``processor_inputs`` passes ``size``: Qwen3OmniMoeProcessor has limits of its class, which a file does not
    override. The video processor alone has the file's."""
    from transformers import Qwen3OmniMoeProcessor

    processor = Qwen3OmniMoeProcessor.from_pretrained(export, local_files_only=True)
    frames = np.stack([noise(number, (50, 37)) for number in range(2)])
    text = "<|vision_start|><|video_pad|><|vision_end|>"
    whole = processor(text=text, videos=[frames], videos_kwargs={"cap_pixels_per_frame": False}, return_tensors="np")
    alone = processor.video_processor([frames], cap_pixels_per_frame=False, return_tensors="np")
    assert alone["video_grid_thw"].tolist() == [list(video_grid(50, 37, 2, 2.0, encoder_of().geometry))]
    assert whole["video_grid_thw"].prod() > 100 * alone["video_grid_thw"].prod()
