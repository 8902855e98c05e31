"""Spoken clips: the voices of each split and the espeak-ng synthesiser.

    Clip | Recording ──espeak-ng (22,050 Hz)──▶ trimmed ──soxr──▶ 16 kHz, peak ≤ 0.9 ──▶ FLAC bytes
    Reply            ──the same at 24 kHz, the rate of a codec

espeak-ng keeps hidden state from one utterance to the next (its jitter), which no call resets. A clip is therefore
reproducible only as the n-th utterance of a fresh process: one process makes one shard, in order, and ends.
"""

from __future__ import annotations

import ctypes
import functools
import io
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

SAMPLE_RATE_HZ = 16_000
REPLY_SAMPLE_RATE_HZ = 24_000
MAX_CLIP_SEC = 2.5
MIN_LONG_SEC, MAX_LONG_SEC = 10.0, 16.0
MIN_PAUSE_SEC = 0.18

ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en")
OTHER_LANGS = ("de", "es", "fr", "it", "pt")

# Variants of espeak-ng. Left out: whispers, robots, and near copies of one below (aunty = f4, klatt6 = adam = Reed,
# miguel = michel, Henrique = Hugo = Diogo, gustave = Michael, Nguyen = m7, steph2 = steph).
FEMALE = frozenset(
    ("f1", "f2", "f3", "f4", "f5", "Alicia", "Andrea", "Annie", "anika", "belinda", "grandma", "linda", "steph")
)
MALE = frozenset(("m1", "m2", "m3", "m4", "m6", "m7", "m8", "Andy", "Diogo", "Marco", "antonio", "michel", "victor"))
VARIANTS = {
    "train": (
        *("f1", "f2", "f3", "Alicia", "Andrea", "linda", "grandma", "anika", "shelby"),
        *(
            "m1",
            "m3",
            "m4",
            "m7",
            "m8",
            "Andy",
            "Diogo",
            "Gene",
            "Marco",
            "ed",
            "john",
            "max",
            "klatt3",
            "Reed",
            "pablo",
        ),
    ),
    "validation": ("f4", "m6", "Annie", "antonio"),
    "heldout": ("f5", "m2", "belinda", "michel", "steph", "victor"),
}


@dataclass(frozen=True, slots=True)
class Clip:
    """A short utterance: at most 2.5 s. ``rate_wpm`` words a minute, ``pitch`` 0–100, ``peak`` of 1.0.

    ``noise`` is the standard deviation of white noise relative to the peak, drawn from ``seed``.
    """

    text: str
    voice: str
    rate_wpm: int
    pitch: int
    peak: float
    noise: float
    seed: int


@dataclass(frozen=True, slots=True)
class Recording:
    """``utterances`` in one voice, with pauses that make them ``target_sec`` long (10–16 s)."""

    utterances: tuple[str, ...]
    target_sec: float
    clip: Clip


SPEAKERS = {  # voice, pitch, words a minute
    "anna": ("en-us+f2", 55, 165),
    "ben": ("en-us+m3", 45, 160),
    "clara": ("en-gb-x-rp+linda", 60, 160),
    "david": ("en-us+Andy", 40, 165),
}
"""Named voices that replies are spoken in; every split has the same."""
NEW_SPEAKERS = {"emma": ("en-us+Alicia", 62, 165)}
"""For fine-tuning to a voice that nothing before has heard."""


@dataclass(frozen=True, slots=True)
class Reply:
    """``text`` as a named speaker of SPEAKERS or NEW_SPEAKERS says it: always the same way, without noise."""

    text: str
    speaker: str


def english_voices(split: str) -> tuple[str, ...]:
    """Voices of a split, "accent+variant". A variant belongs to one split; in train each speaks with two accents."""
    variants, num_accents = VARIANTS[split], len(ACCENTS)
    first = [f"{ACCENTS[i % num_accents]}+{variant}" for i, variant in enumerate(variants)]
    if split != "train":
        return tuple(first)
    return (*first, *(f"{ACCENTS[(i + 3) % num_accents]}+{variant}" for i, variant in enumerate(variants)))


def gender(voice: str) -> str | None:
    """ "woman", "man", or None where the variant does not say."""
    variant = voice.partition("+")[2]
    return "woman" if variant in FEMALE else "man" if variant in MALE else None


class Espeak:
    """libespeak-ng through ctypes. One instance a process: the library's state is global."""

    AUDIO_OUTPUT_SYNCHRONOUS, CHARS_UTF8, RATE, PITCH = 2, 1, 1, 3

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError("the corpus needs espeakng_loader: pip install 'omni-train[corpus]'") from error
        self.chunks: list[bytes] = []
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(self._collect)
        data_path = espeakng_loader.get_data_path().encode()
        self.sample_rate_hz = self.library.espeak_Initialize(self.AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"espeak_Initialize failed with {self.sample_rate_hz} on {data_path!r}")
        self.library.espeak_SetSynthCallback(self.callback)
        # NOTE: breath noise (f2, f3, f5, Alicia, Reed, victor) is drawn from a generator seeded by the clock at start.
        self.library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self.library.espeak_ng_SetRandSeed(1)

    def _collect(self, wave: int | None, num_samples: int, _events: int | None) -> int:
        if wave and num_samples > 0:
            self.chunks.append(ctypes.string_at(wave, 2 * num_samples))
        return 0

    def speak(self, text: str, voice: str, rate_wpm: int, pitch: int) -> np.ndarray:
        """float32 [samples] in −1…1 at ``sample_rate_hz``. Raises ValueError for an unknown voice."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}; see its lang/ and voices/!v folders")
        self.library.espeak_SetParameter(self.RATE, rate_wpm, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        self.chunks.clear()
        encoded = text.encode()
        self.library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, self.CHARS_UTF8, None, None)
        return np.frombuffer(b"".join(self.chunks), np.int16).astype(np.float32) / 32768


@functools.cache
def _espeak() -> Espeak:
    return Espeak()


def trim_silence(wave: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """``wave`` without what lies under 1 % of its peak at either end, but for 20 ms."""
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    margin = sample_rate_hz // 50
    return wave[max(0, loud[0] - margin) : loud[-1] + margin]


def _utterance(text: str, voice: str, rate_wpm: int, pitch: int, sample_rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """float32 [samples], peak 1, trimmed. Raises ValueError if it is silent."""
    espeak = _espeak()
    wave = espeak.speak(text, voice, rate_wpm, pitch)
    if wave.size == 0 or np.abs(wave).max() < 0.01:
        raise ValueError(f"espeak-ng says nothing for {text!r} in voice {voice!r}")
    wave = soxr.resample(trim_silence(wave, espeak.sample_rate_hz), espeak.sample_rate_hz, sample_rate_hz)
    return wave / np.abs(wave).max()


def _mixed(wave: np.ndarray, clip: Clip) -> np.ndarray:
    noise = np.random.default_rng(clip.seed).standard_normal(wave.size, dtype=np.float32) * clip.noise
    return clip.peak * (wave + noise) / max(1.0, float(np.abs(wave + noise).max()))


def _flac(wave: np.ndarray, sample_rate_hz: int = SAMPLE_RATE_HZ) -> tuple[bytes, float]:
    file = io.BytesIO()
    soundfile.write(file, wave, sample_rate_hz, format="FLAC", subtype="PCM_16")
    return file.getvalue(), wave.size / sample_rate_hz


def synthesise_clip(clip: Clip) -> tuple[bytes, float]:
    """FLAC bytes and seconds."""
    return _flac(wave_of(clip))


def synthesise_reply(reply: Reply) -> tuple[bytes, float]:
    """FLAC bytes at 24 kHz and seconds."""
    voice, pitch, rate_wpm = (SPEAKERS | NEW_SPEAKERS)[reply.speaker]
    wave = 0.8 * _utterance(reply.text, voice, rate_wpm, pitch, REPLY_SAMPLE_RATE_HZ)
    return _flac(wave, REPLY_SAMPLE_RATE_HZ)


def wave_of(clip: Clip) -> np.ndarray:
    """float32 [samples] at 16 kHz. Slow voices are asked to speak faster until the clip is at most 2.5 s long."""
    for rate_wpm in range(clip.rate_wpm, 400, 25):
        wave = _utterance(clip.text, clip.voice, rate_wpm, clip.pitch)
        if wave.size <= MAX_CLIP_SEC * SAMPLE_RATE_HZ:
            return _mixed(wave, clip)
    raise ValueError(f"{clip.text!r} is longer than {MAX_CLIP_SEC} s in voice {clip.voice!r} at any rate")


def synthesise_recording(recording: Recording) -> tuple[bytes, float]:
    """FLAC bytes and seconds of the utterances with equal pauses between them; slow voices speak faster to fit."""
    clip = recording.clip
    num_pauses = len(recording.utterances) - 1
    for rate_wpm in range(clip.rate_wpm, 400, 25):
        parts = [_utterance(text, clip.voice, rate_wpm, clip.pitch) for text in recording.utterances]
        spoken_sec = sum(part.size for part in parts) / SAMPLE_RATE_HZ
        if spoken_sec + num_pauses * MIN_PAUSE_SEC < MAX_LONG_SEC:
            break
    pause_sec = max(MIN_PAUSE_SEC, (recording.target_sec - spoken_sec) / num_pauses)
    pause = np.zeros(round(pause_sec * SAMPLE_RATE_HZ), np.float32)
    wave = np.concatenate([piece for part in parts for piece in (part, pause)][:-1])
    seconds = wave.size / SAMPLE_RATE_HZ
    assert MIN_LONG_SEC <= seconds <= MAX_LONG_SEC, f"a recording of {seconds:.2f} s"
    return _flac(_mixed(wave, clip))
