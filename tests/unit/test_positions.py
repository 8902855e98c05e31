import numpy as np
import pytest

from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.positions import audio_video_order, tm_rope_positions
from omni_train.data.tokenizer import TokenIds

GEOMETRY = MediaGeometry()
IDS = TokenIds(*range(100, 114), eos=102)
T, AS, AE, A = 1, IDS.audio_start, IDS.audio_end, IDS.audio_pad
VS, VE, P, V = IDS.vision_start, IDS.vision_end, IDS.image_pad, IDS.video_pad


def positions(tokens, **media):
    return tm_rope_positions(np.array(tokens), IDS, geometry=GEOMETRY, **media).tolist()


def test_text_and_audio_count_up_in_all_rows():
    tokens = [T, AS, A, A, A, AE, T]
    assert positions(tokens, audio_num_tokens=[3]) == [list(range(7))] * 3


def test_a_picture_adds_row_and_column_and_text_goes_on_after_the_largest():
    # 4 × 6 patches: 2 × 3 tokens from id 2; the largest is 2 + 2 (column 2), so the end marker has 5
    tokens = [T, VS, P, P, P, P, P, P, VE, T]
    assert positions(tokens, image_grids=[(1, 4, 6)]) == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_a_silent_video_moves_thirteen_ids_a_second():
    # two pairs of frames, one second each, 2 × 2 patches: one token a pair
    tokens = [VS, V, V, VE, T]
    assert positions(tokens, video_grids=[(2, 2, 2)], seconds_per_grid=[1.0], use_audio_in_video=[False]) == [
        [0, 1, 14, 15, 16],
        [0, 1, 1, 15, 16],
        [0, 1, 1, 15, 16],
    ]


def test_a_video_with_sound_interleaves_by_time():
    # pairs of 2 ids (2/13 s) and 3 audio tokens: v0 a0 a1 v1 a2
    assert audio_video_order(np.array([0, 2]), 3).tolist() == [0, 2, 3, 1, 4]
    tokens = [T, VS, AS, V, A, A, V, A, AE, VE, T]
    assert positions(
        tokens, audio_num_tokens=[3], video_grids=[(2, 2, 2)], seconds_per_grid=[2 / 13], use_audio_in_video=[True]
    ) == [
        [0, 1, 2, 3, 3, 4, 5, 5, 6, 7, 8],
        [0, 1, 2, 3, 3, 4, 3, 5, 6, 7, 8],
        [0, 1, 2, 3, 3, 4, 3, 5, 6, 7, 8],
    ]


@pytest.mark.parametrize(
    ("tokens", "media", "message"),
    [
        ([T, AS, A, A, AE], {"audio_num_tokens": [3]}, "2 audio placeholder tokens stand in the text for 3"),
        ([VS, P, P, VE], {"image_grids": [(1, 4, 4)]}, "2 image placeholder"),
        (
            [VS, P, VE, VS, P, P, P, VE],
            {"image_grids": [(1, 4, 4)]},
            "placeholder tokens stand for a medium of 4",
        ),
        ([VS, V, VE], {}, "1 video placeholder"),
        ([VS, V, VE], {"video_grids": [(1, 2, 2)]}, "one entry for each video"),
    ],
)
def test_tokens_and_features_must_agree(tokens, media, message):
    with pytest.raises(ValueError, match=message):
        positions(tokens, **media)
