"""The Talker, teacher-forced, against what stock `transformers` computes while it generates the same tokens.

Stock's whole model answers in text and speech; hooks on its heads record the logits of every code that it drew. Our
Talker reads the finished answer in one pass.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from stock import MICRO, encoder_of
from stock_omni import KINDS, NUM_FRAMES, Models, build_models, ours, spoken, stock_answer
from support import tokenizer_folder

from omni_train.config import load
from omni_train.data.encode import collate
from omni_train.data.talker_sequence import SpeechTokens, system_tokens, with_noise
from omni_train.data.tokenizer import load_tokenizer, train_tokenizer
from omni_train.engine.export import write_processor
from omni_train.models.build import build_talker, talker_config
from omni_train.models.talker import Talker

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def whole_roles(tmp_path_factory) -> str:
    """A tokenizer whose roles are single tokens, as in the published one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user\nassistant\n"] * 8, 320, folder)
    assert len(SpeechTokens.of(load_tokenizer(folder)).head) == 3
    return str(folder)


@pytest.fixture(scope="module", params=["after layer 3", "after the last norm, roles in pieces"])
def models(request, whole_roles) -> Models:
    if request.param == "after layer 3":
        return build_models(3, whole_roles)
    assert len(SpeechTokens.of(load_tokenizer(tokenizer_folder())).head) > 3
    return build_models(4, tokenizer_folder())


@pytest.fixture(scope="module")
def media(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("media")
    write_processor(MICRO, folder)
    load_tokenizer(models.tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(models, media):
    return {kind: stock_answer(models, kind, media) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_equal_stock_generation(kind, models, answers, media):
    text, codes, first, residual = answers[kind]
    output = ours(models, [spoken(kind, media, text, codes)])
    labels = torch.tensor([*codes[0], MICRO.talker.tokens.eos])
    assert output["labels"].tolist() == labels.tolist()
    theirs = first.log_softmax(-1)[torch.arange(len(labels)), labels]
    assert (output["losses"] + theirs).abs().max() < TOLERANCE
    assert theirs.std() > 0.3  # log-probabilities that differ: equal ones would prove little
    targets = torch.tensor(codes[1:].T)
    theirs = residual.log_softmax(-1).gather(-1, targets[:, :, None])[:, :, 0]
    assert output["residual_losses"].shape == theirs.shape == (NUM_FRAMES, 3)
    assert (output["residual_losses"] + theirs).abs().max() < TOLERANCE
    assert theirs.std() > 0.3
    assert (output["predictions"] == first.argmax(-1)).all()
    assert (output["residual_predictions"] == residual.argmax(-1)).all()


def test_a_pack_of_all_kinds_equals_its_documents_alone(models, answers, media):
    documents = [spoken(kind, media, *answers[kind][:2]) for kind in KINDS]
    together = ours(models, documents)
    alone = [ours(models, [document]) for document in documents]
    for name in ("losses", "residual_losses"):
        assert (together[name] - torch.cat([output[name] for output in alone])).abs().max() < 1e-5
    assert together["sequence"].tolist() == [n for n in range(len(KINDS)) for _ in range(NUM_FRAMES + 1)]
    assert together["frame_sequence"].tolist() == [n for n in range(len(KINDS)) for _ in range(NUM_FRAMES)]


def test_the_thinker_runs_on_what_the_media_see_alone(models, answers, media):
    """Of the documents with media what ends at the last of them; one token where there are none."""
    documents = [spoken(kind, media, *answers[kind][:2]) for kind in KINDS]
    llm, number, dim = models.thinker.llm, models.accept_hidden_layer, encoder_of().geometry.patch_dim
    rows: list[int] = []
    handle = llm.model.layers[0].register_forward_pre_hook(lambda layer, args: rows.append(args[0].shape[1]))

    def states(documents):
        pack = collate(documents, patch_dim=dim)
        index, embeds = pack.speech.media_index, models.thinker.towers(pack)
        found = llm.states_at(pack, embeds, index, number)
        return found, llm.states_at(pack, embeds, torch.arange(len(pack.input_ids)), number)[index]

    with torch.no_grad():
        found, theirs = states(documents)
        assert len(found) > 20 and (found - theirs).abs().max() < 1e-5 and theirs.std() > 0.1
        last = [int(document.speeches[0].media_index.max(initial=-1)) + 1 for document in documents]
        assert last[0] == 0 and rows == [sum(last), sum(len(document.input_ids) for document in documents)]
        assert states(documents[:1])[0].shape[0] == 0 and rows[2] == 1
        handle.remove()
        pack = collate(documents, patch_dim=dim)
        embeds, index = models.thinker.towers(pack), pack.speech.media_index
        mixed = torch.cat([index.flip(0), index[:5]])
        assert torch.equal(llm.states_at(pack, embeds, mixed, number), torch.cat([found.flip(0), found[:5]]))
        with pytest.raises(ValueError, match="placeholders"):
            llm.states_at(pack, embeds, index[:1], number)


def test_a_talker_s_own_system_prompt_changes_what_it_says(models, answers, media):
    text, codes, *_ = answers["image_audio"]
    stock, prompted = (spoken("image_audio", media, text, codes, system) for system in ("", "speak slowly"))
    extra = prompted.num_tokens - stock.num_tokens
    assert extra == len(system_tokens("speak slowly", encoder_of(str(media)).tokenizer)) > 0
    before, after = stock.speeches[0], prompted.speeches[0]
    assert (after.text_ids[extra:] == before.text_ids).all()
    assert (after.position_ids[:, extra:] == before.position_ids + extra).all()
    difference = ours(models, [stock])["losses"] - ours(models, [prompted])["losses"]
    assert difference.abs().max() > 0.1


def test_noise_is_read_and_not_predicted(models, answers, media):
    document = spoken("audio", media, *answers["audio"][:2])
    (clean,) = document.speeches
    noisy = with_noise(clean, 0.5, MICRO.talker.codebook_size, np.random.default_rng(0))
    assert 0.3 < (noisy.input_codes != clean.codes).mean() < 0.7
    before = ours(models, [document])
    after = ours(models, [dataclasses.replace(document, speeches=[noisy])])
    assert after["labels"].tolist() == before["labels"].tolist()
    assert after["losses"][0] == pytest.approx(float(before["losses"][0]), abs=1e-5)  # no frame read yet
    assert (after["losses"] - before["losses"]).abs().max() > 0.1


# The code predictor at full size.


def growing_prefix(talker: Talker, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Residual losses [N, G-1] as stock's own forward gives them, a call for each code with the frame's prefix."""
    predictor, losses = talker.talker.code_predictor, []
    embeddings = [hidden, talker.talker.model.codec_embedding(codes[0])]
    for group in range(1, len(codes)):
        logits = predictor(inputs_embeds=torch.stack(embeddings, dim=1), use_cache=False).logits[:, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, codes[group], reduction="none"))
        embeddings.append(predictor.model.codec_embedding[group - 1](codes[group]))
    return torch.stack(losses, dim=1)


@pytest.fixture(scope="module")
def full_size_mtp() -> Talker:
    """A Talker without layers of its own whose code predictor has the published sizes."""
    model = load("s2_general", ["model=qwen3_omni_30b_a3b"]).model
    config = talker_config(model)
    config.text_config.num_hidden_layers = 0
    return Talker(build_talker(config, seed=0, embedding_std=0.5))


def test_mtp_in_one_pass_equals_the_growing_prefix_and_is_faster(full_size_mtp):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 1024, generator=generator)
    codes = torch.randint(0, 2048, (16, 4), generator=generator)
    found, seconds = {}, {}
    for name in ("one pass", "prefix"):
        hidden_in = hidden.clone().requires_grad_()
        times = []
        for _ in range(2 if name == "one pass" else 1):
            started = time.perf_counter()
            if name == "one pass":
                losses, _ = full_size_mtp.predict_residuals(hidden_in, codes)
            else:
                losses = growing_prefix(full_size_mtp, hidden_in, codes)
            (gradient,) = torch.autograd.grad(losses.mean(), hidden_in)
            times.append(time.perf_counter() - started)
        found[name], seconds[name] = (losses.detach(), gradient), min(times)
    assert found["one pass"][0].shape == (4, 15)
    assert abs(found["one pass"][0].mean() - found["prefix"][0].mean()) < 1e-5
    assert (found["one pass"][0] - found["prefix"][0]).abs().max() < 1e-4
    assert (found["one pass"][1] - found["prefix"][1]).abs().max() < 1e-6
    assert seconds["prefix"] > 5 * seconds["one pass"], seconds
