"""The Talker as built: initial weights, its configuration, and its experts under expert parallelism."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import (
    TALKER,
    Case,
    Ranks,
    packs_of_rank,
    run_config,
    run_config_in,
    run_ranks,
    tokenizer_folder,
)

from omni_train.config import ConfigError, load
from omni_train.data.tokenizer import load_tokenizer, token_ids
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.export import full_state_dict
from omni_train.models.build import build_talker, talker_config
from omni_train.models.talker import Talker, ThinkerStates

CASE = Case(objective="talker", components=TALKER, kinds=("text", "image", "short_audio"), documents_per_pack=3)


def test_no_parameter_is_uninitialised_or_zero():
    """Stock leaves the experts as they lie in memory and the routers zero."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        talker = build_talker(talker_config(run_config(CASE).model, load_tokenizer(tokenizer_folder())), seed=0)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in talker.named_parameters():
        assert parameter.isfinite().all(), name
        assert name.endswith("bias") or (parameter != 0).float().mean() > 0.99, name
    routers = [layer.mlp.gate.weight.std() for layer in talker.model.layers]
    assert all(0.01 < std < 0.03 for std in routers)
    experts = talker.model.layers[0].mlp.experts.gate_up_proj
    assert float(experts.detach().std()) == pytest.approx(experts.shape[-1] ** -0.5, rel=0.1)


def test_the_same_seed_gives_the_same_talker():
    model, tokenizer = run_config(CASE).model, load_tokenizer(tokenizer_folder())
    first, second, other = (build_talker(talker_config(model, tokenizer), seed=n).state_dict() for n in (0, 0, 1))
    assert all(first[name].equal(second[name]) for name in first)
    assert not first["codec_head.weight"].equal(other["codec_head.weight"])


def talk(ranks: Ranks, case: Case, folder: str) -> dict:
    """Losses of a pack by a plain Talker and by the same under expert parallelism, and both's weights."""
    config = run_config_in(case, folder)
    tokenizer = load_tokenizer(folder)
    (pack,) = packs_of_rank(dataclasses.replace(case, world=1), config, token_ids(tokenizer), 0, 0)
    generator = torch.Generator().manual_seed(0)
    width = config.model.text.hidden_size
    states = ThinkerStates(
        torch.randn(pack.speech.num_tokens, width, generator=generator),
        torch.randn(len(pack.speech.media_index), width, generator=generator),
    )
    talker = Talker(build_talker(talker_config(config.model, tokenizer), seed=0, embedding_std=0.5))
    with torch.no_grad():
        for layer in talker.talker.model.layers:
            layer.mlp.gate.weight.mul_(30)  # choices that differ, of unequal weights
        plain, before = talker(pack.speech, states), {k: v.clone() for k, v in talker.named_parameters()}
        engine = build_engine(talker, config.engine, config.stage, None, micro_batches=1)
        sharded = engine(pack.speech, states)
    after = full_state_dict(engine)
    names = ("losses", "residual_losses", "router_probabilities")
    return {
        "difference": {name: float((plain[name] - sharded[name]).abs().max()) for name in names},
        "counts": plain["router_counts"].equal(sharded["router_counts"]),
        "weights": set(before) == set(after) and all(before[name].equal(after[name]) for name in before),
        "scale": float(plain["losses"].std()),
    }


@pytest.mark.parametrize("is_normalised", [True, False])
def test_experts_over_two_ranks_are_those_of_one(is_normalised):
    """Shared expert, its gate, and whether the chosen experts' weights are normalised: AutoEP must be told of each."""
    case = dataclasses.replace(CASE, world=2, expert_parallel=2, norm_topk_prob=is_normalised)
    for found in run_ranks(2, talk, case, tokenizer_folder()):
        assert found["counts"] and found["weights"] and found["scale"] > 0.2
        assert max(found["difference"].values()) < 1e-4, found


@pytest.mark.parametrize(
    "values, message",
    [
        (["model.talker.tokens.pad=12"], "model.talker.tokens.pad (12) must lie in 256 … 1279"),
        (["model.talker.tokens.pad=357"], "must have different ids"),
        (["+model.talker.speakers.Zoe=600"], "in lower case"),
        (["model.talker.accept_hidden_layer=3"], "must be more than the 3 DeepStack levels"),
        (["model.talker.accept_hidden_layer=5"], "at most the LLM's 4 layers"),
        (["model.talker.num_code_groups=1"], "must be at least 2"),
        (["model.talker.decoder.mrope_section=[1,1,1]"], "must sum to head_dim / 2 = 16"),
        (["model.talker.decoder.num_experts=3", "engine=cpu2"], "must divide model.talker.decoder.num_experts (3)"),
        (["stage.code_noise=1.5"], "stage.code_noise (1.5)"),
        (["model=small"], "needs a Talker"),
    ],
)
def test_wrong_values_name_the_key(values, message):
    with pytest.raises(ConfigError) as error:
        load("talker_pretrain", values)
    assert message in str(error.value)
