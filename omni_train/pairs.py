"""Preference pairs for the Talker: replies that it samples, heard and ranked, the best over the worst.

    prompts ──Talker, several times──▶ codes ──Code2Wav──▶ waves ──AuT──▶ character error rate ─┐
                                                             └──▶ likeness to the speaker's clip ┴─▶ chosen, rejected

New shards hold a sample's members with ``codes.npy`` and ``rejected.codes.npy``; samples whose replies are all alike
are left out, and replies that end before their text does.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import torch
from torch import Tensor

from omni_train.config import RunConfig
from omni_train.data.audio import decode_audio
from omni_train.data.codes import new_shard, speech_member, to_npy
from omni_train.data.contracts import Sample
from omni_train.data.layouts import MESSAGES, read_content
from omni_train.data.media_tokens import CODEC_SAMPLE_RATE_HZ
from omni_train.data.pipeline import DataPipeline
from omni_train.data.shard import DataError, SampleScan
from omni_train.data.talker_sequence import CODES, REJECTED
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.speaking import BATCH_UTTERANCES, Speaker
from omni_train.evaluation.transcription import load_transcriber, transcribe_all
from omni_train.evaluation.voice import likeness


@dataclass(slots=True)
class Reply:
    """A sampled reply: codes [G, T], character error rate as AuT hears it, likeness to the speaker's own clip, and
    whether it reads its whole text: a frame reads one token, so a shorter reply can be no target."""

    codes: Tensor
    cer: float
    likeness: float
    is_whole: bool

    def score(self, likeness_weight: float) -> float:
        """More is better."""
        return likeness_weight * self.likeness - self.cer


class PairMaker:
    """Samples replies of an exported Talker and ranks them. ``question`` is what AuT is asked."""

    def __init__(
        self, config: RunConfig, talker: Path, code2wav: Path, judge: Path, ranks: Ranks, question: str
    ) -> None:
        self.speaker = Speaker(config, talker, code2wav, DataPipeline.of(config), ranks)
        self.judge, tokenizer = load_transcriber(judge)
        self.judge.to(ranks.device)
        self.encoder = DataPipeline(config, tokenizer).message_encoder
        self.generator = torch.Generator(device=ranks.device).manual_seed(config.seed)
        self.question, self.ranks = question, ranks

    def replies(self, samples: list[Sample], texts: list[str], heat: float) -> list[Reply]:
        """One reply to each sample, drawn with ``heat`` (Speaker.codes), ``texts`` being what they are to say."""
        codes = self.speaker.codes(samples, self.generator, heat)
        waves, lengths = self.speaker.waves(codes)
        spoken = [wave[:length].cpu().numpy() for wave, length in zip(waves, lengths, strict=True)]
        heard = transcribe_all(
            self.judge,
            self.encoder,
            [self._asked(wave, text) for wave, text in zip(spoken, texts, strict=True)],
            window_sec=[8],
            max_new_tokens=64,
            device=self.ranks.device,
        )[8]
        originals = [decode_audio(s.members[str(speech_member(s.content))], CODEC_SAMPLE_RATE_HZ) for s in samples]
        return [
            Reply(
                codes=own,
                cer=float(jiwer.cer(text, answer or " ")),
                likeness=likeness(wave, original),
                is_whole=own.shape[1] >= self.speaker.num_read(text),
            )
            for own, text, (answer, _), wave, original in zip(codes, texts, heard, spoken, originals, strict=True)
        ]

    def _asked(self, wave: np.ndarray, text: str) -> Sample:
        """AuT's question about a wave; a reply of no frames is heard as a tenth of a second of silence."""
        file = io.BytesIO()
        wave = wave if len(wave) else np.zeros(CODEC_SAMPLE_RATE_HZ // 10, np.float32)
        soundfile.write(file, wave.clip(-1, 1), CODEC_SAMPLE_RATE_HZ, format="WAV")
        asked = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": self.question}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        return Sample("reply", "", "", {"messages": messages}, {"a.wav": file.getvalue()})


def add_pairs(
    shard: Path, out: Path, maker: PairMaker, heats: Sequence[float], likeness_weight: float, margin: float
) -> int:
    """Write ``out``: the samples of ``shard`` of whose replies the best is ``margin`` better than the worst; how many.

    A reply is drawn with each of ``heats``. ``out`` appears when it is whole. Raises DataError naming a sample without
    a spoken reply, FileExistsError where ``out`` is there.
    """
    num_pairs = 0
    with new_shard(out) as write:
        for samples, texts in _batches(shard):
            rounds = [maker.replies(samples, texts, heat) for heat in heats]
            for sample, replies in zip(samples, zip(*rounds, strict=True), strict=True):
                ranked = sorted((r for r in replies if r.is_whole), key=lambda r: r.score(likeness_weight))
                if len(ranked) < 2 or ranked[-1].score(likeness_weight) - ranked[0].score(likeness_weight) < margin:
                    continue
                codes = {CODES: ranked[-1].codes, REJECTED: ranked[0].codes}
                made = {name: to_npy(own.cpu().numpy()) for name, own in codes.items()}
                write({"__key__": sample.key, **sample.members, **made})
                num_pairs += 1
    return num_pairs


def _batches(shard: Path) -> Iterator[tuple[list[Sample], list[str]]]:
    """The samples of a shard with the texts of their replies, a batch at a time."""
    samples: list[Sample] = []
    texts: list[str] = []
    for found in SampleScan(shard):
        if found.error:
            raise DataError.at(shard, found.offset, found.error, key=found.key)
        content = read_content(found.members, MESSAGES)
        last = content["messages"][-1]
        if last["role"] != "assistant" or speech_member({"messages": [last]}) is None:
            raise DataError.at(shard, found.offset, "it has no reply with its clip", key=found.key)
        said = last["content"]
        samples.append(Sample(found.key, str(shard), found.key, content, dict(found.members)))
        texts.append("".join(part["text"] for part in said if part["type"] == "text").strip())
        if len(samples) == BATCH_UTTERANCES:
            yield samples, texts
            samples, texts = [], []
    if samples:
        yield samples, texts
