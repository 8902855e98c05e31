"""Codec and Code2Wav: one trajectory for every split into ranks and packs; resumed as straight, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import Case, Ranks, make_trainer, micro_model, run_config_in, run_ranks, tokenizer_folder

from omni_train.config import ComponentConfig, Objective, ReconstructionConfig, RunConfig, StageConfig
from omni_train.data.contracts import Pack
from omni_train.data.encode import collate
from omni_train.data.speech import SpeechEncoder, document_of
from omni_train.engine import checkpoint
from omni_train.models.codec import Codec

FRAMES = (3, 2, 5, 1, 4, 2)
NUM_STEPS = 4
COMPONENTS = {
    Objective.codec: ("codec_encoder", "codec_decoder"),
    Objective.code2wav: ("code2wav", "discriminator"),
}


def stage_config(objective: Objective) -> StageConfig:
    weights = ReconstructionConfig()
    if objective is Objective.code2wav:
        weights = ReconstructionConfig(adversarial=0.1, stft=0.5, discriminator_channels=2, average_decay=0.9)
    return StageConfig(
        name="test",
        objective=objective,
        components={name: ComponentConfig(lr=1e-3, weight_decay=0.01) for name in COMPONENTS[objective]},
        context=32,
        total_tokens=1e6,
        reconstruction=weights,
    )


def config_of(objective: Objective, world: int, folder: str, codec: Path) -> RunConfig:
    config = run_config_in(Case(world=world), folder)
    model = micro_model(4)
    model = dataclasses.replace(model, codec=dataclasses.replace(model.codec, revive_below=0.05, ema_decay=0.9))
    init = {"codec_encoder": str(codec)} if objective is Objective.code2wav else {}
    return dataclasses.replace(config, stage=stage_config(objective), model=model, init=init)


def packs(step: int, size: int, rank: int, world: int) -> list[Pack]:
    """Clips of noise, ``size`` in each pack; packs dealt to the ranks in turn, dummies where one has fewer."""
    rng = np.random.default_rng(step)
    documents = [
        document_of(f"s{step}/{n}", [rng.standard_normal(frames * 1920, dtype=np.float32) * 0.1], frames)
        for n, frames in enumerate(FRAMES)
    ]
    all_packs = [collate(documents[n : n + size]) for n in range(0, len(documents), size)]
    mine = all_packs[rank::world]
    return mine + [SpeechEncoder().dummy()] * (-(-len(all_packs) // world) - len(mine))


def trajectory(ranks: Ranks, objective: Objective, folder: str, codec: Path, size: int = 1) -> list[dict]:
    """Metrics of every step, then of the weights."""
    config = config_of(objective, ranks.world, folder, codec)
    trainer = make_trainer(config, ranks, len(packs(0, size, ranks.rank, ranks.world)))
    found = [trainer.step(packs(step, size, ranks.rank, ranks.world)) for step in range(NUM_STEPS)]
    if objective is Objective.codec:
        quantizer = trainer.stage.engines["codec"].module.codec_encoder.quantizer
        found.append({"codebooks": quantizer.codebooks.double().norm().item(), "sizes": quantizer.sizes.sum().item()})
    else:
        averages = trainer.stage.stateful["average"].average.values()
        found.append({"average": sum(tensor.double().square().sum().item() for tensor in averages)})
    return found


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of an untrained codec with random codebooks."""
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    made = Codec(micro_model(4).codec)
    made.codec_encoder.quantizer.codebooks.normal_()
    made.codec_encoder.quantizer.sizes.fill_(1.0)
    save_file(dict(made.state_dict()), folder / "model.safetensors")
    return folder


def assert_close(one: list[dict], other: list[dict], tolerance: float) -> None:
    assert [list(step) for step in one] == [list(step) for step in other]
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in a:
            same = a[name] == b[name] if isinstance(a[name], str) else a[name] == pytest.approx(b[name], rel=tolerance)
            assert same, f"step {number}, {name}: {a[name]} against {b[name]}"


@pytest.mark.parametrize("objective", list(COMPONENTS))
def test_two_ranks_train_as_one(objective, codec):
    """Five packs and a dummy on two ranks against six packs on one; the codebooks' statistics are of all of them."""
    arguments = (objective, tokenizer_folder(), codec)
    (one,) = run_ranks(1, trajectory, *arguments)
    two = run_ranks(2, trajectory, *arguments)
    for rank in two:
        assert_close(rank, one, 2e-4)
    assert one[0]["loss"] != pytest.approx(one[-2]["loss"], rel=1e-3), "nothing was learned"


def test_clips_in_packs_of_two_train_as_each_alone(codec):
    """Padding counts nowhere. (Adversaries judge whole packs, so this holds of the codec.)"""
    alone = run_ranks(1, trajectory, Objective.codec, tokenizer_folder(), codec, 1)[0]
    paired = run_ranks(2, trajectory, Objective.codec, tokenizer_folder(), codec, 2)[0]
    keep = [{k: v for k, v in step.items() if k not in ("sizes", "codebooks")} for step in alone[:1]]
    assert_close(keep, [{k: paired[0][k] for k in keep[0]}], 2e-4)


def resumed(ranks: Ranks, objective: Objective, folder: str, codec: Path, run: str) -> tuple[list[dict], list[dict]]:
    """(the last two steps of a straight run, the same after a save and a load into a new trainer)."""
    config = config_of(objective, ranks.world, folder, codec)

    def fresh():
        return make_trainer(config, ranks, len(packs(0, 1, ranks.rank, ranks.world)))

    def steps(trainer, numbers):
        return [trainer.step(packs(step, 1, ranks.rank, ranks.world)) for step in numbers]

    straight = fresh()
    steps(straight, (0, 1))
    parts = {name: part.state_dict() for name, part in straight.stage.stateful.items()}
    checkpoint.save(Path(run), 2, straight.stage.engines, {"world": ranks.world}, parts, ranks, keep=1)
    found = steps(straight, (2, 3))
    again = fresh()
    _, parts = checkpoint.load_newest(Path(run), again.stage.engines, ranks)
    for name, part in again.stage.stateful.items():
        part.load_state_dict(parts[name])
    again.position = dataclasses.replace(straight.position, step=2, tokens=2.0 * sum(FRAMES))
    later = steps(again, (2, 3))
    for trainer, metrics in ((straight, found), (again, later)):
        state = [t for module in trainer.stage.modules().values() for t in module.state_dict().values()]
        state += [t for part in trainer.stage.stateful.values() for t in part.average.values()]
        metrics.append({"state": repr([t.double().sum().item() for t in state])})
    return found, later


@pytest.mark.parametrize("objective", list(COMPONENTS))
def test_a_resumed_stage_goes_on_to_the_bit(objective, codec, tmp_path):
    """Both optimizers, codebooks with their statistics, and the average of weights are in the checkpoint."""
    for straight, again in run_ranks(2, resumed, objective, tokenizer_folder(), codec, str(tmp_path)):
        assert straight == again
