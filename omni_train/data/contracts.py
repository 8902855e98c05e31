"""The values that cross folder boundaries of the data layer.

    tar shards ──index──▶ SampleFacts ──planner──▶ PackPlan ──reader──▶ Sample ──encode──▶ Document ──collate──▶ Pack

Names: a *sample* is what lies in a shard (the members of a key), a *document* is an encoded sample (or a
token range of a long text), a *pack* is one training sequence of whole documents. Everything before ``Sample`` is
metadata only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100
NO_CODE = -1
"""Stands where a position of a Talker's sequence has no codec side."""
MODALITIES = ("text", "audio", "image", "video", "video_audio")
"""The five sources of the S2 mixture. A document's modality is the richest media that it holds."""


@dataclass(slots=True)
class MediaFacts:
    """What the planner must know of one media member to count its tokens without opening it.

    ``kind`` is audio | image | video | codes | speech. Audio, and speech (an assistant's, in no Thinker's sequence):
    ``num_samples`` at ``sample_rate_hz`` (as stored). Image: ``width`` and ``height`` in pixels. Video: width, height,
    ``num_frames``, ``fps``; ``has_audio`` with num_samples of its sound.
    Codes (of a speech target, in no Thinker's sequence): ``num_frames``, and ``num_text_tokens`` of what the Talker
    reads before it speaks.
    """

    member: str
    kind: str
    width: int = 0
    height: int = 0
    num_frames: int = 0
    fps: float = 0.0
    num_samples: int = 0
    sample_rate_hz: int = 0
    has_audio: bool = False
    num_text_tokens: int = 0


@dataclass(slots=True)
class SampleFacts:
    """One line of a shard's index.

    ``offset`` and ``size`` are the byte range of the whole sample in the tar file (its headers included, a multiple of
    512). ``num_text_tokens`` counts every token of the rendered sample that is not a media placeholder; ``media`` lists
    its media members in the order in which they appear in the text, then its speech targets. ``is_text``: plain text,
    which may be cut where it is longer than a context; a conversation or media may not.
    """

    key: str
    offset: int
    size: int
    num_text_tokens: int
    media: list[MediaFacts] = field(default_factory=list)
    is_text: bool = False


@dataclass(slots=True)
class Sample:
    """One sample read from a shard, undecoded. ``members`` maps an extension ("json", "a.flac") to raw bytes.

    ``content`` is what they say by the layout of the source (see data/README.md): ``messages`` or ``text``, optional
    ``task, lang, speaker, license, talker_system, tools, pattern``.
    """

    source: str
    shard: str
    key: str
    content: dict[str, Any]
    members: dict[str, bytes]

    @property
    def id(self) -> str:
        return f"{self.source}/{self.shard}/{self.key}"


@dataclass(slots=True)
class BadSample:
    """A sample that is left out: it lies at byte ``offset`` of ``shard``, and ``error`` says what is wrong with it."""

    shard: str
    key: str
    offset: int
    error: str


@dataclass(slots=True)
class DocumentPlan:
    """Which document to read: sample number ``index`` of shard number ``shard`` of ``source``.

    ``start`` and ``stop`` cut a token range out of a text longer than the context (0 and num_tokens otherwise);
    ``num_tokens`` is exactly what the encoder will return.
    """

    source: str
    shard: int
    index: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class PackPlan:
    """The documents of one pack: the pack of ``lane`` number ``slot`` at global ``step``."""

    step: int
    lane: int
    slot: int
    documents: list[DocumentPlan]


@dataclass(slots=True)
class Speech:
    """A Talker's sequence of S = P + 9 + T positions: what comes before the reply, nine that open it, T frames.

    ``text_ids`` int64 [S]: the token whose embedding is projected at each position, placeholders where media are;
    ``codec_ids`` int64 [P + 9]: the codec token added to it, NO_CODE for none; ``position_ids`` int64 [3, S];
    ``media_index`` int64 [M]: where its media stand in the document's ``input_ids``; ``codes`` int64 [G, T] to predict;
    ``input_codes`` int64 [G, T] to read, the same but for noise; ``end_label``: what the last frame predicts.
    """

    text_ids: np.ndarray
    codec_ids: np.ndarray
    position_ids: np.ndarray
    media_index: np.ndarray
    codes: np.ndarray
    input_codes: np.ndarray
    end_label: int

    @property
    def num_tokens(self) -> int:
        return len(self.text_ids)

    @property
    def shift_labels(self) -> np.ndarray:
        """int64 [S]: the first code of the next frame, then the end; IGNORE_INDEX before the last opening position."""
        labels = np.full(self.num_tokens, IGNORE_INDEX)
        labels[len(self.codec_ids) - 1 :] = [*self.codes[0], self.end_label]
        return labels


@dataclass(slots=True)
class Document:
    """An encoded sample of L tokens.

    ``input_ids`` int64 [L]; ``labels`` int64 [L], unshifted (labels[i] is input_ids[i] or −100); ``position_ids`` int64
    [3, L] (temporal, height, width of TM-RoPE, from 0); ``mels`` one float32 [128, frames] a clip, in order of
    placeholders; ``patches`` one float32 [t*h*w, patch_dim] a picture or video with its ``grids`` (t, h, w) in patches;
    for each video the seconds that one of its t spans, and whether its sound stands between its tokens; ``waves`` one
    float32 [n] at 24 kHz a clip, for stages that learn from sound alone. ``speeches``: what is to be said, for a
    Talker: one target, or the chosen and the rejected one of a pair.
    """

    sample_id: str
    modality: str
    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    mels: list[np.ndarray] = field(default_factory=list)
    image_patches: list[np.ndarray] = field(default_factory=list)
    image_grids: list[tuple[int, int, int]] = field(default_factory=list)
    video_patches: list[np.ndarray] = field(default_factory=list)
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)
    video_seconds_per_grid: list[float] = field(default_factory=list)
    video_has_sound: list[bool] = field(default_factory=list)
    waves: list[np.ndarray] = field(default_factory=list)
    speeches: list[Speech] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """What it takes of a pack: the Talker's positions where there is speech, else its tokens."""
        return sum(speech.num_tokens for speech in self.speeches) or len(self.input_ids)


@dataclass(slots=True)
class SpeechPack:
    """The Talker's sequences of a pack as tensors, see Speech: S positions of Q sequences, N frames.

    ``text_ids``, ``codec_ids`` (the first code of each frame included) and ``shift_labels`` int64 [S]: the first code
    of the next frame or eos, IGNORE_INDEX before the reply; ``position_ids`` [4, S] and ``cu_seqlens`` int32 [Q+1] as
    in Pack; ``media_index`` [M] into the tokens of the pack; ``frame_index`` [N]: the position of each frame; ``codes``
    and ``input_codes`` [G, N]; ``code_lengths`` [Q] frames of each sequence; ``document`` [Q]: whose speech it is.
    """

    text_ids: torch.Tensor
    codec_ids: torch.Tensor
    shift_labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    media_index: torch.Tensor
    frame_index: torch.Tensor
    codes: torch.Tensor
    input_codes: torch.Tensor
    code_lengths: torch.Tensor
    document: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.text_ids.numel())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SpeechPack:
        """The same on ``device``."""
        return SpeechPack(*(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)))


@dataclass(slots=True)
class Prompt:
    """What is to be answered: all of a conversation before its last reply, as a document without labels.

    ``reference`` is that reply; ``question`` the last message before it, as text. ``plan`` says where the sample is,
    None for a dummy, which is answered like any other (collectives match) and then dropped. ``bad``: the sample, if it
    could not be decoded; the document is a dummy's then.
    """

    document: Document
    reference: str = ""
    question: str = ""
    plan: DocumentPlan | None = None
    place: tuple[str, str, int] = ("", "", 0)  # shard, key, byte offset
    bad: list[BadSample] = field(default_factory=list)


@dataclass(slots=True)
class Pack:
    """One training sequence of T tokens holding D whole documents, as tensors.

    ``input_ids`` [T]; ``shift_labels`` [T]: the label *of the next token* of the same document, −100 at its last
    position and where no loss is wanted; ``position_ids`` [4, T]: row 0 counts from 0 in each document, rows 1–3 are
    TM-RoPE;
    ``cu_seqlens`` int32 [D+1]; ``doc_modality`` int64 [D], index into MODALITIES. Media of all documents in order of
    their placeholders: ``mel`` float32 [128, F] concatenated over clips with ``mel_lengths`` int64 [clips];
    ``audio_window_sec`` int64 [clips]; ``pixel_values`` [patches, patch_dim] with ``image_grid_thw`` int64 [n, 3] and
    the same for video; ``waves`` float32 [clips, n] at 24 kHz, each followed by zeros to a whole codec frame at least,
    with ``wave_lengths`` int64 [clips]. Empty tensors (0 rows), never None, where a pack has none. ``sample_ids``
    names its documents; it is empty for a dummy, which counts for nothing. ``bad_samples``: those of its plan that
    could not be decoded and were left out. ``speech``: the sequences of a Talker's stage, None in others.

    Rollouts only: ``sampled_log_probabilities`` float32 [T], in nats, of the token that shift_labels names when it was
    sampled; ``advantages`` float32 [D]; ``statistics``, metrics by name, each float64 [2], sum and count.
    """

    input_ids: torch.Tensor
    shift_labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    doc_modality: torch.Tensor
    mel: torch.Tensor
    mel_lengths: torch.Tensor
    audio_window_sec: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    pixel_values_videos: torch.Tensor
    video_grid_thw: torch.Tensor
    waves: torch.Tensor
    wave_lengths: torch.Tensor
    sample_ids: list[str]
    bad_samples: list[BadSample] = field(default_factory=list)
    speech: SpeechPack | None = None
    sampled_log_probabilities: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """What it counts in a stage's budget: the Talker's positions where there is speech, else its tokens."""
        return int(self.input_ids.numel()) if self.speech is None else self.speech.num_tokens

    def to(self, device: torch.device | str) -> Pack:
        """The same pack with its tensors on ``device``."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        movable = (torch.Tensor, SpeechPack)
        for name, value in values.items():
            if isinstance(value, movable):
                values[name] = value.to(device, non_blocking=True)
        return Pack(**values)
