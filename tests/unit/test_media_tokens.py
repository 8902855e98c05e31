import pytest

from omni_train.data.contracts import MediaFacts
from omni_train.data.media_tokens import (
    MediaGeometry,
    audio_num_frames,
    audio_num_tokens,
    image_grid,
    media_num_tokens,
    resampled_num_samples,
    smart_resize,
    video_grid,
    video_seconds_per_grid,
)

GEOMETRY = MediaGeometry()


@pytest.mark.parametrize(
    ("num_samples", "rate", "frames"),
    [(16_000, 16_000, 100), (15_999, 16_000, 99), (16_159, 16_000, 100), (48_000, 24_000, 200), (44_100, 44_100, 100)],
)
def test_frames_are_whole_ten_milliseconds_after_resampling(num_samples, rate, frames):
    assert audio_num_frames(num_samples, rate) == frames


def test_resampled_length_rounds_half_up():
    # 16/24: 1 → 0.67 → 1; 16/32: 1 → 0.5 → 1, 3 → 1.5 → 2
    assert [resampled_num_samples(1, 24_000), resampled_num_samples(1, 32_000), resampled_num_samples(3, 32_000)] == [
        1,
        1,
        2,
    ]


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (8, 1), (9, 2), (99, 13), (100, 13), (101, 14), (3000, 390)])
def test_audio_tokens(frames, tokens):
    assert audio_num_tokens(frames) == tokens


def test_resize_by_hand():
    # 480 × 640 are multiples of 32; 10 × 10 (100 pixels) grows to the 3,136 of min_pixels: 56 → 64
    assert smart_resize(480, 640, GEOMETRY) == (480, 640)
    assert smart_resize(10, 10, GEOMETRY) == (64, 64)
    # 1000 × 2000 under a limit of 500,000 pixels: halved, then down to multiples of 32
    assert smart_resize(1000, 2000, MediaGeometry(max_pixels=500_000)) == (480, 992)
    assert image_grid(640, 480, GEOMETRY) == (1, 30, 40)


def test_a_ribbon_is_refused():
    with pytest.raises(ValueError, match="2×401 pixels is too long"):
        smart_resize(401, 2, GEOMETRY)
    assert smart_resize(400, 2, GEOMETRY)[1] == 32


def test_video_pairs_span_whole_audio_tokens():
    # 10 s at 25 fps, 2 fps wanted: a pair a second, 13 position ids each
    assert video_seconds_per_grid(250, 25.0, GEOMETRY) == 1.0
    assert video_grid(640, 480, 250, 25.0, GEOMETRY)[0] == 10
    # 3 fps: 2/3 s = 8.67 ids → 9 ids
    assert video_seconds_per_grid(250, 25.0, MediaGeometry(video_fps=3.0)) == 9 / 13


@pytest.mark.parametrize("num_frames", [1, 2, 7, 769, 1_000, 25 * 3600])
@pytest.mark.parametrize("fps", [0.5, 1.0, 12.5, 29.97])
def test_video_never_passes_its_limit_of_frames(num_frames, fps):
    grid = video_grid(320, 240, num_frames, fps, GEOMETRY)
    assert 1 <= grid[0] <= 384
    ids = video_seconds_per_grid(num_frames, fps, GEOMETRY) * 13
    assert abs(ids - round(ids)) < 1e-9


def test_tokens_of_each_kind():
    audio = MediaFacts("a", "audio", num_samples=48_000, sample_rate_hz=24_000)
    image = MediaFacts("i", "image", width=640, height=480)
    video = MediaFacts("v", "video", width=640, height=480, num_frames=250, fps=25.0)
    assert media_num_tokens(audio, GEOMETRY) == 26
    assert media_num_tokens(image, GEOMETRY) == 15 * 20
    silent = media_num_tokens(video, GEOMETRY)
    assert silent == 10 * 15 * 20
    video.has_audio, video.num_samples, video.sample_rate_hz = True, 160_000, 16_000
    assert media_num_tokens(video, GEOMETRY) == silent + 130 + 2
    with pytest.raises(ValueError, match="'smell'; it must be audio, image, video, codes or speech"):
        media_num_tokens(MediaFacts("x", "smell"), GEOMETRY)


def test_geometry_refuses_what_has_no_effect_or_no_sense():
    with pytest.raises(ValueError, match="mel_bins .80. must be 128"):
        MediaGeometry(mel_bins=80)
    with pytest.raises(ValueError, match="min_pixels .2,000. must be positive and at most max_pixels .1,500."):
        MediaGeometry(min_pixels=2_000, max_pixels=1_500)
    with pytest.raises(ValueError, match="must hold one token of 32×32"):
        MediaGeometry(min_pixels=10, max_pixels=1_000)
