"""A micro corpus and a micro model for tests that run the real command on two ranks."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from omni_train.corpus import prepare_corpus

ROOT = Path(__file__).resolve().parents[2]

MICRO = [
    *("model=tiny", "model.text.hidden_size=32", "model.text.num_hidden_layers=4", "model.text.head_dim=16"),
    *("model.text.mrope_section=[4,2,2]", "model.text.num_attention_heads=2", "model.text.num_key_value_heads=1"),
    *("model.text.moe_intermediate_size=32", "model.text.num_experts=4", "model.text.max_position_embeddings=256"),
    *("model.audio.d_model=32", "model.audio.encoder_layers=1", "model.audio.encoder_attention_heads=2"),
    *("model.audio.encoder_ffn_dim=64", "model.audio.downsample_hidden_size=8", "model.vision.hidden_size=32"),
    *("model.vision.depth=3", "model.vision.num_heads=2", "model.vision.intermediate_size=64"),
    *("model.decoder.num_hidden_layers=1", "model.decoder.num_attention_heads=2"),
    *("model.decoder.intermediate_size=64", "engine=cpu2", "data.packs_per_lane=1", "stage.context=256"),
    *("stage.warmup_tokens=0", "eval_tokens=256", "wandb_mode=disabled"),
]
"""Overrides of any stage that make it small: 2 ranks, EP 2, steps of at most 512 tokens."""


@functools.cache
def micro_corpus() -> Path:
    """The folder of 2 % of the tiny corpus with its tokenizer and index; made once, kept under .cache/test_corpus."""
    return prepare_corpus("tiny", ROOT / ".cache" / "test_corpus", 600, scale=0.02).resolve()


def overrides(run_dir: Path, *extra: str) -> list[str]:
    """Overrides of a micro stage with its run folder."""
    return [*MICRO, f"data.root={micro_corpus()}", f"run_dir={run_dir}", *extra]


def environment() -> dict[str, str]:
    """The environment of a command started by a person: no launcher's variables in it."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMNI_TRAIN_FAILURES")
    return {name: value for name, value in os.environ.items() if name not in launcher}


def omni_train(*arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, to its end."""
    command = [sys.executable, "-m", "omni_train.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=timeout, check=False
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command as leader of a process group, so that all of its ranks can be killed at once."""
    command = [sys.executable, "-m", "omni_train.cli", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
