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
        body, num_sound = start + 1, 0
        if input_ids[body] == ids.image_pad:
            pad, vision = ids.image_pad, _grid_positions(image_grids[image_index], 0.0, geometry)
            image_index += 1
        else:
            ids_per_grid = seconds_per_grid[video_index] * geometry.position_id_per_seconds
            pad, vision = ids.video_pad, _grid_positions(video_grids[video_index], ids_per_grid, geometry)
            if use_audio_in_video[video_index]:
                num_sound = audio_num_tokens[int((input_ids[:body] == ids.audio_start).sum())]
                body += 1
            video_index += 1
        block, num_ids = _with_sound(vision, input_ids[body : body + vision.shape[1] + num_sound] == pad)
        positions[:, filled:body] = np.arange(next_id, next_id + body - filled)
        next_id += body - filled
        filled = body + block.shape[1]
        positions[:, body:filled] = block + next_id
        next_id += num_ids
    positions[:, filled:] = np.arange(next_id, next_id + len(input_ids) - filled)
    return positions


def _vision_starts(input_ids: np.ndarray, ids: TokenIds) -> np.ndarray:
    """Indices of the <|vision_start|> tokens that open a medium."""
    starts = np.flatnonzero(input_ids[:-1] == ids.vision_start)
    after = input_ids[starts + 1]
    return starts[(after == ids.image_pad) | (after == ids.video_pad) | (after == ids.audio_start)]


def _grid_positions(grid: Grid, ids_per_grid: float, geometry: MediaGeometry) -> np.ndarray:
    """Positions int64 [3, t*h*w / merge²] of a picture or video, from 0; times rounded down to whole ids.

    A rounding error below a thousandth of an id (k / 13 s times 13) does not count as a fraction.
    """
    t, h, w = grid[0], grid[1] // geometry.merge_size, grid[2] // geometry.merge_size
    out = np.indices((t, h, w)).reshape(3, -1)
    out[0] = np.floor(out[0] * ids_per_grid + 1e-3)
    return out


def video_token_times(grid: Grid, seconds_per_grid: float, geometry: MediaGeometry) -> np.ndarray:
    """Time of each token of a video, in position ids: int64 [t*h*w / merge²], ascending."""
    return _grid_positions(grid, seconds_per_grid * geometry.position_id_per_seconds, geometry)[0]


def audio_video_order(video_times: np.ndarray, num_audio_tokens: int) -> np.ndarray:
    """Order in which V video tokens (0 … V−1) and A audio tokens (V … V+A−1) stand in the text: int64 [V+A].

    By time in position ids, video first where both are equal. ``video_times`` [V] ascending, whole ids: upstream
    compares floats, where the order of a tie hangs on a rounding error.
    """
    times = np.concatenate([video_times, np.arange(num_audio_tokens)])
    return np.argsort(times, kind="stable")


def _with_sound(vision: np.ndarray, is_vision: np.ndarray) -> tuple[np.ndarray, int]:
    """(positions int64 [3, V+A], number of ids taken up) of a picture or video [3, V] and its sound track, from 0.

    ``is_vision`` bool [V+A] says in which order the two stand in the text.
    NOTE: with sound, upstream continues after the largest id of what is left when the shorter of the two has run out,
    not of all: a wide picture with little sound can share ids with the text after it. Kept: weights are trained so.
    """
    num_vision = vision.shape[1]
    if (num_found := int(is_vision.sum())) != num_vision:
        raise ValueError(f"{num_found} placeholder tokens stand for a medium of {num_vision} features")
    block = np.empty((3, len(is_vision)), dtype=np.int64)
    block[:, is_vision] = vision
    block[:, ~is_vision] = np.arange(len(is_vision) - num_vision)
    others = np.flatnonzero(is_vision != is_vision[-1])
    tail = block[:, others[-1] + 1 :] if len(others) else block
    return block, int(tail.max()) + 1


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
