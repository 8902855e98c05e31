"""Small media for tests: mp4 files of which it is known exactly what is shown when, and a sample of noise."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import soundfile

from omni_train.data.contracts import Sample

TICKS = Fraction(1000)  # a second


def grey(number: int, size: tuple[int, int]) -> np.ndarray:
    """Frame ``number`` uint8 [height, width, 3] in one grey, 20 + 10 n (mod 230)."""
    return np.full((size[1], size[0], 3), 20 + 10 * number % 230, np.uint8)


def noise(number: int, size: tuple[int, int]) -> np.ndarray:
    """Frame ``number`` uint8 [height, width, 3] of coarse coloured noise, different in each frame."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (-(-size[1] // 4), -(-size[0] // 4), 3), dtype=np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[: size[1], : size[0]]


def video(
    times: list[float],
    tones: int = 0,
    size: tuple[int, int] = (64, 48),
    seconds: float | None = None,
    picture: Callable[[int, tuple[int, int]], np.ndarray] = grey,
    ticks: Fraction = TICKS,
    sound_from: float = 0.0,
    kind: str = "mp4",
) -> bytes:
    """A film of ``size`` (width, height) with ``tones`` samples of sound from ``sound_from`` seconds on; frame n is
    shown from ``times[n]`` on, the last one until ``seconds``. Times are stored in units of 1 / ``ticks`` seconds.
    ``kind`` is a muxer of ffmpeg's."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=ticks)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = stream.time_base = 1 / ticks
        stream.codec_context.thread_count = 1  # slices, and with them the bytes, follow the number of threads
        stream.codec_context.qmin = stream.codec_context.qmax = 1
        sound = container.add_stream("aac", rate=16_000, layout="mono") if tones else None
        end = seconds if seconds is not None else times[-1] + times[1] - times[0]
        for number, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, size), "rgb24")
            frame.pts, frame.time_base = round(at * ticks), 1 / ticks
            frame.duration = round(((times[number + 1] if number + 1 < len(times) else end) - at) * ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            wave = (0.3 * np.sin(np.arange(tones) * 0.2)).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, round(sound_from * 16_000)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return out.getvalue()


def steady_video(
    num_frames: int, fps: Fraction | int, size: tuple[int, int], tones: int = 0, picture: Callable = noise
) -> bytes:
    """``video`` of ``num_frames`` at ``fps``, which its header says exactly."""
    fps = Fraction(fps)
    times = [float(n / fps) for n in range(num_frames)]
    return video(times, tones, size, float(num_frames / fps), picture, ticks=fps)


def on_its_side(data: bytes) -> bytes:
    """A video with the display matrix of a phone held upright: turn by 90° clockwise."""
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    return data[:matrix] + struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30) + data[matrix + 36 :]


def spoken(number: int, answer: str) -> Sample:
    """A question about 0.4 s of noise and longer, different for each ``number``, and its answer."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * rng.standard_normal(6_000 + 900 * number).astype(np.float32), 16_000, format="flac")
    parts = [{"type": "audio", "audio": "a.flac"}, {"type": "text", "text": "what is said?"}]
    content = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}
    return Sample("speech", "shard", str(number), content, {"a.flac": buffer.getvalue(), "json": b"%d" % number})
