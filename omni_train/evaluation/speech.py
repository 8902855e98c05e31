"""What a codec and Code2Wav keep of held-out speech: words that a recogniser hears, STOI.

    originals of train ──▶ Recogniser (character CTC; knows nothing of any codec)
    held-out waves ──codes──▶ mel decoder ──▶ mel ──┐
                        └───▶ Code2Wav ──▶ wave ────┴──Recogniser──▶ words of the lexicon ──▶ codec_words_mel, _wave
                                             └──STOI against the original──▶ codec_stoi

Shapes: B clips, N samples, M mel bands, F frames of 10 ms, C characters with the blank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from omni_train.config import ConfigError, Objective, RunConfig
from omni_train.data.audio import decode_audio
from omni_train.data.codes import speech_member
from omni_train.data.contracts import Sample
from omni_train.data.encode import padded_waves
from omni_train.data.media_tokens import CODEC_SAMPLE_RATE_HZ
from omni_train.data.pipeline import DataPipeline
from omni_train.engine.parallel import Ranks, sum_over_ranks
from omni_train.evaluation.capabilities import gather, read_all, split_tasks
from omni_train.evaluation.stoi import stoi
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import HOP, NUM_MELS, Codec, CodecEncoder, FrozenCodec, codec_mel
from omni_train.models.weights import load_components

CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"
WIDTH, NUM_BLOCKS = 96, 4
TRAIN_STEPS, TRAIN_CLIPS, TRAIN_LR = 600, 32, 2e-3
PARTS = 2
"""Of a batch: each is normalised alone, a rank takes every so many."""
BATCH_CLIPS = 32


@dataclass(frozen=True, slots=True)
class Clip:
    """A wave at 24 kHz and the words that are said."""

    wave: np.ndarray
    text: str


class Recogniser(nn.Module):
    """Convolutions over log-mel → character logits at 50 Hz. Its words are the nearest of the ``lexicon``."""

    def __init__(self, lexicon: Iterable[str]) -> None:
        super().__init__()
        self.lexicon = sorted(lexicon)
        self.conv_in = nn.Conv1d(NUM_MELS, WIDTH, 5, 2, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 5, padding=2), nn.BatchNorm1d(WIDTH), nn.ReLU())
            for _ in range(NUM_BLOCKS)
        )
        self.out = nn.Conv1d(WIDTH, len(CHARACTERS) + 1, 1)

    def forward(self, mel_BMF: Tensor) -> Tensor:
        """[B, C, F / 2]."""
        hidden = self.conv_in(mel_BMF)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.out(hidden)

    @torch.no_grad()
    def hear(self, mel_BMF: Tensor, num_samples: Sequence[int]) -> list[str]:
        """What is heard in each clip, letter by letter: the best path."""
        best = self(mel_BMF).argmax(1)
        heard = []
        for path, length in zip(best.tolist(), num_samples, strict=True):
            path = path[: length // (2 * HOP) + 1]
            kept = [c for before, c in zip([-1, *path], path, strict=False) if c != before and c < len(CHARACTERS)]
            heard.append("".join(CHARACTERS[c] for c in kept))
        return heard

    def snap(self, text: str) -> str:
        """Each word replaced by that of the lexicon at the least edit distance."""
        return " ".join(min(self.lexicon, key=partial(edit_distance, word)) for word in text.split())


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def train_recogniser(clips: Sequence[Clip], ranks: Ranks, *, seed: int, num_steps: int = TRAIN_STEPS) -> Recogniser:
    """A recogniser of the words in ``clips``, which it alone hears; loudness, colour and noise are varied.

    Ranks share the PARTS of a batch, each with statistics of its own: the same comes out for any number of ranks.
    """
    texts = [[CHARACTERS.index(c) for c in clip.text] for clip in clips]
    waves, lengths = batch([clip.wave for clip in clips])
    mels = torch.cat([codec_mel(part) for part in waves.split(BATCH_CLIPS)])  # in one call: six times as long
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Recogniser({word for clip in clips for word in clip.text.split()})
    optimizer = torch.optim.AdamW(model.parameters(), TRAIN_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, num_steps)
    for _ in range(num_steps):
        chosen = torch.randint(len(clips), (TRAIN_CLIPS,), generator=generator)
        mel = mels[chosen]
        for scale, shape in ((0.3, mel.shape), (0.2, (*mel.shape[:2], 1)), (0.3, (len(mel), 1, 1))):
            mel = mel + scale * torch.rand((), generator=generator) * torch.randn(shape, generator=generator)
        for part, part_mel in list(zip(chosen.chunk(PARTS), mel.chunk(PARTS), strict=True))[ranks.rank :: ranks.world]:
            logits = model(part_mel)
            targets = [texts[n] for n in part.tolist()]
            loss = F.ctc_loss(
                logits.permute(2, 0, 1).log_softmax(-1),
                torch.tensor([c for text in targets for c in text]),
                (lengths[part] // (2 * HOP) + 1).clamp(max=logits.shape[-1]),
                torch.tensor([len(text) for text in targets]),
                blank=len(CHARACTERS),
            )
            (loss / PARTS).backward()
        if ranks.world > 1:
            sum_gradients(model, ranks)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    count_statistics(model, mels)
    return model.eval()


def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Gradients summed over ranks, in place; a rank without any has zeros. Collective."""
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    everywhere = sum_over_ranks(torch.cat([gradient.flatten() for gradient in own]).to(ranks.device)).cpu()
    for parameter, gradient in zip(model.parameters(), everywhere.split([each.numel() for each in own]), strict=True):
        parameter.grad = gradient.view_as(parameter)


@torch.no_grad()
def count_statistics(model: nn.Module, mels_CMF: Tensor) -> None:
    """What batch normalisation is to know of all clips, counted once with the final weights (arXiv 2105.07576)."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches alike
    for part in mels_CMF.split(TRAIN_CLIPS // PARTS):
        model(part)


def batch(waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(waves [B, N] padded to whole codec frames, lengths [B])."""
    padded = padded_waves(list(waves))
    return padded["waves"], padded["wave_lengths"]


def word_accuracy(pairs: Sequence[tuple[str, str]]) -> float:
    """1 − word error rate of (heard, said), at least 0."""
    heard, said = zip(*pairs, strict=True)
    return max(0.0, 1.0 - float(jiwer.wer(list(said), list(heard))))


def swapped(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What was heard beside what the next item says, as a control."""
    return [(heard, other) for (heard, _), (_, other) in zip(pairs, [*pairs[1:], pairs[0]], strict=True)]


def clip_of(sample: Sample) -> Clip:
    """The speech of a sample and the text of its reply. Raises ConfigError for text that is no plain English."""
    reply = sample.content["messages"][-1].get("content") or ""
    text = reply if isinstance(reply, str) else "".join(p["text"] for p in reply if p["type"] == "text")
    text = text.strip().lower()
    if strange := set(text) - set(CHARACTERS):
        raise ConfigError(
            f"sample {sample.id} says {text!r}: the recogniser that measures speech knows a–z, space and ' alone, "
            f"not {''.join(sorted(strange))!r}; measure tasks of plain words"
        )
    member = speech_member(sample.content)
    if member is None:
        raise ConfigError(f"sample {sample.id} has no clip to compare with; measure tasks of speech")
    try:
        return Clip(decode_audio(sample.members[member], CODEC_SAMPLE_RATE_HZ), text)
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: member {member!r}: {error}") from error


def clips_of(samples: Sequence[Sample]) -> list[Clip]:
    """``clip_of`` each sample."""
    return [clip_of(sample) for sample in samples]


def listener_of(data: DataPipeline, run_dir: Path | None, ranks: Ranks) -> Recogniser:
    """The recogniser of all that the stage trains on, kept in a run folder for all measurements of it. Collective."""
    path = run_dir / "recogniser.pt" if run_dir else None
    if path and path.exists():
        state = torch.load(path, weights_only=True)
        listener = Recogniser(state["lexicon"]).eval()
        listener.load_state_dict(state["weights"])
        return listener
    sources = data.config.mixture.items()
    samples = [sample for name, source in sources for sample in read_all(data, name, source, clip_of)]
    listener = train_recogniser(clips_of(samples), ranks, seed=0)
    if path and ranks.is_main:
        torch.save({"lexicon": listener.lexicon, "weights": listener.state_dict()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    dist.barrier()
    return listener


@dataclass(slots=True)
class SpeechFigures:
    """Figures of a task by name, those of its control (the words of another item), (heard, said) of its items, and
    {figure: {speaker: [value, that of the originals or None]}}."""

    name: str
    figures: dict[str, float]
    controls: dict[str, float]
    pairs: list[tuple[str, str]]
    by_speaker: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)


def speech_figures(
    config: RunConfig, folder: Path, tasks: dict[str, str], split: str, ranks: Ranks, run_dir: Path | None
) -> Iterator[SpeechFigures]:
    """Figures of an export of codec (words at mel level) or code2wav (words and STOI of waves). Collective."""
    data, reconstruct = DataPipeline.of(config), load_reconstruction(config, folder)
    level = "mel" if config.stage.objective is Objective.codec else "wave"
    listener = listener_of(data, run_dir, ranks)
    for task, samples in split_tasks(data, tasks, split, clip_of).items():
        mine = clips_of(samples[ranks.rank :: ranks.world])
        found: list[tuple] = []
        for start in range(0, len(mine), BATCH_CLIPS):
            part = mine[start : start + BATCH_CLIPS]
            waves, lengths = batch([clip.wave for clip in part])
            mel, made = reconstruct(waves, lengths)
            heard = [listener.snap(text) for text in listener.hear(mel, lengths.tolist())]
            quality = [0.0] * len(part) if made is None else list(map(stoi_of, part, made))
            found += zip(heard, [clip.text for clip in part], quality, strict=True)
        results = gather(found)
        pairs = [(heard, said) for heard, said, _ in results]
        figures = {f"codec_words_{level}": word_accuracy(pairs)}
        controls = {f"codec_words_{level}": word_accuracy(swapped(pairs))}
        if level == "wave":
            figures["codec_stoi"] = float(np.mean([quality for _, _, quality in results]))
        yield SpeechFigures(task, figures, controls, pairs)


Reconstruct = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Waves [B, N] with lengths [B] → (what the recogniser hears of what is left of them, waves [B, N] if any were made)"""


def load_reconstruction(config: RunConfig, folder: Path) -> Reconstruct:
    """Through the codes of an export and back: to mel by a codec's own decoder, to waves by Code2Wav."""
    if config.stage.objective is Objective.codec:
        codec = Codec(config.model.codec).eval()
        load_components(codec, folder, {"codec_encoder", "codec_decoder"})
        return partial(to_mel, codec)
    coder, code2wav = FrozenCodec(config.model.codec).eval(), Code2Wav(config.model).eval()
    load_components(coder, folder, {"codec_encoder"})
    load_components(code2wav, folder, {"code2wav"})
    return partial(to_wave, coder.codec_encoder, code2wav)


@torch.no_grad()
def to_mel(codec: Codec, waves_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, None]:
    """What the mel decoder makes of the codes of waves."""
    quantizer = codec.codec_encoder.quantizer
    codes_BTG = codec.codec_encoder.encode(waves_BN).transpose(1, 2)
    return codec.codec_decoder(quantizer.decode(codes_BTG)), None


@torch.no_grad()
def to_wave(encoder: CodecEncoder, code2wav: Code2Wav, waves_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """What Code2Wav makes of the codes of waves, silent behind their ends."""
    made = code2wav.decode(encoder.encode(waves_BN))
    made = F.pad(made, (0, waves_BN.shape[1] - made.shape[1]))
    made = made * (torch.arange(made.shape[1]) < lengths_B[:, None])
    return codec_mel(made), made


def stoi_of(clip: Clip, made_N: Tensor) -> float:
    """STOI of a reconstruction against its clip."""
    return stoi(clip.wave, made_N[: len(clip.wave)].numpy(), CODEC_SAMPLE_RATE_HZ)
