"""Samples → documents → packs: the last step of the data layer.

Sample ──Encoder.encode──▶ Document (ids, labels, positions, features) ──collate──▶ Pack (tensors of one sequence)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from omni_train.data.audio import decode_audio, log_mel
from omni_train.data.chatml import (
    Piece,
    check_members,
    final_answer,
    modality_of,
    render,
    tokenize,
)
from omni_train.data.contracts import (
    IGNORE_INDEX,
    MODALITIES,
    NO_CODE,
    Document,
    Pack,
    Sample,
    SampleFacts,
    Speech,
    SpeechPack,
)
from omni_train.data.image import decode_image, patchify
from omni_train.data.media_tokens import (
    NUM_MELS,
    SAMPLES_PER_CODEC_FRAME,
    MediaGeometry,
    audio_num_tokens,
    codec_num_frames,
    grid_num_tokens,
    media_num_tokens,
)
from omni_train.data.positions import audio_video_order, tm_rope_positions, video_token_times
from omni_train.data.talker_sequence import NUM_OPENING, SpeechFormat, read_codes, system_tokens, talker_sequence
from omni_train.data.tokenizer import TokenIds, token_ids
from omni_train.data.video import decode_video

DEFAULT_AUDIO_WINDOW_SEC = 8
"""The audio encoder's attention window at inference (``n_window_infer`` 800 mel frames)."""


class RangeError(ValueError):
    """The token range asked for is none of the document's: the index is not of this sample."""


class Encoder:
    """Turns samples into documents. Picklable, without state that changes: one serves any number of workers.

    ``speech``: that of a Talker's stage, whose documents hold speech targets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        geometry: MediaGeometry,
        loss_on: str = "assistant",
        speech: SpeechFormat | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.speech = speech
        self.loss_on = getattr(loss_on, "value", loss_on)
        self.ids: TokenIds = token_ids(tokenizer)
        render({"text": ""}, self.loss_on)  # refuses an unknown loss_on here, not in a worker

    @property
    def patch_dim(self) -> int:
        """Width of ``pixel_values``."""
        return self.geometry.patch_dim

    def num_tokens(self, facts: SampleFacts) -> int:
        """What the sample's whole document takes of a pack, from its index line."""
        num_media = sum(media_num_tokens(media, self.geometry) for media in facts.media)
        if self.speech is not None:
            targets = [media for media in facts.media if media.member in self.speech.members]
            if targets:
                return sum(num_media + media.num_text_tokens + NUM_OPENING + media.num_frames for media in targets)
        return facts.num_text_tokens + num_media

    def is_splittable(self, facts: SampleFacts) -> bool:
        """Whether a sample longer than the context is cut: plain text is; a conversation and what has media are not."""
        return facts.is_text

    def encode(self, sample: Sample, start: int = 0, stop: int | None = None) -> Document:
        """The document of a sample, or tokens ``start`` to ``stop`` of a text without media, as a document of its own.

        Labels are unshifted; the first token never is one. Raises ValueError naming the sample, RangeError for a range
        that it does not have.
        """
        try:
            document = self._encode(sample.id, sample.content, sample.members)
            if self.speech is not None:
                document.speeches = self._speeches(document, sample, self.speech)
            return _cut(document, start, document.num_tokens if stop is None else stop)
        except ValueError as error:
            kind = RangeError if isinstance(error, RangeError) else ValueError
            raise kind(f"sample {sample.id}: {error}") from error

    def prompt_and_answer(self, sample: Sample) -> tuple[Document, str]:
        """(prompt, reference) for evaluation by generation.

        The prompt is all that stands before the last assistant message and ends in ``<|im_start|>assistant\\n``,
        without labels; the reference is that message's text after its reasoning. Raises ValueError for a sample
        without an assistant message.
        """
        try:
            messages = sample.content.get("messages", [])
            replies = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
            if not replies:
                raise ValueError("it has no assistant message to compare with")
            reply = messages[replies[-1]].get("content")
            if not isinstance(reply, str):
                reply = "".join(part["text"] for part in reply or [] if part["type"] == "text")
            content = {**sample.content, "messages": messages[: replies[-1]]}
            if not content["messages"]:
                raise ValueError("nothing stands before its assistant message")
            prompt = self._encode(sample.id, content, sample.members, add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error
        return dataclasses.replace(prompt, labels=np.full_like(prompt.labels, IGNORE_INDEX)), final_answer(reply)

    def dummy(self) -> Pack:
        """A pack without samples, for a rank that has none."""
        return dummy_pack(self.geometry, self.ids, self.speech)

    def _encode(
        self,
        sample_id: str,
        content: dict[str, Any],
        members: dict[str, bytes],
        add_generation_prompt: bool = False,
    ) -> Document:
        pieces = render(content, self.loss_on, add_generation_prompt)
        check_members(content, members)
        document = Document(
            sample_id=sample_id,
            modality=modality_of(content),
            input_ids=np.empty(0, np.int64),
            labels=np.empty(0, np.int64),
            position_ids=np.empty((3, 0), np.int64),
        )
        ids: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for piece in pieces:
            tokens = tokenize(piece.text, self.tokenizer)
            if piece.media is not None:
                begin, _, end = tokens
                tokens = [begin, *self._expand(piece, members, document), end]
            piece_ids = np.asarray(tokens, dtype=np.int64)
            ids.append(piece_ids)
            labels.append(piece_ids if piece.has_loss else np.full_like(piece_ids, IGNORE_INDEX))
        document.input_ids, document.labels = np.concatenate(ids), np.concatenate(labels)
        document.labels[0] = IGNORE_INDEX
        document.position_ids = tm_rope_positions(
            document.input_ids,
            self.ids,
            audio_num_tokens=[audio_num_tokens(mel.shape[1]) for mel in document.mels],
            image_grids=document.image_grids,
            video_grids=document.video_grids,
            seconds_per_grid=document.video_seconds_per_grid,
            use_audio_in_video=document.video_has_sound,
            geometry=self.geometry,
        )
        return document

    def _speeches(self, document: Document, sample: Sample, format: SpeechFormat) -> list[Speech]:
        """The Talker's sequences of the sample's speech targets."""
        if "messages" not in sample.content:
            raise ValueError(
                "it has no messages; a Talker's stage needs a conversation and the codes of its last reply"
            )
        system = system_tokens(sample.content.get("talker_system", ""), self.tokenizer)
        found = []
        for name in format.members:
            if name not in sample.members:
                raise ValueError(f"it has no member {name!r}, its speech; make codes with `omni-train data codes`")
            try:
                codes, speaker = read_codes(sample.members[name]), sample.content.get("speaker")
                found.append(talker_sequence(document, system, codes, speaker, format, self.geometry))
            except ValueError as error:
                raise ValueError(f"member {name!r}: {error}") from error
        return found

    def _expand(self, piece: Piece, members: dict[str, bytes], document: Document) -> list[int]:
        """What takes the place of the piece's placeholder; the features are added to ``document``."""
        data = members[str(piece.media)]
        try:
            if piece.kind == "audio":
                return self._hear(decode_audio(data), document)
            if piece.kind == "image":
                patches, grid = patchify(decode_image(data), self.geometry)
                document.image_patches.append(patches)
                document.image_grids.append(grid)
                return [self.ids.image_pad] * grid_num_tokens(grid, self.geometry)
            return self._watch(data, piece.kind == "video_audio", document)
        except ValueError as error:
            raise ValueError(f"member {piece.media!r}: {error}") from error

    def _hear(self, wave: np.ndarray, document: Document) -> list[int]:
        mel = log_mel(wave)
        document.mels.append(mel)
        return [self.ids.audio_pad] * audio_num_tokens(mel.shape[1])

    def _watch(self, data: bytes, has_sound: bool, document: Document) -> list[int]:
        """Video tokens, with its sound's between them in order of time if that is heard."""
        video = decode_video(data, self.geometry, has_sound)
        document.video_patches.append(video.patches)
        document.video_grids.append(video.grid)
        document.video_seconds_per_grid.append(video.seconds_per_grid)
        document.video_has_sound.append(has_sound)
        seen = [self.ids.video_pad] * grid_num_tokens(video.grid, self.geometry)
        if video.wave is None:
            return seen
        heard = self._hear(video.wave, document)
        times = video_token_times(video.grid, video.seconds_per_grid, self.geometry)
        both = np.array([*seen, *heard])[audio_video_order(times, len(heard))]
        return [self.ids.audio_start, *both.tolist(), self.ids.audio_end]


def _cut(document: Document, start: int, stop: int) -> Document:
    """Tokens start … stop of a text document, positions from 0 again."""
    if (start, stop) == (0, document.num_tokens):
        return document
    if not 0 <= start < stop <= document.num_tokens:
        raise RangeError(
            f"token range {start}–{stop} does not lie in its {document.num_tokens} tokens; rebuild the index"
        )
    if document.modality != "text":
        raise RangeError(f"token range {start}–{stop} would cut a document with {document.modality}; only text is cut")
    labels = document.labels[start:stop].copy()
    labels[0] = IGNORE_INDEX
    return dataclasses.replace(
        document,
        input_ids=document.input_ids[start:stop],
        labels=labels,
        position_ids=document.position_ids[:, : stop - start],
    )


def collate(
    documents: Sequence[Document], audio_window_sec: Sequence[int] | None = None, patch_dim: int = 1536
) -> Pack:
    """The pack of ``documents`` in this order.

    ``audio_window_sec`` has one entry a clip (8 s each if not given). ``patch_dim`` is the width of ``pixel_values``
    where no document has a picture. Raises ValueError if there is no document, or windows and clips disagree in
    number.
    """
    if not documents:
        raise ValueError("a pack needs at least one document; use dummy_pack for a rank without data")
    mels = [mel for document in documents for mel in document.mels]
    if audio_window_sec is None:
        audio_window_sec = [DEFAULT_AUDIO_WINDOW_SEC] * len(mels)
    if len(audio_window_sec) != len(mels):
        raise ValueError(f"{len(audio_window_sec)} audio windows are given for {len(mels)} clips")
    lengths = [len(document.input_ids) for document in documents]
    position_ids = [_with_index(document.position_ids) for document in documents]
    images = [patches for document in documents for patches in document.image_patches]
    videos = [patches for document in documents for patches in document.video_patches]
    return Pack(
        input_ids=torch.from_numpy(np.concatenate([document.input_ids for document in documents])),
        shift_labels=torch.from_numpy(np.concatenate([shift_labels(document.labels) for document in documents])),
        position_ids=torch.from_numpy(np.concatenate(position_ids, axis=1)),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        doc_modality=torch.tensor([MODALITIES.index(document.modality) for document in documents]),
        mel=_joined(mels, axis=1, empty=(NUM_MELS, 0)),
        mel_lengths=torch.tensor([mel.shape[1] for mel in mels], dtype=torch.int64),
        audio_window_sec=torch.tensor(audio_window_sec, dtype=torch.int64),
        pixel_values=_joined(images, axis=0, empty=(0, patch_dim)),
        image_grid_thw=_grids([grid for document in documents for grid in document.image_grids]),
        pixel_values_videos=_joined(videos, axis=0, empty=(0, patch_dim)),
        video_grid_thw=_grids([grid for document in documents for grid in document.video_grids]),
        **padded_waves([wave for document in documents for wave in document.waves]),
        sample_ids=[document.sample_id for document in documents],
        speech=_speech_pack(documents) if any(document.speeches for document in documents) else None,
    )


def _with_index(position_ids: np.ndarray) -> np.ndarray:
    """Position ids [4, L] from [3, L]: the row that transformers tells documents apart by comes first."""
    return np.vstack([np.arange(position_ids.shape[1]), position_ids])


def _speech_pack(documents: Sequence[Document]) -> SpeechPack:
    """The Talker's sequences of all documents, one after the other."""
    speeches = [speech for document in documents for speech in document.speeches]
    owner = [number for number, document in enumerate(documents) for _ in document.speeches]
    starts = np.cumsum([0, *(len(document.input_ids) for document in documents)])
    ends = np.cumsum([speech.num_tokens for speech in speeches])
    lengths = [speech.codes.shape[1] for speech in speeches]
    frames = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return SpeechPack(
        text_ids=torch.from_numpy(np.concatenate([speech.text_ids for speech in speeches])),
        codec_ids=torch.from_numpy(np.concatenate([[*s.codec_ids, *s.input_codes[0]] for s in speeches])),
        shift_labels=torch.from_numpy(np.concatenate([speech.shift_labels for speech in speeches])),
        position_ids=torch.from_numpy(np.concatenate([_with_index(s.position_ids) for s in speeches], axis=1)),
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        media_index=torch.from_numpy(
            np.concatenate([speech.media_index + starts[n] for n, speech in zip(owner, speeches, strict=True)])
        ),
        frame_index=torch.from_numpy(np.concatenate(frames)),
        codes=torch.from_numpy(np.concatenate([speech.codes for speech in speeches], axis=1)),
        input_codes=torch.from_numpy(np.concatenate([speech.input_codes for speech in speeches], axis=1)),
        code_lengths=torch.tensor(lengths),
        document=torch.tensor(owner),
    )


def shift_labels(labels: np.ndarray) -> np.ndarray:
    """labels[i + 1] at i, −100 at the last position: what the logits at i are compared with."""
    return np.append(labels[1:], IGNORE_INDEX)


def dummy_document(ids: TokenIds) -> Document:
    """The smallest document: two text tokens, no media, no label."""
    tokens = np.full(2, ids.endoftext, dtype=np.int64)
    return Document(
        sample_id="dummy",
        modality="text",
        input_ids=tokens,
        labels=np.full(2, IGNORE_INDEX, dtype=np.int64),
        position_ids=np.tile(np.arange(2), (3, 1)),
    )


def dummy_pack(geometry: MediaGeometry, ids: TokenIds, speech: SpeechFormat | None = None) -> Pack:
    """The smallest pack: a dummy document, no sample ids (which is what marks it). For ranks without data, so that
    collectives still match. In a Talker's stage it has one frame for each target."""
    document = dummy_document(ids)
    if speech is not None:
        frame, tokens = np.zeros((speech.talker.num_code_groups, 1), dtype=np.int64), document.input_ids
        silence = Speech(tokens, np.array([NO_CODE]), document.position_ids, np.empty(0, np.int64), frame, frame, -100)
        document.speeches = [silence] * len(speech.members)
    return dataclasses.replace(collate([document], patch_dim=geometry.patch_dim), sample_ids=[])


def _joined(arrays: list[np.ndarray], axis: int, empty: tuple[int, int]) -> torch.Tensor:
    if not arrays:
        return torch.zeros(empty, dtype=torch.float32)
    return torch.from_numpy(np.concatenate(arrays, axis=axis))


def padded_waves(waves: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """``waves`` [clips, n], n whole codec frames, and ``wave_lengths`` of a pack."""
    num_frames = max((codec_num_frames(len(wave)) for wave in waves), default=0)
    padded = np.zeros((len(waves), num_frames * SAMPLES_PER_CODEC_FRAME), np.float32)
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = wave
    lengths = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    return {"waves": torch.from_numpy(padded), "wave_lengths": lengths}


def _grids(grids: list[tuple[int, int, int]]) -> torch.Tensor:
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
