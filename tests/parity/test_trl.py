"""Our post-training losses against TRL's and against float64 formulas, on CPU: 1e-6 in values and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stock import KINDS, MICRO, encoder_of, perturb, sample, stock_inputs
from support import tokenizer_folder
from torch import Tensor
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from omni_train.data.encode import collate
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.export import write_processor
from omni_train.models import head as head_module
from omni_train.models.build import build_thinker, thinker_config
from omni_train.models.thinker import compose
from omni_train.objectives.distillation import TeacherStates, divergence_from, generalized_jsd
from omni_train.objectives.gspo import group_advantages, gspo_loss, has_signal
from omni_train.objectives.next_token import next_token_losses

trl = pytest.importorskip("trl_oracle", reason="TRL is not installed")

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours.double(), theirs.double(), **TOLERANCE)


# ------------------------------------------------------------------------------------------------- SFT


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_processor(MICRO, folder)
    load_tokenizer(tokenizer_folder()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "video" not in kind])
def test_sft_loss_and_gradients_equal_trl_on_the_same_tokens(kind, media):
    config = thinker_config(MICRO, load_tokenizer(tokenizer_folder()))
    theirs = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    perturb(theirs)
    ours = build_thinker(thinker_config(MICRO, load_tokenizer(tokenizer_folder())), seed=0)
    ours.load_state_dict(theirs.state_dict())
    encoder = encoder_of()
    document = encoder.encode(sample(kind, media))
    inputs = stock_inputs(kind, media, media)
    assert document.input_ids.tolist() == inputs["input_ids"][0].tolist()
    labels = torch.from_numpy(document.labels)[None]
    expected = trl.sft_loss(theirs, {**inputs, "labels": labels})
    expected.backward()

    thinker = compose(ours)
    pack = collate([document], patch_dim=encoder.geometry.patch_dim)
    term = next_token_losses(thinker(pack), "thinker", None, 0.0).terms[0]
    found = term.sum / (pack.shift_labels != -100).sum()
    found.backward()
    assert close(found, expected), (float(found), float(expected))
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if gradients[name] is not None:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name
            compared += 1
    assert compared > 30


# ------------------------------------------------------------------------------------------------- distillation

BETAS = (0.0, 0.3, 0.5, 0.9, 1.0)


def states(seed: int = 0, positions: int = 13, vocabulary: int = 40) -> tuple[Tensor, ...]:
    """(student's hidden states and head, teacher's hidden states and head, labels) of different widths."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (positions, 8), (vocabulary, 8), (positions, 12), (vocabulary, 12)
    tensors = [0.5 * torch.randn(shape, generator=generator) for shape in shapes]  # divergences of about one nat
    return *tensors, torch.randint(0, vocabulary, (positions,), generator=generator)


def by_hand(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> list[float]:
    """The divergence at each position, summed in Python's float64 over plain probabilities."""
    found = []
    for row_s, row_t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        s, t = (np.exp(np.array(row) / temperature) for row in (row_s, row_t))
        s, t = s / s.sum(), t / t.sum()
        if beta in (0, 1):
            p, q = (t, s) if beta == 0 else (s, t)
            found.append(float((p * np.log(p / q)).sum()))
        else:
            m = beta * t + (1 - beta) * s
            found.append(float(beta * (t * np.log(t / m)).sum() + (1 - beta) * (s * np.log(s / m)).sum()))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_divergences_equal_the_float64_formula_and_gkd(beta, temperature):
    hidden, weight, teacher_hidden, teacher_weight, labels = states()
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    found = generalized_jsd(student, teacher, beta, temperature)
    assert close(found, torch.tensor(by_hand(student, teacher, beta, temperature)))
    labels[2] = -100
    expected = trl.generalized_jsd(student[None], teacher[None], labels[None], beta, temperature)
    assert close(found[labels != -100].mean(), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_head_equals_autograd_and_trl_in_values_and_gradients(beta, temperature, monkeypatch):
    hidden, weight, teacher_hidden, teacher_weight, labels = states(1)
    weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(2))

    def run(function) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = function(h, w)
        (values * weights).sum().backward()
        return values.detach(), h.grad, w.grad

    expected = run(lambda h, w: generalized_jsd(h @ w.T, teacher_hidden @ teacher_weight.T, beta, temperature))
    theirs = run(lambda h, w: trl.chunked_divergence(h, w, teacher_hidden, teacher_weight, beta, temperature))
    score = divergence_from(TeacherStates(teacher_hidden, teacher_weight), beta, temperature)
    for numbers in (1 << 20, 2 * 40 * 5):  # at once; five positions at a time, three in the last chunk
        monkeypatch.setattr(head_module, "CHUNK_NUMBERS", numbers)
        ours = run(lambda h, w: score(h, w, labels)["divergences"])
        for found, autograd, kernel in zip(ours, expected, theirs, strict=True):
            assert close(found, autograd) and close(found, kernel)
    scores = score(hidden, weight, labels)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    assert close(scores["losses"], plain) and scores["predictions"].equal((hidden @ weight.T).argmax(-1))


def test_the_chunked_gradient_passes_gradcheck_in_float64():
    hidden, weight, teacher_hidden, teacher_weight, labels = (
        t.double() if t.is_floating_point() else t for t in states(3, positions=3, vocabulary=5)
    )
    from omni_train.objectives.distillation import _gradient

    for beta in BETAS:
        student = (hidden @ weight.T).requires_grad_()
        teacher = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
        generalized_jsd(student, teacher_hidden @ teacher_weight.T, beta).sum().backward()
        assert torch.allclose(_gradient(student.detach().log_softmax(-1), teacher, beta), student.grad, atol=1e-12)


def test_no_logits_of_more_than_a_chunk_are_ever_held(monkeypatch):
    hidden, weight, teacher_hidden, teacher_weight, labels = states(4, positions=50)
    monkeypatch.setattr(head_module, "CHUNK_NUMBERS", 2 * 40 * 4)
    seen = []
    real = torch.nn.functional.linear

    def watched(*arguments):
        out = real(*arguments)
        seen.append(out.shape[0])
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    h = hidden.requires_grad_()
    divergence_from(TeacherStates(teacher_hidden, teacher_weight), 0.5, 1.0)(h, weight, labels)[
        "divergences"
    ].sum().backward()
    assert max(seen) == 4 and len(seen) == 4 * math.ceil(50 / 4)


# ------------------------------------------------------------------------------------------------- GSPO


def answers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(policy's, sampled, reference's log-probabilities [B, T], mask [B, T], advantages [B]), 1–7 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    policy, sampled, reference = (-torch.rand(6, 7, generator=generator) * 4 for _ in range(3))
    sampled = policy + (sampled - policy) * torch.tensor([0.0, 0.01, 0.05, 0.1, 0.4, 1.0])[:, None]
    mask = (torch.arange(7) < torch.tensor([7, 1, 3, 5, 2, 6])[:, None]).float()
    return policy, sampled, reference, mask, torch.tensor([1.3, -0.4, 0.0, -1.1, 0.8, -0.9])


def gspo_by_hand(policy, sampled, reference, mask, advantages, low, high, kl_weight) -> float:
    """The mean loss over answers in Python's float64, token by token."""
    total = 0.0
    for row in range(len(advantages)):
        steps = [t for t in range(mask.shape[1]) if mask[row, t]]
        p, q, r = ([float(x[row, t].double()) for t in steps] for x in (policy, sampled, reference))
        ratio = math.exp(sum(a - b for a, b in zip(p, q, strict=True)) / len(steps))
        a = float(advantages[row].double())
        kl = sum(math.exp(c - b) - (c - b) - 1 for b, c in zip(p, r, strict=True)) / len(steps)
        total += -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a) + kl_weight * kl
    return total / len(advantages)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (3e-4, 4e-4), (0.1, 0.3)])
def test_gspo_loss_and_gradients_equal_trl_and_the_float64_formula(clip, kl_weight):
    low, high = clip
    policy, sampled, reference, mask, advantages = answers()
    padded = policy.clone().requires_grad_()
    expected = trl.gspo_loss(
        padded, sampled, mask, advantages, clip_low=low, clip_high=high, reference=reference, kl_weight=kl_weight
    )
    expected.backward()
    packed = policy.clone().requires_grad_()
    is_token = mask > 0
    found = gspo_loss(
        packed[is_token],
        sampled[is_token],
        torch.arange(6)[:, None].expand(6, 7)[is_token],
        advantages,
        clip_low=low,
        clip_high=high,
        reference_K=reference[is_token] if kl_weight else None,
        kl_weight=kl_weight,
    )
    loss = found.loss.mean()
    loss.backward()
    assert close(loss, expected)
    assert loss.item() == pytest.approx(
        gspo_by_hand(policy, sampled, reference, mask, advantages, low, high, kl_weight), abs=1e-6
    )
    assert close(packed.grad, padded.grad) and packed.grad.abs().max() > 0.01
    assert 0 < found.is_clipped.sum() < 6 or low < 1e-3


def test_one_ratio_an_answer_not_one_a_token():
    """Two tokens whose ratios cancel: nothing is clipped, and both get the same gradient."""
    policy = torch.tensor([-1.0, -1.0], requires_grad=True)
    sampled = torch.tensor([-1.5, -0.5])
    found = gspo_loss(policy, sampled, torch.tensor([0, 0]), torch.tensor([2.0]), clip_low=0.1, clip_high=0.1)
    found.loss.sum().backward()
    assert found.ratio.tolist() == pytest.approx([1.0]) and not found.is_clipped.any()
    assert policy.grad.tolist() == pytest.approx([-1.0, -1.0])


def test_advantages_are_those_of_trl():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [3.0, 0.0, 0.0, 0.0]])
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True)
    assert torch.equal(group_advantages(rewards), (rewards - mean) / (std + 1e-4))  # GRPOTrainer, scale_rewards="group"
    assert group_advantages(rewards)[0].tolist() == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=1e-5)
    assert torch.equal(group_advantages(rewards, scale=False), rewards - mean)
    assert has_signal(rewards).tolist() == [True, False, True]
