"""One layer of each kind at the published widths, on a CPU: bf16 beside fp32, recomputed or not.

The small models of other tests have other widths, so a head of 72 numbers or 1,280 channels is met here alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import Case, document, run_config_in, tokenizer_folder

from omni_train.config import Precision, load
from omni_train.data.contracts import Pack
from omni_train.data.encode import collate
from omni_train.data.pipeline import media_geometry
from omni_train.data.tokenizer import load_tokenizer, token_ids
from omni_train.engine.deepspeed import in_precision
from omni_train.models.build import build_thinker, thinker_config
from omni_train.models.thinker import Thinker, compose
from omni_train.stage import enable_recompute

ONE_LAYER = [
    "model=qwen3_omni_30b_a3b",
    "model.text.num_hidden_layers=2",
    "model.text.num_experts=8",
    "model.text.num_experts_per_tok=2",
    "model.audio.encoder_layers=1",
    "model.vision.depth=1",
    "model.vision.deepstack_visual_indexes=[0]",
    "model.talker.accept_hidden_layer=2",
]


@pytest.fixture(scope="module")
def thinker() -> Thinker:
    config = load("s2_general", ONE_LAYER)
    built = compose(build_thinker(thinker_config(config.model, load_tokenizer(Path(tokenizer_folder())), 1.0), seed=0))
    text = built.llm.model
    assert text.layers[0].self_attn.q_proj.weight.shape == (32 * 128, 2048)
    assert text.layers[0].mlp.experts.gate_up_proj.shape == (8, 2 * 768, 2048)
    assert built.towers.audio_tower.layers[0].self_attn.k_proj.weight.shape == (1280, 1280)
    assert built.towers.visual.blocks[0].attn.qkv.weight.shape == (3 * 1152, 1152)
    return built


@pytest.fixture(scope="module")
def pack() -> Pack:
    """Text, two clips, a picture and a film with its sound."""
    config = run_config_in(Case(), tokenizer_folder())
    config.model = load("s2_general", ONE_LAYER).model
    ids, rng = token_ids(load_tokenizer(Path(tokenizer_folder()))), np.random.default_rng(0)
    kinds = ("text", "audio", "short_audio", "image", "video_audio")
    found = [document(kind, config, ids, rng, kind) for kind in kinds]
    return collate(found, patch_dim=media_geometry(config.model.vision).patch_dim)


def loss_and_gradients(thinker: Thinker, pack: Pack) -> tuple[float, dict[str, torch.Tensor]]:
    thinker.train().zero_grad()
    output = thinker(pack)
    loss = output["losses"].float().mean() + output["router_probabilities"].square().mean()
    loss.backward()
    return float(loss.detach()), {name: p.grad.float() for name, p in thinker.named_parameters() if p.grad is not None}


@pytest.mark.slow  # a minute and a half, most of it memory that the system hands out
def test_recompute_changes_nothing_and_bf16_little(thinker, pack):
    loss, gradients = loss_and_gradients(thinker, pack)
    assert set(gradients) == {name for name, _ in thinker.named_parameters()}, "every parameter is reached"
    enable_recompute(thinker)
    again, recomputed = loss_and_gradients(thinker, pack)
    assert again == loss and all(torch.equal(recomputed[name], own) for name, own in gradients.items())
    half, rounded = loss_and_gradients(in_precision(thinker, Precision.bf16), pack)
    assert half == pytest.approx(loss, rel=5e-3)
    for name, own in gradients.items():
        if not name.endswith("k_proj.bias"):  # moves all scores of a query alike, so its gradient is rounding alone
            likeness = torch.cosine_similarity(own.flatten(), rounded[name].flatten(), dim=0)
            assert likeness > 0.99, f"{name}: {likeness:.4f}"
