"""Greedy generation with our modules against stock ``generate(do_sample=False)``, token for token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from stock import KINDS, MICRO, config_of, encoder_of, perturb, sample, stock_inputs
from support import run_ranks, tokenizer_folder
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from omni_train.data.contracts import MODALITIES
from omni_train.data.encode import collate
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine import parallel
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.export import write_processor
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.heldout import pack_sums
from omni_train.models.build import build_thinker, thinker_config
from omni_train.models.thinker import Thinker, compose
from omni_train.rollout.generate import greedy

NEW_TOKENS = 12
NEVER = -1


def build(tokenizer: str, yarn_factor: float = 1.0) -> torch.nn.Module:
    thinker = build_thinker(thinker_config(MICRO, load_tokenizer(tokenizer), yarn_factor), seed=0)
    perturb(thinker)
    torch.nn.init.normal_(thinker.lm_head.weight, generator=torch.Generator().manual_seed(1))  # a new one copies
    return thinker.eval()


def pack_of(kinds, media: Path, tokenizer: str):
    encoder = encoder_of(tokenizer)
    prompts = [encoder.prompt_and_answer(sample(kind, media))[0] for kind in kinds]
    return collate(prompts, patch_dim=encoder.geometry.patch_dim)


def answers(thinker: Thinker, pack, stop_id: int = NEVER, **arguments) -> list[list[int]]:
    with torch.no_grad():
        media = thinker.towers(pack)
    return greedy(thinker.llm, pack, media, stop_id=stop_id, max_new_tokens=NEW_TOKENS, **arguments)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Media files, with the processor's and the tokenizer's files beside them."""
    folder = tmp_path_factory.mktemp("media")
    write_processor(MICRO, folder)
    load_tokenizer(tokenizer_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[1.0, 4.0], ids=["rope", "yarn"])
def models(request):
    """(our modules, a stock model with the same weights)."""
    thinker = build(tokenizer_folder(), request.param)
    config = thinker_config(MICRO, load_tokenizer(tokenizer_folder()), request.param)
    stock = Qwen3OmniMoeThinkerForConditionalGeneration(config).eval()
    stock.load_state_dict(thinker.state_dict())
    return compose(thinker), stock


@pytest.fixture(scope="module")
def ours(models, media):
    return {kind: answers(models[0], pack_of([kind], media, tokenizer_folder()))[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_stock(kind, models, ours, media):
    inputs = stock_inputs(kind, media, media, answer="")
    with torch.no_grad():
        out = models[1].generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
        )
    assert ours[kind] == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_answers_are_not_all_alike(ours):
    """A model that repeats one token would prove little."""
    assert len({tuple(row) for row in ours.values()}) == len(KINDS)
    assert sum(len(set(row)) > 3 for row in ours.values()) >= len(KINDS) - 1


def test_a_batch_answers_as_its_documents_alone(models, ours, media):
    assert answers(models[0], pack_of(KINDS, media, tokenizer_folder())) == list(ours.values())


def test_answers_end_before_the_stop_token(models, ours, media):
    stop_id = ours["audio"][4]
    found = answers(models[0], pack_of(KINDS, media, tokenizer_folder()), stop_id)
    expected = [row[: row.index(stop_id)] if stop_id in row else row for row in ours.values()]
    assert found == expected
    assert min(map(len, found)) < NEW_TOKENS == max(map(len, found))


def test_teacher_forced_exact_match_is_that_of_generation(models, ours, media):
    """A greedy answer equals its reference if and only if every label is the argmax where it is due."""
    encoder, thinker = encoder_of(), models[0]
    documents, expected = [], []
    for kind in KINDS:
        for cut, flip in ((5, False), (5, True)):
            reference = list(ours[kind][:cut])
            if flip:
                reference[2] = (reference[2] + 1) % 256
            prompt = encoder.prompt_and_answer(sample(kind, media))[0]
            documents.append(with_answer(prompt, reference))
            expected.append(answers(thinker, pack_of([kind], media, tokenizer_folder()))[0][:cut] == reference)
    pack = collate(documents, patch_dim=encoder.geometry.patch_dim)
    with torch.no_grad():
        sums = pack_sums(thinker(pack), len(documents))
    by_modality = torch.zeros(2, len(MODALITIES), dtype=torch.float64)
    for document, is_exact in zip(documents, expected, strict=True):
        by_modality[:, MODALITIES.index(document.modality)] += torch.tensor([float(is_exact), 1.0])
    assert torch.equal(sums[2:], by_modality)
    assert sums[1].sum() == 5 * len(documents) and sums[2].sum() == len(KINDS)


def with_answer(prompt, answer):
    """The prompt continued by an answer of token ids, with loss on it."""
    length = prompt.num_tokens
    start = prompt.position_ids.max() + 1
    positions = np.tile(np.arange(start, start + len(answer)), (3, 1))
    return dataclasses.replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, answer]),
        labels=np.concatenate([np.full(length, -100), answer]),
        position_ids=np.concatenate([prompt.position_ids, positions], axis=1),
    )


def answer_on_rank(ranks: Ranks, tokenizer: str, media: str) -> list[list[int]]:
    """Answers of this rank's share of the kinds, the experts shared with the other rank; rank 0 is done at once."""
    config = config_of(expert_parallel=2, folder=tokenizer)
    thinker = build_engine(compose(build(tokenizer)), config.engine, config.stage, None, micro_batches=1).eval()
    folder = Path(media) / f"rank{ranks.rank}"
    folder.mkdir(exist_ok=True)
    pack = pack_of(KINDS[ranks.rank :: 2], folder, tokenizer)
    media_embeds = thinker.towers(pack)
    first = greedy(thinker.llm, pack, media_embeds, stop_id=NEVER, max_new_tokens=1)[0][0]
    kinds = KINDS[:1] if ranks.rank == 0 else KINDS[1::2]
    pack = pack_of(kinds, folder, tokenizer)
    return greedy(
        thinker.llm,
        pack,
        thinker.towers(pack),
        stop_id=first if ranks.rank == 0 else NEVER,
        max_new_tokens=NEW_TOKENS,
        is_open_anywhere=lambda is_open: parallel.any_rank(is_open, ranks.device),
    )


@pytest.mark.parametrize("models", [1.0], indirect=True, ids=["rope"])
def test_ranks_that_share_experts_answer_in_lockstep(models, ours, media):
    found = run_ranks(2, answer_on_rank, tokenizer_folder(), str(media))
    assert found[0] == [[]]
    assert found[1] == [ours[kind] for kind in KINDS[1::2]]


@pytest.mark.parametrize("kind, has_audio, has_vision", [("text", 0, 0), ("image", 0, 1), ("audio", 1, 0)])
def test_without_gradients_a_tower_without_work_rests_and_nothing_changes(kind, has_audio, has_vision, media):
    """With gradients both run, so that every rank's graph reaches all parameters."""
    thinker = compose(build(tokenizer_folder()))
    pack = pack_of([kind], media, tokenizer_folder())
    ran: list[str] = []
    towers = {"audio": thinker.towers.audio_tower.proj2, "vision": thinker.towers.visual}
    for name, tower in towers.items():
        tower.register_forward_hook(lambda *_, name=name: ran.append(name))
    trained = thinker.towers(pack)
    assert sorted(ran) == ["audio", "vision"]
    trained.anchor.backward()
    assert all(parameter.grad is not None for parameter in thinker.towers.parameters())
    ran.clear()
    with torch.no_grad():
        frozen = thinker.towers(pack)
        assert ran == ["audio"] * has_audio + ["vision"] * has_vision
        for mine, other in zip((frozen.audio, frozen.visual), (trained.audio, trained.visual), strict=True):
            assert torch.equal(mine, other)
        assert len(frozen.deepstack) == len(trained.deepstack)
        everywhere = torch.arange(pack.num_tokens)
        states = [thinker.llm.states_at(pack, each, everywhere, number=3) for each in (frozen, trained)]
    assert torch.equal(*states)
