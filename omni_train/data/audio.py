"""Audio: bytes → mono 16 kHz wave → log-mel frames, equal to what stock Qwen3-Omni is fed.

The mel follows `transformers` ``WhisperFeatureExtractor(feature_size=128)`` on one clip without padding: frames of 25
ms every 10 ms, ``n // 160`` of them for n samples (a rest under 10 ms is heard by the last frames but makes none of
its own).
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import soundfile
import soxr
import torch
from transformers.audio_utils import mel_filter_bank

from omni_train.data.contracts import MediaFacts
from omni_train.data.media_tokens import HOP, MIN_SAMPLES, NUM_MELS, SAMPLE_RATE_HZ, resampled_num_samples

MAX_SEC = 24 * 3600
"""Longest clip: a header that says more is damaged, and reading it would ask for the memory."""
_FFT = 400
_STREAMED_SIZES = (0, 0xFFFFFFFF)
"""What writers that cannot seek leave in a WAV header for its size."""


def audio_facts(member: str, data: bytes) -> MediaFacts:
    """Length and rate of a sound file, from its header only. Raises ValueError if it cannot be read, is too short or
    long, or a WAV that ends before its data does."""
    with _open(data) as file:
        num_samples, sample_rate_hz = file.frames, file.samplerate
    _check_length(num_samples, sample_rate_hz)
    return MediaFacts(member=member, kind="audio", num_samples=num_samples, sample_rate_hz=sample_rate_hz)


def decode_audio(data: bytes, target_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """The wave of a sound file: float32 [n], mono (mean over channels), at ``target_hz`` (soxr HQ).

    n is exactly ``resampled_num_samples`` of the header's facts. Raises ValueError for what is unreadable, cut short,
    shorter than 12.6 ms, longer than a day, or holds NaN or infinity. Silence is fine.
    """
    with _open(data) as file:
        num_samples, sample_rate_hz = file.frames, file.samplerate
        _check_length(num_samples, sample_rate_hz)
        try:
            wave = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"cannot decode audio: {error}") from error
    if len(wave) != num_samples:
        raise ValueError(f"audio is cut short: its header says {num_samples:,} samples, {len(wave):,} were decoded")
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1, dtype=np.float32)
    if not np.isfinite(wave).all():
        raise ValueError("audio holds NaN or infinite samples")
    if sample_rate_hz == target_hz:
        return np.ascontiguousarray(wave)
    wave = soxr.resample(wave, sample_rate_hz, target_hz, quality="HQ")
    expected = resampled_num_samples(num_samples, sample_rate_hz, target_hz)
    # The planner counted on this length; soxr gives it, and a change there must not shift a pack.
    return np.pad(wave, (0, max(0, expected - len(wave))))[:expected].astype(np.float32, copy=False)


def _open(data: bytes) -> soundfile.SoundFile:
    if not data:
        raise ValueError("audio is empty (0 bytes)")
    _check_wav_is_whole(data)
    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot read audio of {len(data):,} bytes: {error}; use flac, wav, mp3 or ogg") from error


def _check_wav_is_whole(data: bytes) -> None:
    """Raises ValueError for a WAV whose samples end before its header says. libsndfile would take what is there."""
    at = 12
    while data[:4] == b"RIFF" and data[8:12] == b"WAVE" and at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        left = len(data) - at - 8
        if data[at : at + 4] == b"data":
            if size > left and size not in _STREAMED_SIZES:
                raise ValueError(f"audio is cut short: its header says {size:,} bytes of samples, {left:,} are left")
            return
        at += 8 + size + size % 2


def _check_length(num_samples: int, sample_rate_hz: int) -> None:
    if num_samples > MAX_SEC * sample_rate_hz:
        raise ValueError(f"audio of {num_samples:,} samples at {sample_rate_hz:,} Hz is longer than a day; split it")
    if resampled_num_samples(num_samples, sample_rate_hz) < MIN_SAMPLES:
        raise ValueError(
            f"audio of {num_samples} samples at {sample_rate_hz:,} Hz is too short: at least "
            f"{1000 * MIN_SAMPLES / SAMPLE_RATE_HZ:.1f} ms are needed"
        )


@lru_cache(maxsize=1)
def _mel_filters() -> torch.Tensor:
    """Slaney mel filters, float32 [128, 201]."""
    filters = mel_filter_bank(
        num_frequency_bins=1 + _FFT // 2,
        num_mel_filters=NUM_MELS,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).to(torch.float32).T


@lru_cache(maxsize=1)
def _window() -> torch.Tensor:
    return torch.hann_window(_FFT)


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Log-mel features of a 16 kHz wave [n]: float32 [128, n // 160], scaled to about −1 … 1 as Whisper does.

    log10 of the mel power, floored 8 below the clip's own maximum, then (x + 4) / 4. Raises ValueError if n < 201 or a
    sample is not finite.
    """
    if len(wave) < MIN_SAMPLES:
        raise ValueError(
            f"a wave of {len(wave)} samples is too short for one spectrum; at least {MIN_SAMPLES} are needed"
        )
    samples = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))[None]
    stft = torch.stft(samples, _FFT, HOP, window=_window(), return_complex=True)
    # NOTE: the same operations in the same order as upstream: the parity test holds bit for bit.
    power = (stft[..., :-1].abs() ** 2).contiguous()
    log_spec = torch.clamp(_mel_filters() @ power, min=1e-10).log10()[0]
    maximum = log_spec.max()
    if not torch.isfinite(maximum):
        raise ValueError("audio holds NaN or infinite samples")
    return ((torch.maximum(log_spec, maximum - 8.0) + 4.0) / 4.0).numpy()
