"""Samples → waves for the codec: every clip of a sample at 24 kHz, a token is a codec frame of 80 ms.

The counterpart of ``encode`` for stages that learn from sound alone. A clip ends in the middle of its last frame; a
recording longer than the context is cut at whole frames.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from omni_train.data.audio import decode_audio, log_mel
from omni_train.data.contracts import IGNORE_INDEX, Document, Pack, Sample, SampleFacts
from omni_train.data.encode import RangeError, collate
from omni_train.data.media_tokens import CODEC_SAMPLE_RATE_HZ, SAMPLES_PER_CODEC_FRAME, codec_num_frames

MELS_PER_CODEC_FRAME = 8
"""AuT's mel frames of 10 ms in a codec frame."""


class SpeechEncoder:
    """Turns samples into documents of codec frames. Picklable, without state.

    ``with_mels`` adds what AuT hears of each piece: 16 kHz log-mel, 8 frames a codec frame.
    """

    patch_dim = 1  # no pictures

    def __init__(self, with_mels: bool = False) -> None:
        self.with_mels = with_mels

    def is_splittable(self, facts: SampleFacts) -> bool:
        """Recordings are cut at whole frames."""
        return True

    def num_tokens(self, facts: SampleFacts) -> int:
        """Codec frames of the sample's clips. Raises ValueError for a sample without one."""
        clips = [media for media in facts.media if media.kind in ("audio", "speech")]
        if not clips:
            raise ValueError(f"sample {facts.key} has no audio; a codec stage takes sources of sound only")
        return sum(codec_num_frames(clip.num_samples, clip.sample_rate_hz) for clip in clips)

    def encode(self, sample: Sample, start: int = 0, stop: int | None = None) -> Document:
        """Frames ``start`` to ``stop`` of the sample's clips, one after another; ``waves`` holds a piece for each clip.

        Raises ValueError naming the sample, RangeError for a range that it does not have.
        """
        names = audio_members(sample)
        try:
            waves = [decode_audio(sample.members[name], CODEC_SAMPLE_RATE_HZ) for name in names]
        except (ValueError, KeyError) as error:
            raise ValueError(f"sample {sample.id}: {error}") from error
        total = sum(codec_num_frames(len(wave)) for wave in waves)
        stop = total if stop is None else stop
        if not 0 <= start < stop <= total:
            raise RangeError(f"sample {sample.id}: frames {start}–{stop} do not lie in its {total}; rebuild the index")
        document = document_of(sample.id, list(_cut(waves, SAMPLES_PER_CODEC_FRAME, start, stop)), stop - start)
        if self.with_mels:
            mels = [self._mel(sample.members[name], wave) for name, wave in zip(names, waves, strict=True)]
            document.mels = list(_cut(mels, MELS_PER_CODEC_FRAME, start, stop))
        return document

    @staticmethod
    def _mel(data: bytes, wave: np.ndarray) -> np.ndarray:
        """[128, 8 a codec frame]: the last mel frame goes on to the end of the clip's last codec frame."""
        mel = log_mel(decode_audio(data))
        missing = codec_num_frames(len(wave)) * MELS_PER_CODEC_FRAME - mel.shape[1]
        return np.pad(mel, ((0, 0), (0, missing)), mode="edge")

    def dummy(self) -> Pack:
        """A pack without sound, for a rank that has none."""
        pack = collate([document_of("dummy", [], 1)])
        pack.sample_ids = []
        return pack


def audio_members(sample: Sample) -> list[str]:
    """Names of the clips of a sample in the order of its messages."""
    messages = sample.content.get("messages", [])
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part["audio"] for parts in contents for part in parts if part.get("type") == "audio"]


def document_of(sample_id: str, waves: list[np.ndarray], num_frames: int) -> Document:
    """A document of so many frames, all its tokens placeholders without label."""
    return Document(
        sample_id=sample_id,
        modality="audio",
        input_ids=np.zeros(num_frames, np.int64),
        labels=np.full(num_frames, IGNORE_INDEX),
        position_ids=np.tile(np.arange(num_frames), (3, 1)),
        waves=waves,
    )


def _cut(clips: list[np.ndarray], per_frame: int, start: int, stop: int) -> Iterator[np.ndarray]:
    """The pieces of the clips [..., n], ``per_frame`` values a codec frame, that lie in frames ``start`` to ``stop`` of
    all of them in a row."""
    before = 0
    for clip in clips:
        frames = -(-clip.shape[-1] // per_frame)
        first, last = max(start - before, 0), min(stop - before, frames)
        if first < last:
            yield clip[..., first * per_frame : last * per_frame]
        before += frames
