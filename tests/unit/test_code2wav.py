"""Code2Wav: stock's forward, a start that learns, and frame by frame the same samples as at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import micro_model
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

from omni_train.config import ConfigError, ModelConfig, WaveHead, load
from omni_train.data.encode import collate
from omni_train.data.speech import SpeechEncoder, document_of
from omni_train.engine.export import write_parts
from omni_train.models.build import code2wav_config
from omni_train.models.code2wav import (
    LOOKAHEAD,
    Code2Wav,
    FourierHead,
    StreamingCode2Wav,
    WeightAverage,
    build_code2wav,
    overlap_add,
    start_from_codebooks,
)
from omni_train.models.codec import ResidualQuantizer
from omni_train.stage import build_modules, origin

FRAME, WINDOW, NUM_FRAMES = 1920, 8, 27
SMALL = ["model=tiny", "model.code2wav.hidden_size=32", "model.code2wav.intermediate_size=32"]


def preset(head: WaveHead = WaveHead.conv) -> ModelConfig:
    """A micro model whose attention window is 8 frames, so that 27 are more than three windows."""
    model = micro_model(4)
    code2wav = dataclasses.replace(model.code2wav, sliding_window=WINDOW, num_hidden_layers=2, head=head)
    return dataclasses.replace(model, code2wav=code2wav)


def codes(num_frames: int = NUM_FRAMES, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    config = preset().code2wav
    return torch.randint(config.codebook_size, (batch, config.num_quantizers, num_frames), generator=generator)


def test_a_frame_is_1920_samples_but_for_those_that_need_the_next():
    for head in WaveHead:
        wave = build_code2wav(preset(head), seed=0).decode(codes(3))
        assert wave.shape == (2, 3 * FRAME - LOOKAHEAD)


def test_it_is_stocks_module_with_stocks_names():
    ours = build_code2wav(preset(), seed=0).eval()
    stock = Qwen3OmniMoeCode2Wav(code2wav_config(preset())).eval()
    state = {name.removeprefix("code2wav."): tensor for name, tensor in ours.state_dict().items()}
    stock.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(ours.decode(codes()), stock(codes())[:, 0])


@pytest.mark.parametrize("head", list(WaveHead))
def test_a_stage_with_another_head_starts_from_all_but_the_head(head, tmp_path):
    other = next(each for each in WaveHead if each is not head)
    source = load("code2wav", [*SMALL, f"model.code2wav.head={other.name}"])
    trained = build_code2wav(source.model, seed=1)
    write_parts(dict(trained.named_parameters()), source, tmp_path)
    for kind, says in ((head, f"from {tmp_path} but its head"), (other, f"from {tmp_path}")):
        config = load("code2wav", [*SMALL, f"model.code2wav.head={kind.name}", f"+init.code2wav={tmp_path}"])
        fresh = dict(build_code2wav(config.model, seed=config.seed).named_parameters())
        started = build_modules(config, None)["code2wav"]
        for name, parameter in started.named_parameters():
            is_taken = kind is other or not name.startswith("code2wav.decoder.")
            assert parameter.equal(trained.get_parameter(name) if is_taken else fresh[name])
        assert origin(config, "code2wav") == says and origin(config, "codec_encoder") == ""
    (tmp_path / "config.json").write_text('{"model": {"code2wav": {"head": "wavenet"}}}')
    with pytest.raises(ConfigError, match="names the head 'wavenet' of Code2Wav; known are conv, istft"):
        build_modules(config, None)


@pytest.mark.parametrize("head", list(WaveHead))
def test_it_starts_at_the_loudness_of_speech_where_stock_starts_silent(head):
    with torch.no_grad():
        wave = build_code2wav(preset(head), seed=0).decode(codes())
        torch.manual_seed(0)
        silent = Code2Wav(preset()).decode(codes())
    assert wave.isfinite().all()
    assert 1e-3 < wave.std() < 0.3
    assert silent.std() < 1e-4


def test_the_seed_makes_the_weights():
    first, again, other = (build_code2wav(preset(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["code2wav.code_embedding.weight"], other["code2wav.code_embedding.weight"])


@pytest.mark.parametrize("head", list(WaveHead))
@pytest.mark.parametrize("sizes", [[1] * NUM_FRAMES, [5, 1, 13, 8], [NUM_FRAMES]])
def test_frame_by_frame_it_makes_the_samples_that_it_makes_at_once(head, sizes):
    model = build_code2wav(preset(head), seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales too, so that an edge would be heard
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        whole = model.decode(codes())
    stream, pieces = StreamingCode2Wav(model), []
    for number, part in enumerate(codes().split(sizes, dim=-1)):
        pieces.append(stream.decode(part))
        assert pieces[-1].shape[-1] == part.shape[-1] * FRAME - (LOOKAHEAD if number == 0 else 0)
    joined = torch.cat(pieces, dim=-1)
    assert joined.shape == whole.shape
    assert (joined - whole).abs().max() < 1e-4 * whole.abs().max()


def test_a_sample_depends_on_no_frame_after_the_next():
    for head in WaveHead:
        model = build_code2wav(preset(head), seed=0).eval()
        changed = codes()
        changed[..., 10:] = (changed[..., 10:] + 1) % preset().code2wav.codebook_size
        with torch.no_grad():
            before, after = model.decode(codes()), model.decode(changed)
        assert torch.equal(before[:, : 10 * FRAME - LOOKAHEAD], after[:, : 10 * FRAME - LOOKAHEAD])
        assert not torch.equal(before[:, : 10 * FRAME], after[:, : 10 * FRAME])


def test_overlap_add_by_hand():
    frames = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]])
    wave, weight = overlap_add(frames, torch.tensor([1.0, 2.0, 2.0, 1.0]), hop=2)
    assert wave.tolist() == [[1.0, 2.0, 13.0, 24.0, 30.0, 40.0]]
    assert weight.tolist() == [[1.0, 4.0, 5.0, 5.0, 4.0, 1.0]]


def test_the_fourier_head_is_torchs_inverse_transform():
    torch.manual_seed(0)
    head = FourierHead(8).eval()
    hidden = torch.randn(1, 8, 20)
    with torch.no_grad():
        upsampled = head.upsample(hidden)
        for block in head.blocks:
            upsampled = block(upsampled)
        log_magnitude, phase = head.out(head.norm(upsampled.transpose(1, 2))).chunk(2, dim=-1)
        spectrum = torch.polar(log_magnitude.exp(), phase).transpose(1, 2)
        expected = torch.istft(spectrum, head.FFT_SIZE, head.HOP, window=head.window, length=20 * 480 - LOOKAHEAD)
        assert torch.allclose(head(hidden)[:, 0], expected, atol=1e-5)


def test_codes_start_where_their_words_lie():
    model, preset_ = build_code2wav(preset(), seed=0), preset()
    quantizer = ResidualQuantizer(preset_.codec)
    generator = torch.Generator().manual_seed(0)
    quantizer.codebooks.normal_(generator=generator)
    quantizer.sizes.fill_(1.0)
    start_from_codebooks(model, quantizer, seed=0)
    latents = quantizer.decode(codes().transpose(1, 2)).flatten(0, 1)
    embedded = model.code2wav.code_embedding(codes() + model.code2wav.code_offset).mean(1).flatten(0, 1)
    factors = torch.linalg.lstsq(latents, embedded).solution
    assert torch.allclose(latents @ factors, embedded, atol=1e-4)
    assert 0.5 < embedded.std() < 2.0


def test_a_packs_target_is_the_wave_that_its_codes_are_of():
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)).numpy() for n in (2 * FRAME, FRAME + 1)]
    pack = collate([document_of(f"d{n}", [wave], 2) for n, wave in enumerate(waves)])
    output = build_code2wav(preset(), seed=0)(pack, codes(2))
    assert output["target"].shape == output["wave"].shape == (2, 2 * FRAME - LOOKAHEAD)
    assert torch.equal(output["target"][0], torch.from_numpy(waves[0])[: 2 * FRAME - LOOKAHEAD])
    assert output["frames"].tolist() == [2, 2] and output["lengths"].tolist() == [2 * FRAME, FRAME + 1]
    empty = build_code2wav(preset(), seed=0)(SpeechEncoder().dummy(), codes(1, batch=1))
    assert empty["frames"].tolist() == [0]


def test_the_average_of_weights_is_exponential_and_is_restored():
    module = torch.nn.Linear(2, 1, bias=False)
    weights = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[5.0, 1.0]])]
    module.weight.data = weights[0].clone()
    average, expected = WeightAverage(module, decay=0.5), weights[0]
    for number, value in enumerate(weights[1:], 1):
        module.weight.data = value.clone()
        average.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
        if number == 1:
            other = WeightAverage(module, decay=0.5)
            other.load_state_dict(average.state_dict())
    assert torch.allclose(average.average["weight"], expected)
    other.update()
    assert torch.equal(other.average["weight"], average.average["weight"])
    average.install()
    assert torch.equal(module.weight, average.average["weight"])
