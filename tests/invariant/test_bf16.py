"""bf16 with fp32 master weights, what a GPU runs: every objective follows its trajectory in fp32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import TALKER, TOWERS, Case, trajectory

TOLERANCE = 0.04  # on the loss of each step; a dead part is out by tenths after twenty
NORM_TOLERANCE = 0.08  # on the first gradient's; AdamW hides a factor from the losses
EP_2 = {"world": 2, "expert_parallel": 2}
CASES = {
    "whole model": Case(),
    "LLM frozen": Case(components=TOWERS, num_steps=6),
    "transcription": Case(
        objective="transcription", components=("audio_encoder", "aut_decoder"), kinds=("audio", "short_audio") * 2
    ),
    "captioning": Case(objective="captioning", components=("vision_encoder", "vision_decoder"), kinds=("image",) * 4),
    "talker": Case(objective="talker", components=TALKER, kinds=("text", "short_audio", "image", "video"), num_steps=8),
    # Fewer steps: ratios of two policies make more of rounding from step to step.
    "talker_dpo": Case(
        objective="talker_dpo", components=TALKER, kinds=("text", "image", "short_audio", "text"), num_steps=4
    ),
    "gspo": Case(objective="gspo", kl_weight=0.1, lr=1e-3, num_steps=4),
    "distillation": Case(objective="distillation", beta=0.5, lr=1e-3),
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name, split",
    [
        *[pytest.param(name, EP_2, id=f"{name}, EP 2", marks=[] if name == "LLM frozen" else slow) for name in CASES],
        pytest.param("whole model", {}, id="one rank", marks=slow),
        pytest.param("whole model", {**EP_2, "world": 4}, id="4 ranks, EP 2", marks=slow),
        pytest.param("whole model", {**EP_2, "zero_stage": 2}, id="ZeRO 2, EP 2", marks=slow),
        pytest.param("whole model", {**EP_2, "zero_stage": 3, "recompute": True}, id="ZeRO 3, EP 2", marks=slow),
    ],
)
def test_bf16_follows_fp32(name, split):
    case = CASES[name]
    found, expected = (trajectory(replace(case, **split, precision=precision)) for precision in ("bf16", "fp32"))
    losses, reference = found["loss"], expected["loss"]
    for norm in (name for name in expected if name.startswith("grad_norm")):  # of one and the same weights
        assert found[norm][0] == pytest.approx(expected[norm][0], rel=NORM_TOLERANCE), norm
    assert 0 < np.abs(losses - reference).max() <= TOLERANCE * np.abs(reference).max()
