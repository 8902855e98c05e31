"""The media towers against stock: a clip or picture comes out as alone, whatever its mates; windows; streaming."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stock import MICRO, perturb
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeVisionEncoder,
)

from omni_train.models import towers
from omni_train.models.build import audio_config, build_encoder, vision_config
from omni_train.models.towers import adapt_audio, encode_audio, encode_vision, stream_audio

TOLERANCE = 1e-5
LENGTHS = [*range(1, 100), 100, 101, 199, 200, 250, 800, 801, 1700]
MATES = {
    "all": LENGTHS,
    "all, turned round": LENGTHS[::-1],
    "short beside one second": [85, 60, 100],
    "very short": [1, 2, 3],
    "long and short": [1700, 1, 99, 101],
}


@pytest.fixture(scope="module")
def tower():
    """Our audio tower, away from its initial weights."""
    tower = build_encoder(MICRO, "audio", seed=0)
    perturb(tower)
    return tower.eval()


def stock_audio(tower, window_sec=8):
    model = dataclasses.replace(MICRO, audio=dataclasses.replace(MICRO.audio, n_window_infer=100 * window_sec))
    stock = Qwen3OmniMoeAudioEncoder(audio_config(model)).eval()
    stock.load_state_dict(tower.state_dict())
    return stock


def clip(frames):
    return torch.randn(128, frames, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
def ours(tower, clips, windows):
    lengths = torch.tensor([mel.shape[1] for mel in clips])
    return adapt_audio(tower, encode_audio(tower, torch.cat(clips, dim=1), lengths, torch.tensor(windows)))


@torch.no_grad()
def alone(stock, mel):
    return stock(mel, feature_lens=torch.tensor([mel.shape[1]])).last_hidden_state


@pytest.fixture(scope="module")
def stock_alone(tower):
    stock = stock_audio(tower)
    return {frames: alone(stock, clip(frames)) for frames in LENGTHS}


@pytest.mark.parametrize("frames", LENGTHS)
def test_a_clip_equals_stock_on_it_alone(frames, tower, stock_alone):
    found = ours(tower, [clip(frames)], [8])
    assert found.shape == stock_alone[frames].shape and stock_alone[frames].abs().max() > 1
    assert (found - stock_alone[frames]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("mates", MATES.values(), ids=MATES)
def test_batch_mates_change_nothing(mates, tower, stock_alone):
    found = ours(tower, [clip(frames) for frames in mates], [8] * len(mates))
    expected = torch.cat([stock_alone[frames] for frames in mates])
    assert (found - expected).abs().max() <= TOLERANCE


def test_stock_itself_depends_on_batch_mates(tower, stock_alone):
    """Why the front end is ours: in a stock batch a clip under one second changes with the clip beside it."""
    with torch.no_grad():
        both = stock_audio(tower)(torch.cat([clip(60), clip(85)], dim=1), feature_lens=torch.tensor([60, 85]))
    assert (both.last_hidden_state[: len(stock_alone[60])] - stock_alone[60]).abs().max() > 1e-2


@pytest.mark.parametrize("window", range(1, 9))
def test_windows_equal_stock_with_that_window(window, tower):
    stock = stock_audio(tower, window)
    lengths = [40, 100, 250, 801, 1700]
    found = ours(tower, [clip(frames) for frames in lengths], [window] * len(lengths))
    expected = [alone(stock, clip(frames)) for frames in lengths]
    assert (found - torch.cat(expected)).abs().max() <= TOLERANCE


def test_each_clip_has_its_own_window(tower):
    windows = [1, 8, 3]
    found = ours(tower, [clip(1700)] * 3, windows)
    expected = [alone(stock_audio(tower, window), clip(1700)) for window in windows]
    assert (found - torch.cat(expected)).abs().max() <= TOLERANCE
    assert (expected[0] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize("piece_frames", [7, 160, 10_000])
@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("frames", [1, 60, 99, 100, 101, 250, 800, 801, 1700])
def test_streaming_equals_the_whole(frames, window, piece_frames, tower):
    with torch.no_grad():
        whole = encode_audio(tower, clip(frames), torch.tensor([frames]), torch.tensor([window]))
        windows = list(stream_audio(tower, clip(frames).split(piece_frames, dim=1), window))
    assert len(windows) == -(-frames // (100 * window))
    assert (torch.cat(windows) - whole).abs().max() <= TOLERANCE


def test_a_window_comes_out_before_the_next_frames_are_asked_for(tower):
    asked = []

    def pieces():
        for number in range(5):
            asked.append(number)
            yield clip(50)

    with torch.no_grad():
        first = next(stream_audio(tower, pieces(), 1))
    assert asked == [0, 1] and first.shape == (13, 32)


GRIDS = [(1, 2, 2), (1, 8, 4), (2, 4, 6), (3, 2, 2), (1, 16, 12)]


def test_recomputed_convolutions_give_the_same_gradients(monkeypatch):
    """In blocks of two seconds; stock's own switch turns it on."""
    tower = build_encoder(MICRO, "audio", seed=0)
    perturb(tower)
    tower.train()
    clips = [clip(frames) for frames in (250, 40, 801)]
    lengths = torch.tensor([mel.shape[1] for mel in clips])
    calls = []
    embed = towers._embed_chunks
    monkeypatch.setattr(towers, "RECOMPUTED_CHUNKS", 2)
    monkeypatch.setattr(towers, "_embed_chunks", lambda *given: calls.append(len(given[2])) or embed(*given))
    found = []
    for number in range(2):
        if number:
            tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tower.zero_grad()
        out = encode_audio(tower, torch.cat(clips, dim=1), lengths, torch.tensor([8, 8, 8]))
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients = {name: own.grad.clone() for name, own in tower.named_parameters() if name.startswith("conv")}
        found.append({"out": out.detach()} | gradients)
    assert calls == [13, *[2] * 6, 1, *calls[8:]] and sorted(calls[8:]) == [1, *[2] * 6], "twice each"
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("order", [GRIDS, GRIDS[::-1]], ids=["up", "down"])
def test_pictures_and_videos_equal_stock_alone(order):
    visual = build_encoder(MICRO, "vision", seed=0)
    perturb(visual)
    stock = Qwen3OmniMoeVisionEncoder(vision_config(MICRO)).eval()
    stock.load_state_dict(visual.state_dict())
    generator = torch.Generator().manual_seed(0)
    patches = [torch.randn(t * h * w, 3 * 2 * 4 * 4, generator=generator) for t, h, w in order]
    with torch.no_grad():
        found = encode_vision(visual.eval(), torch.cat(patches), torch.tensor(order))
        single = [stock(p, grid_thw=torch.tensor([grid])) for p, grid in zip(patches, order, strict=True)]
    assert (found.pooler_output - torch.cat([out.pooler_output for out in single])).abs().max() <= TOLERANCE
    assert (found.last_hidden_state - torch.cat([out.last_hidden_state for out in single])).abs().max() <= TOLERANCE
    for level in range(2):
        expected = torch.cat([out.deepstack_features[level] for out in single])
        assert (found.deepstack_features[level] - expected).abs().max() <= TOLERANCE
