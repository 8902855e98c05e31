"""TM-RoPE position ids (temporal, height, width) of one document, without a Python loop over tokens.

Equal to `transformers` ``Qwen3OmniMoeThinkerForConditionalGeneration.get_rope_index``: text and audio count up by one
in all three rows; a picture or video starts at the next free id, adds its row and column in the grid and, for video,
its time in units of one audio token (13 a second); what follows continues after the largest id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omni_train.data.media_tokens import MediaGeometry, grid_num_tokens
from omni_train.data.tokenizer import TokenIds

Grid = tuple[int, int, int]


def tm_rope_positions(
    input_ids: np.ndarray,
    ids: TokenIds,
    audio_num_tokens: Sequence[int] = (),
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] = (),
    use_audio_in_video: Sequence[bool] = (),
    geometry: MediaGeometry | None = None,
) -> np.ndarray:
    """Position ids int64 [3, L] of ``input_ids`` [L] whose placeholders are already expanded.

    ``audio_num_tokens`` has one entry a clip, sound tracks inside videos included, and like the grids (t, h, w in
    patches) follows the order of the text. ``use_audio_in_video`` and ``seconds_per_grid`` have one entry a video. A
    ``seconds_per_grid`` that is no whole number of position ids is rounded down id by id (upstream keeps fractions).
    Raises ValueError if tokens and media disagree in number.
    """
    geometry = geometry or MediaGeometry()
    _check_counts(input_ids, ids, audio_num_tokens, image_grids, video_grids, geometry)
    if len(seconds_per_grid) != len(video_grids) or len(use_audio_in_video) != len(video_grids):
        raise ValueError("seconds_per_grid and use_audio_in_video need one entry for each video")
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    filled, next_id = 0, 0
    image_index = video_index = 0
    for start in _vision_starts(input_ids, ids):
        first = input_ids[start + 1]
        if first == ids.image_pad:
            block = _grid_positions(image_grids[image_index], 0.0, geometry)
            stop_id = int(block.max()) + 1
            image_index += 1
        else:
            video = _grid_positions(
                video_grids[video_index], seconds_per_grid[video_index] * geometry.position_id_per_seconds, geometry
            )
            block, stop_id = video, video.max() + 1
            if use_audio_in_video[video_index]:
                clip = int((input_ids[: start + 1] == ids.audio_start).sum())
                block, stop_id = _with_sound(video, audio_num_tokens[clip])
            block, stop_id = np.floor(block + 1e-3).astype(np.int64), int(np.floor(stop_id + 1e-3))
            video_index += 1
        body = start + (2 if first == ids.audio_start else 1)
        positions[:, filled:body] = np.arange(next_id, next_id + body - filled)
        next_id += body - filled
        filled = body + block.shape[1]
        positions[:, body:filled] = block + next_id
        next_id += stop_id
    positions[:, filled:] = np.arange(next_id, next_id + len(input_ids) - filled)
    return positions


def _vision_starts(input_ids: np.ndarray, ids: TokenIds) -> np.ndarray:
    """Indices of the <|vision_start|> tokens that open a medium."""
    starts = np.flatnonzero(input_ids[:-1] == ids.vision_start)
    opens = np.isin(input_ids[starts + 1], (ids.image_pad, ids.video_pad, ids.audio_start))
    return starts[opens]


def _grid_positions(grid: Grid, ids_per_grid: float, geometry: MediaGeometry) -> np.ndarray:
    """Positions [3, t*h*w / merge²] of a picture (int64) or video (float32, as upstream computes them), from 0."""
    t, h, w = grid[0], grid[1] // geometry.merge_size, grid[2] // geometry.merge_size
    out = np.indices((t, h, w)).reshape(3, -1)
    if ids_per_grid:
        out = out.astype(np.float32)
        out[0] *= np.float32(ids_per_grid)
    return out


def audio_video_order(video_times: np.ndarray, num_audio_tokens: int) -> np.ndarray:
    """Order in which V video tokens (0 … V−1) and A audio tokens (V … V+A−1) of one clip stand in the text: int64
    [V+A].

    By time in position ids, video first where both are equal. ``video_times`` [V] ascending.
    """
    times = np.concatenate([video_times, np.arange(num_audio_tokens, dtype=video_times.dtype)])
    return np.argsort(times, kind="stable")


def _with_sound(video: np.ndarray, num_audio_tokens: int) -> tuple[np.ndarray, float]:
    """(positions [3, V+A], first free id after them) of a video with its sound track, from 0.

    NOTE: upstream continues after the largest id of what is left when the shorter of the two has run out, not of all;
    a wide picture with little sound can therefore share ids with the text after it. Kept: the weights were trained so.
    """
    audio = np.broadcast_to(np.arange(num_audio_tokens, dtype=video.dtype), (3, num_audio_tokens))
    num_video = video.shape[1]
    order = audio_video_order(video[0], num_audio_tokens)
    block = np.concatenate([video, audio], axis=1)[:, order]
    is_audio = order >= num_video
    last_of_other = np.flatnonzero(is_audio != is_audio[-1])
    tail = block[:, last_of_other[-1] + 1 :] if len(last_of_other) else block
    return block, float(tail.max()) + 1


def _check_counts(
    input_ids: np.ndarray,
    ids: TokenIds,
    audio_num_tokens: Sequence[int],
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    geometry: MediaGeometry,
) -> None:
    expected = (
        ("audio", ids.audio_pad, sum(audio_num_tokens)),
        ("image", ids.image_pad, sum(grid_num_tokens(grid, geometry) for grid in image_grids)),
        ("video", ids.video_pad, sum(grid_num_tokens(grid, geometry) for grid in video_grids)),
    )
    for kind, pad, count in expected:
        found = int((input_ids == pad).sum())
        if found != count:
            raise ValueError(f"{found} {kind} placeholder tokens stand in the text for {count} {kind} features")
