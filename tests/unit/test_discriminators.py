"""Discriminators: what they look at, and whom the gradients of a judgement reach."""

from __future__ import annotations

import pytest
import torch

from omni_train.models.discriminators import FFT_SIZES, PERIODS, Discriminators, PeriodDiscriminator, judge
from omni_train.objectives.code2wav import adversarial_loss, discriminator_loss, feature_matching_loss


class Engine:
    """As DeepSpeed's: called, or asked for its module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *given):
        return self.module(*given)


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    return Engine(Discriminators(channels=2))


def test_one_a_period_and_one_a_spectrum(engine):
    (maps,) = engine(torch.randn(2, 3000))
    assert len(maps) == len(PERIODS) + len(FFT_SIZES)
    assert all(len(layers) == 5 for layers in maps)
    assert {layers[-1].shape[1] for layers in maps} == {1}


def test_a_period_sees_every_nth_sample_apart():
    torch.manual_seed(0)
    three = PeriodDiscriminator(3, 2)
    wave = torch.randn(1, 300)
    changed = wave.clone()
    changed[:, 1::3] += 1.0
    before, after = three(wave)[-1], three(changed)[-1]
    assert torch.equal(before[..., [0, 2]], after[..., [0, 2]]) and not torch.equal(before[..., 1], after[..., 1])


def test_the_generators_gradient_stops_at_the_discriminators_and_theirs_at_the_wave(engine):
    wave, target = torch.randn(2, 3000, requires_grad=True), torch.randn(2, 3000)
    judged = judge(engine, wave, target)
    (adversarial_loss(judged["generated"]) + feature_matching_loss(judged["real"], judged["generated"])).backward()
    assert wave.grad.abs().sum() > 0
    assert all(p.grad is None for p in engine.module.parameters())
    wave.grad = None
    discriminator_loss(judged["real"], judged["fake"]).backward()
    assert wave.grad is None
    assert all(p.grad.abs().sum() > 0 for p in engine.module.parameters() if p.ndim > 1)


def test_generated_and_fake_are_judged_alike(engine):
    judged = judge(engine, torch.randn(1, 3000), torch.randn(1, 3000))
    for one, other in zip(judged["generated"], judged["fake"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
