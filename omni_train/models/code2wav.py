"""Code2Wav: codes → 24 kHz wave, stock `transformers` weights with an initialisation that learns; frame by frame too.

    codes [B, G, T] ──embedding, transformer──▶ [B, H, T] ──×2 ×2──▶ [B, H, 4 T] ──head──▶ wave [B, T × 1920 − 555]

Sample n of the output belongs to sample n of the wave that was encoded. The head needs 555 samples of the frame after,
so those are missing at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeCausalConvNet,
    Qwen3OmniMoeCausalTransConvNet,
    Qwen3OmniMoeCode2Wav,
    Qwen3OmniMoeCode2WavDecoderBlock,
    Qwen3OmniMoeCode2WavDecoderResidualUnit,
    Qwen3OmniMoeConvNeXtBlock,
    Qwen3OmniMoeSnakeBeta,
)

from omni_train.config import ModelConfig, WaveHead
from omni_train.data.contracts import Pack
from omni_train.data.media_tokens import SAMPLES_PER_CODEC_FRAME
from omni_train.models.build import code2wav_config, fan_in_init
from omni_train.models.codec import ResidualQuantizer, pack_waves

LOOKAHEAD = 555
"""Samples at the end of the last frame that cannot be made yet: each upsampling, × 8 5 4 3, looks one input ahead."""


class Code2Wav(nn.Module):
    """Code2Wav with the head of the preset. Parameter names: ``code2wav.*``, those of stock for the published head."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.code2wav = Qwen3OmniMoeCode2Wav(code2wav_config(model))
        if model.code2wav.head is WaveHead.istft:
            self.code2wav.decoder = nn.ModuleList([FourierHead(model.code2wav.hidden_size)])

    def forward(self, pack: Pack, codes_BGT: Tensor) -> dict[str, Tensor]:
        """``wave`` and ``target`` [B, N − 555], ``lengths`` and ``frames`` [B] of a pack with these codes."""
        waves_BN, lengths_B = pack_waves(pack)
        wave = self.decode(codes_BGT)
        frames = -(-lengths_B // SAMPLES_PER_CODEC_FRAME)
        return {"wave": wave, "target": waves_BN[:, : wave.shape[1]], "lengths": lengths_B, "frames": frames}

    def decode(self, codes_BGT: Tensor) -> Tensor:
        """Waves [B, T × 1920 − 555] in −1 … 1."""
        return self.code2wav(codes_BGT)[:, 0]


class FourierHead(nn.Module):
    """50 Hz features → 100 Hz → magnitude and phase of 40 ms windows → overlap-add (Siuzdak 2023, Vocos)."""

    FFT_SIZE, HOP, BLOCKS = 960, 240, 2

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.upsample = Qwen3OmniMoeCausalTransConvNet(dim, dim, 2, 2)
        self.blocks = nn.ModuleList([Qwen3OmniMoeConvNeXtBlock(dim) for _ in range(self.BLOCKS)])
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, self.FFT_SIZE + 2)
        self.register_buffer("window", torch.hann_window(self.FFT_SIZE), persistent=False)

    def frames(self, hidden_BHF: Tensor) -> Tensor:
        """Windowed frames [B, F, 960]; frame f is centred on sample 240 f."""
        log_magnitude, phase = self.out(self.norm(hidden_BHF.transpose(1, 2))).float().chunk(2, dim=-1)
        spectrum = torch.polar(log_magnitude.clamp(max=5.0).exp(), phase)
        return torch.fft.irfft(spectrum, self.FFT_SIZE) * self.window

    def forward(self, hidden_BHL: Tensor) -> Tensor:
        """Waves [B, 1, 480 L − 555]."""
        hidden = self.upsample(hidden_BHL)
        for block in self.blocks:
            hidden = block(hidden)
        wave, weight = overlap_add(self.frames(hidden), self.window, self.HOP)
        start, length = self.FFT_SIZE // 2, hidden.shape[-1] * self.HOP - LOOKAHEAD
        return (wave / weight)[:, None, start : start + length]


def overlap_add(frames_BFW: Tensor, window_W: Tensor, hop: int) -> tuple[Tensor, Tensor]:
    """(sum of the frames at hops, [B, (F − 1) × hop + W]; the same of the squared window, [1, …], never 0)."""
    num_frames, width = frames_BFW.shape[1:]
    length = (num_frames - 1) * hop + width

    def fold(columns: Tensor) -> Tensor:
        return F.fold(columns, (1, length), (1, width), stride=(1, hop))[:, 0, 0]

    squared = window_W.square()[None, :, None].expand(1, -1, num_frames)
    return fold(frames_BFW.transpose(1, 2)), fold(squared).clamp(min=1e-8)


@torch.no_grad()
def initialise(model: Code2Wav) -> None:
    """Weights from N(0, 1 / fan_in), residual branches small, output about 0.05: stock's own start gives 5.5e-6.

    Codes enter at rms 1. Deterministic from torch's generator.
    """
    stock = model.code2wav
    fan_in_init(stock)
    nn.init.normal_(stock.code_embedding.weight, std=stock.config.num_quantizers**0.5)
    for layer in stock.modules():
        match layer:
            case Qwen3OmniMoeConvNeXtBlock():
                layer.gamma.fill_(0.3)
            case Qwen3OmniMoeCode2WavDecoderResidualUnit():
                layer.conv2.conv.weight.mul_(0.3)
            case FourierHead():
                layer.out.weight.mul_(0.3)
                layer.out.bias[: len(layer.out.bias) // 2] = -1.0
    for layer in stock.pre_transformer.layers:
        layer.self_attn_layer_scale.scale.fill_(0.3)
        layer.mlp_layer_scale.scale.fill_(0.3)
    if isinstance(stock.decoder[-1], Qwen3OmniMoeCausalConvNet):
        stock.decoder[-1].conv.weight.mul_(0.03)


@torch.no_grad()
def start_from_codebooks(model: Code2Wav, quantizer: ResidualQuantizer, *, seed: int) -> None:
    """Start the code embedding as a random projection of the codec's codewords: close codes are close from the start,
    and a frame enters as its quantised latent, projected, at rms about 1."""
    words_GKD, sizes_GK = quantizer.codebooks, quantizer.sizes
    share_GK1 = (sizes_GK / sizes_GK.sum(-1, keepdim=True))[..., None]
    variance = (share_GK1 * words_GKD.square()).sum() - (share_GK1 * words_GKD).sum(1).square().sum()
    generator = torch.Generator().manual_seed(seed)
    projection_DH = torch.randn(words_GKD.shape[-1], model.code2wav.config.hidden_size, generator=generator)
    # Code2Wav takes the mean over codebooks, the quantiser the sum.
    words = len(words_GKD) * words_GKD @ projection_DH.to(words_GKD) / variance.sqrt().clamp(min=1e-6)
    model.code2wav.code_embedding.weight.copy_(words.flatten(0, 1))


def build_code2wav(config: ModelConfig, *, seed: int) -> Code2Wav:
    """Code2Wav in fp32, initialised from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Code2Wav(config)
        initialise(model)
    return model


class StreamingCode2Wav:
    """Code2Wav a few frames at a time: the samples of all calls together are those of one call on all frames.

    Upstream's ``chunked_decode`` drops 555 samples at every cut and sees 25 frames of context. Here each layer keeps
    the inputs that it still needs: attention its window of keys and values, convolutions their past, upsampling its
    last input. The first call returns n × 1920 − 555 samples, each later one n × 1920.
    """

    def __init__(self, model: Code2Wav) -> None:
        self.model = model.code2wav.eval()
        self.cache = DynamicCache(config=self.model.config)
        self.past: dict[int, Any] = {}

    @torch.no_grad()
    def decode(self, codes_BGT: Tensor) -> Tensor:
        """The next samples, [B, n], for the next frames."""
        model = self.model
        hidden = model.code_embedding(codes_BGT + model.code_offset).mean(1)
        hidden = model.pre_transformer(inputs_embeds=hidden, past_key_values=self.cache, use_cache=True)
        hidden = hidden.last_hidden_state.transpose(1, 2)
        for layer in (*(layer for pair in model.upsample for layer in pair), *model.decoder):
            hidden = self._run(layer, hidden)
        return hidden[:, 0].clamp(min=-1, max=1)

    def _run(self, layer: nn.Module, x_BHL: Tensor) -> Tensor:
        match layer:
            case Qwen3OmniMoeCausalConvNet():
                past = self.past.get(id(layer), x_BHL.new_zeros(*x_BHL.shape[:2], layer.padding))
                x_BHL = torch.cat([past, x_BHL], dim=-1)
                self.past[id(layer)] = x_BHL[..., x_BHL.shape[-1] - layer.padding :]
                return layer.conv(x_BHL)
            case Qwen3OmniMoeCausalTransConvNet():
                if layer.left_pad:  # an output needs two inputs
                    past = self.past.get(id(layer), x_BHL[..., :0])
                    self.past[id(layer)] = x_BHL[..., -1:]
                    x_BHL = torch.cat([past, x_BHL], dim=-1)
                return layer(x_BHL)
            case Qwen3OmniMoeConvNeXtBlock():
                hidden = layer.norm(self._run(layer.dwconv, x_BHL).transpose(1, 2))
                hidden = layer.gamma * layer.pwconv2(layer.act(layer.pwconv1(hidden)))
                return x_BHL + hidden.transpose(1, 2)
            case Qwen3OmniMoeCode2WavDecoderResidualUnit():
                hidden = self._run(layer.conv1, layer.act1(x_BHL))
                return x_BHL + self._run(layer.conv2, layer.act2(hidden))
            case Qwen3OmniMoeCode2WavDecoderBlock():
                for part in layer.block:
                    x_BHL = self._run(part, x_BHL)
                return x_BHL
            case Qwen3OmniMoeSnakeBeta():
                return layer(x_BHL)
            case FourierHead():
                return self._synthesise(layer, x_BHL)
        raise TypeError(f"no streaming form of {type(layer).__name__}")

    def _synthesise(self, head: FourierHead, x_BHL: Tensor) -> Tensor:
        hidden = self._run(head.upsample, x_BHL)
        for block in head.blocks:
            hidden = self._run(block, hidden)
        frames = head.frames(hidden)
        wave, weight = overlap_add(frames, head.window, head.HOP)
        tail = head.FFT_SIZE - head.HOP
        is_first = id(head) not in self.past
        if not is_first:  # what the frames before left of their windows, and samples held back
            held, past_wave, past_weight = self.past[id(head)]
            wave[:, :tail] += past_wave
            weight[:, :tail] += past_weight
        done = frames.shape[1] * head.HOP
        ready = wave[:, :done] / weight[:, :done].clamp(min=1e-8)
        ready = ready[:, head.FFT_SIZE // 2 :] if is_first else torch.cat([held, ready], dim=-1)
        # Complete up to FFT_SIZE / 2 before the last frame's end; kept back to 555 as with the published head.
        keep = LOOKAHEAD - head.FFT_SIZE // 2
        self.past[id(head)] = ready[:, ready.shape[-1] - keep :], wave[:, done:], weight[:, done:]
        return ready[:, None, : ready.shape[-1] - keep]


class WeightAverage:
    """Exponential average of a module's trained weights, by name; what is exported in place of the last ones."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.average = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present weights; the first hundreds of steps are averaged over fewer."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in self.module.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    @torch.no_grad()
    def install(self) -> None:
        """Put the average in place of the module's weights."""
        for name, parameter in self.module.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
