"""What tests share: a micro model, synthetic documents of every modality, and ranks as forked processes.

    Case ──run_case (in N gloo ranks)──▶ Trajectory: metrics of every step, as Trainer.step returns them

A ``Case`` fixes what is trained and how the work is split. ``documents`` depends on what is trained only, so two cases
that differ in the split see the same tokens and must give the same trajectory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import deepspeed  # noqa: F401, E402  (what every rank needs is imported once, before the ranks are forked)
from deepspeed.module_inject import auto_ep_layer  # noqa: F401, E402

from omni_train import train  # noqa: E402
from omni_train.config import (  # noqa: E402
    AudioModelConfig,
    Code2WavModelConfig,
    CodecModelConfig,
    CodecTokens,
    ComponentConfig,
    CorpusConfig,
    DataConfig,
    DecoderModelConfig,
    EngineConfig,
    ModelConfig,
    MtpConfig,
    Objective,
    Precision,
    RunConfig,
    Schedule,
    StageConfig,
    TalkerDecoderConfig,
    TalkerModelConfig,
    TextModelConfig,
    VisionModelConfig,
)
from omni_train.config.post_training import (  # noqa: E402
    DistillationConfig,
    GspoConfig,
    RewardConfig,
    RolloutConfig,
)
from omni_train.data import encode  # noqa: E402
from omni_train.data.contracts import IGNORE_INDEX, NO_CODE, Document, Pack, Speech  # noqa: E402
from omni_train.data.media_tokens import audio_num_tokens  # noqa: E402
from omni_train.data.pipeline import media_geometry, speech_format  # noqa: E402
from omni_train.data.positions import audio_video_order, tm_rope_positions, video_token_times  # noqa: E402
from omni_train.data.tokenizer import TokenIds, load_tokenizer, token_ids, train_tokenizer  # noqa: E402
from omni_train.engine import deepspeed as engine_module  # noqa: E402
from omni_train.engine import parallel  # noqa: E402
from omni_train.engine.export import component_hashes, full_state_dict  # noqa: E402
from omni_train.engine.parallel import Ranks  # noqa: E402
from omni_train.launching.local import free_port  # noqa: E402
from omni_train.models import thinker, towers  # noqa: E402
from omni_train.models.attention import Segments  # noqa: E402
from omni_train.models.build import build_thinker, thinker_config  # noqa: E402
from omni_train.stage import build_stage  # noqa: E402

# ---------------------------------------------------------------------------------------------------- ranks


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_sec: float = 100.0) -> list[Any]:
    """What ``function(ranks, *args)`` returned on each of ``world`` gloo ranks; it must be a module's own function.

    Ranks are forked from a server that has imported this module, so that a start takes a fraction of a second. Raises
    RuntimeError with the traceback of the first rank that failed; the others are killed.
    """
    context = _fork_server()
    port, processes, pipes = free_port(), [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(sender, rank, world, port, timeout_sec - 2, function, args), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _results(pipes, time.monotonic() + timeout_sec)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _results(pipes: list[multiprocessing.connection.Connection], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(found))} did not answer in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, found[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
    return [found[rank] for rank in range(len(pipes))]


@functools.cache
def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support"])
    # NOTE: the server does not get our sys.path, and a preload that fails says nothing (it only makes every rank slow).
    folder, before = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *([before] if before else [])])
    from multiprocessing import forkserver

    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


def _rank(
    sender: Any, rank: int, world: int, port: int, timeout_sec: float, function: Callable[..., Any], args: tuple
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.settrace(None)  # coverage slows a rank two- to threefold; e2e tests count its lines
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # DeepSpeed prints
        warnings.simplefilter("ignore")
        faulthandler.dump_traceback_later(timeout_sec, file=sys.__stderr__)  # where a rank hangs
        try:
            ranks = parallel.start(EngineConfig(timeout_sec=120.0))
            sender.send((None, function(ranks, *args)))
            parallel.stop()
        except BaseException:
            sender.send((traceback.format_exc(), None))
            os._exit(1)  # a peer may hang in a collective: leave without the process group's goodbye


# ---------------------------------------------------------------------------------------------------- model

EVERYTHING = ("llm", "audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter")
TOWERS = EVERYTHING[1:]
TALKER = ("talker", "mtp")
ADAPTERS = ("audio_adapter", "vision_adapter")


@functools.cache
def tokenizer_folder() -> str:
    """A tokenizer of 300 tokens, made once a session; its folder goes away with the process."""
    folder = tempfile.TemporaryDirectory(prefix="omni-train-tokenizer-")
    _KEEP.append(folder)
    train_tokenizer(["user\nassistant\nwhat is this? a cat, a dog\n"] * 8, 300, Path(folder.name))
    return folder.name


_KEEP: list[tempfile.TemporaryDirectory] = []


def micro_talker(accept_hidden_layer: int, num_experts: int = 4, norm_topk_prob: bool = True) -> TalkerModelConfig:
    """A Talker of 2 layers over 32 codes in 4 groups."""
    return TalkerModelConfig(
        accept_hidden_layer=accept_hidden_layer,
        num_code_groups=4,
        codebook_size=32,
        tokens=CodecTokens(pad=132, bos=133, eos=134, nothink=139, think_bos=140, think_eos=141),
        speakers={"ethan": 200, "aiden": 201},
        decoder=TalkerDecoderConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=num_experts,
            num_experts_per_tok=2,
            mrope_section=[4, 2, 2],
            max_position_embeddings=512,
            rope_theta=10_000.0,
            norm_topk_prob=norm_topk_prob,
        ),
        mtp=MtpConfig(
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rope_theta=10_000.0,
        ),
    )


def micro_model(num_experts: int = 4, norm_topk_prob: bool = True) -> ModelConfig:
    """Every part of the real model, as small as it goes.

    NOTE: more LLM layers than DeepStack levels. What is added after the last layer stays where the pictures are, so
    with as many levels as layers the last merger gets no gradient.
    """
    return ModelConfig(
        name="micro",
        text=TextModelConfig(
            vocab_size=320,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            moe_intermediate_size=16,
            num_experts=num_experts,
            num_experts_per_tok=2,
            mrope_section=[4, 2, 2],
            max_position_embeddings=512,
            rope_theta=10_000.0,
        ),
        audio=AudioModelConfig(
            d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, downsample_hidden_size=4
        ),
        vision=VisionModelConfig(
            depth=2,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
            patch_size=4,
            min_pixels=64,
            max_pixels=4096,
        ),
        decoder=DecoderModelConfig(num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        codec=CodecModelConfig(encoder_dim=16, latent_dim=8, num_codebooks=4, codebook_size=32),
        code2wav=Code2WavModelConfig(
            num_quantizers=4,
            codebook_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            decoder_dim=32,
        ),
        talker=micro_talker(3, num_experts, norm_topk_prob),
    )


# ---------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A short training run: what is trained on what, and how the work is split."""

    # What: cases that agree in these must give the same trajectory.
    kinds: tuple[str, ...] = (
        "text",
        "short_audio",
        "image",
        "video",
        "image_audio",
        "audio",
        "silent_text",
        "video_audio",
    )
    components: tuple[str, ...] = EVERYTHING
    objective: str = "next_token"
    router_aux_coef: float = 0.1
    lr: float = 3e-3
    weight_decay: float = 0.1
    num_steps: int = 20
    data_seed: int = 0
    num_experts: int = 4
    ctc_weight: float = 0.0
    norm_topk_prob: bool = True  # the Talker's
    beta: float = 0.0
    kl_weight: float = 0.0
    # How.
    world: int = 1
    documents_per_pack: int = 1
    expert_parallel: int = 1
    zero_stage: int = 1
    precision: str = "fp32"
    recompute: bool = False
    bucket_numbers: int = 0  # largest bucket of gradients; 0: as the engine says, which here is one for all
    shards_all: bool = False  # ZeRO-3 leaves parameters under 1e5 entries whole: here it would shard none
    overlaps: bool = False  # gradients are reduced while others are computed, as on a GPU
    mutation: str = ""


def run_config(case: Case) -> RunConfig:
    """The configuration of a case.

    Why the comparison of trajectories is meaningful although AdamW's step is close to lr × sign(gradient) where a
    gradient is tiny: an entry whose sign rounding decides has a gradient of the size of rounding, so that moving it by
    lr either way changes the loss by about lr × 1e-9. lr is large enough to take nats off the loss within 20 steps, so
    that a wrong gradient shows, and small enough that differences of rounding do not grow.
    """
    return RunConfig(
        stage=StageConfig(
            name="test",
            objective=Objective[case.objective],
            components={name: ComponentConfig(lr=case.lr, weight_decay=case.weight_decay) for name in case.components},
            context=512,
            total_tokens=1e6,
            router_aux_coef=case.router_aux_coef,
            ctc_weight=case.ctc_weight,
            schedule=Schedule.constant,
            grad_clip=1.0,
            **post_training(case),
        ),
        model=micro_model(case.num_experts, case.norm_topk_prob),
        mixture={},
        data=DataConfig(root="unused", tokenizer=tokenizer_folder(), lanes=max(case.world, len(case.kinds))),
        engine=EngineConfig(
            num_processes=case.world,
            expert_parallel=case.expert_parallel,
            zero_stage=case.zero_stage,
            precision=Precision[case.precision],
            recompute=case.recompute,
        ),
        corpus=CorpusConfig(root="unused", vocab_size=320),
        init={"teacher": teacher_folder()} if case.objective == "distillation" else {},
        run_dir="unused",
    )


def post_training(case: Case) -> dict[str, Any]:
    """Settings of a stage that learns from answers, wide enough that clipping does not stop every gradient."""
    if case.objective == "distillation":
        return {"distillation": DistillationConfig(beta=case.beta, temperature=0.8)}
    if case.objective == "gspo":
        rewards = {"right": RewardConfig(rule="exact")}
        gspo = GspoConfig(rewards=rewards, clip_low=0.9, clip_high=20.0, kl_weight=case.kl_weight)
        rollout = RolloutConfig(max_prompt_tokens=100, max_new_tokens=24, group_size=2, temperature=0.9)
        return {"gspo": gspo, "rollout": rollout}
    return {}


@functools.cache
def teacher_folder() -> str:
    """An exported Thinker of another width and number of experts, away from its initial weights, to distil from."""
    folder = tempfile.TemporaryDirectory(prefix="omni-train-teacher-")
    _KEEP.append(folder)
    model = micro_model(num_experts=8)
    model.text.hidden_size, model.text.num_experts = 48, 8
    tokenizer = load_tokenizer(tokenizer_folder())
    teacher = build_thinker(thinker_config(model, tokenizer), seed=5)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.nn.init.normal_(teacher.lm_head.weight, std=0.3)
    teacher.save_pretrained(folder.name)
    tokenizer.save_pretrained(folder.name)
    return folder.name


def as_rollouts(pack: Pack) -> Pack:
    """The pack with what a pack of rollouts has: log-probabilities of its labels, an advantage for each document.

    A document's are its own, whatever pack it is in.
    """
    logs, advantages = [], []
    for name, length in zip(pack.sample_ids, pack.cu_seqlens.diff().tolist(), strict=True):
        rng = np.random.default_rng([int(number) for number in re.findall(r"\d+", name)])
        advantages.append(rng.standard_normal())
        logs.append(-rng.uniform(4.0, 7.0, length))
    pack.sampled_log_probabilities = torch.from_numpy(np.concatenate(logs)).float()
    pack.sampled_log_probabilities[pack.shift_labels == IGNORE_INDEX] = 0.0
    pack.advantages = torch.tensor(advantages).float()
    return pack


def document(kind: str, config: RunConfig, ids: TokenIds, rng: np.random.Generator, name: str) -> Document:
    """A random document of 16 words. Its labels are a suffix of 1 to 24 tokens; silent_text has none."""
    geometry = media_geometry(config.model.vision)
    mels, images, videos, has_sound = [], [], [], kind == "video_audio"
    tokens = rng.integers(0, 16, rng.integers(2, 6)).tolist()
    for medium in {"image_audio": ["image", "short_audio"]}.get(kind, [kind]):
        heard = []
        if medium.endswith("audio"):
            frames = int(rng.integers(9, 99) if medium == "short_audio" else rng.integers(101, 240))
            mels.append(rng.standard_normal((128, frames), dtype=np.float32))
            heard = [ids.audio_pad] * audio_num_tokens(frames)
        if medium.startswith(("image", "video")):
            grid = (1 if medium == "image" else 2, 2 * int(rng.integers(1, 3)), 2 * int(rng.integers(1, 4)))
            pad = ids.image_pad if medium == "image" else ids.video_pad
            (images if medium == "image" else videos).append(grid)
            seen = [pad] * (int(np.prod(grid)) // 4)
            if heard:
                order = audio_video_order(video_token_times(grid, 1.0, geometry), len(heard))
                seen = [ids.audio_start, *np.array(seen + heard)[order].tolist(), ids.audio_end]
            tokens += [ids.vision_start, *seen, ids.vision_end]
        elif heard:
            tokens += [ids.audio_start, *heard, ids.audio_end]
    num_labels = int(rng.integers(1, 25))
    input_ids = np.array(tokens + rng.integers(0, 16, num_labels).tolist(), dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    if kind != "silent_text":
        labels[-num_labels:] = input_ids[-num_labels:]
    positions = tm_rope_positions(
        input_ids,
        ids,
        audio_num_tokens=[audio_num_tokens(mel.shape[1]) for mel in mels],
        image_grids=images,
        video_grids=videos,
        seconds_per_grid=[1.0] * len(videos),
        use_audio_in_video=[has_sound] * len(videos),
        geometry=geometry,
    )

    def patches(grid: tuple[int, int, int]) -> np.ndarray:
        return rng.standard_normal((int(np.prod(grid)), geometry.patch_dim), dtype=np.float32)

    modality = {"short_audio": "audio", "image_audio": "image", "silent_text": "text"}.get(kind, kind)
    return Document(
        name, modality, input_ids, labels, positions, mels, [patches(g) for g in images], images,
        [patches(g) for g in videos], videos, [1.0] * len(videos), [has_sound] * len(videos),
    )  # fmt: skip


def speech_of(found: Document, config: RunConfig, ids: TokenIds, rng: np.random.Generator) -> Speech:
    """A random speech target of 1 to 12 frames, whose Talker hears the whole document as the user's."""
    talker = config.model.talker
    codes = rng.integers(0, talker.codebook_size, (talker.num_code_groups, int(rng.integers(1, 13))))
    num_new, start = 9 + codes.shape[1], found.position_ids.max() + 1
    is_media = np.isin(found.input_ids, (ids.audio_pad, ids.image_pad, ids.video_pad))
    tokens, speaker = talker.tokens, talker.speakers["aiden"]
    opening = [tokens.nothink, tokens.think_bos, tokens.think_eos, speaker, tokens.pad, tokens.bos]
    return Speech(
        text_ids=np.concatenate([found.input_ids, rng.integers(0, 16, num_new)]),
        codec_ids=np.array([NO_CODE] * (len(found.input_ids) + 3) + opening),
        position_ids=np.concatenate([found.position_ids, np.tile(start + np.arange(num_new), (3, 1))], axis=1),
        media_index=np.flatnonzero(is_media),
        codes=codes,
        input_codes=np.where(rng.random(codes.shape) < 0.1, 0, codes),
        end_label=tokens.eos,
    )


def documents(case: Case, config: RunConfig, ids: TokenIds, step: int) -> list[Document | None]:
    """The documents of a step over all ranks, one a kind; None for the kind "none" (a rank without data)."""
    rng = np.random.default_rng(step + 1000 * case.data_seed)
    found = [
        None if kind == "none" else document(kind, config, ids, rng, f"step{step}/{number}")
        for number, kind in enumerate(case.kinds)
    ]
    num_speeches = {"talker": 1, "talker_dpo": 2}.get(case.objective, 0)
    for one in found if num_speeches else []:
        if one is not None:
            one.speeches = [speech_of(one, config, ids, rng) for _ in range(num_speeches)]
    return found


def stock_arguments(found: Document) -> dict[str, torch.Tensor]:
    """Keyword arguments of the stock Thinker for one document with at most one clip, but for position_ids."""
    inputs = {"input_ids": torch.from_numpy(found.input_ids)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if found.mels:
        (mel,) = found.mels
        inputs["input_features"] = torch.from_numpy(mel)[None]
        inputs["feature_attention_mask"] = torch.ones(1, mel.shape[1], dtype=torch.long)
    if found.image_patches:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(found.image_patches))
        inputs["image_grid_thw"] = torch.tensor(found.image_grids)
    if found.video_patches:
        inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate(found.video_patches))
        inputs["video_grid_thw"] = torch.tensor(found.video_grids)
        inputs["video_second_per_grid"] = torch.tensor(found.video_seconds_per_grid)
    return inputs


def packs_of_rank(case: Case, config: RunConfig, ids: TokenIds, step: int, rank: int) -> list[Pack]:
    """This rank's micro-batches: packs of consecutive documents, dealt to the ranks in turn."""
    geometry = media_geometry(config.model.vision)
    found = documents(case, config, ids, step)
    groups = [found[n : n + case.documents_per_pack] for n in range(0, len(found), case.documents_per_pack)]
    packs = []
    for group in groups[rank :: case.world]:
        present = [item for item in group if item is not None]
        packs.append(
            encode.collate(present, patch_dim=geometry.patch_dim)
            if present
            else encode.dummy_pack(geometry, ids, speech_format(config, load_tokenizer(config.data.tokenizer)))
        )
        if case.objective == "gspo" and present:
            packs[-1] = as_rollouts(packs[-1])
    return packs


def make_trainer(config: RunConfig, ranks: Ranks, micro_batches: int) -> train.Trainer:
    """The real Trainer on packs from memory: its constructor's work without shards and loader."""
    trainer = object.__new__(train.Trainer)
    trainer.config, trainer.ranks = config, ranks
    trainer.stage = build_stage(config, load_tokenizer(config.data.tokenizer), ranks, micro_batches)
    trainer.position = train.Position()
    shape = trainer.stage.router_shape
    trainer.fractions = None if shape is None else torch.full(shape, 1.0 / shape[1])
    return trainer


def component_hashes_of(trainer: train.Trainer) -> dict[str, str]:
    """A hash of each component's weights. Collective: all ranks call it."""
    state: dict[str, torch.Tensor] = {}
    for module in trainer.stage.modules().values():
        state |= full_state_dict(module)
    return component_hashes(state)


Trajectory = dict[str, np.ndarray]
"""Metrics of Trainer.step by name, one value a step."""


def run_case(ranks: Ranks, case: Case, folder: str, teacher: str = "") -> Trajectory:
    """The trajectory of a case; called on every rank."""
    config = run_config_in(case, folder, teacher)
    ids = token_ids(load_tokenizer(folder))
    with contextlib.ExitStack() as stack:
        if case.mutation:
            stack.enter_context(MUTATIONS[case.mutation]())
        if case.bucket_numbers:
            stack.enter_context(mock.patch.dict(engine_module.BUCKET_NUMBERS, cpu=case.bucket_numbers))
        if case.shards_all:
            stack.enter_context(shard_all())
        if case.overlaps:
            stack.enter_context(zero_settings(overlap_comm=True, use_multi_rank_bucket_allreduce=True))
        micro_batches = len(packs_of_rank(case, config, ids, 0, ranks.rank))
        trainer = make_trainer(config, ranks, micro_batches)
        steps = []
        for step in range(case.num_steps):
            steps.append(trainer.step(packs_of_rank(case, config, ids, step, ranks.rank)))
            if case.shards_all:  # a look at held-out data changes nothing
                look(trainer, packs_of_rank(case, config, ids, step, ranks.rank))
    names = [name for name in steps[0] if name != "samples"]
    return {name: np.array([step[name] for step in steps]) for name in names}


@torch.no_grad()
def look(trainer: train.Trainer, packs: list[Pack]) -> None:
    """Runs packs as an evaluation does."""
    engines = [*trainer.stage.engines.values(), *trainer.stage.frozen.values()]
    for engine in engines:
        engine.eval()
    for pack in packs:
        trainer.stage.forward(pack)
    for engine in engines:
        engine.train()


def shard_all() -> contextlib.AbstractContextManager[None]:
    """ZeRO-3 shards every parameter, also small ones, and gathers each when its module begins, not before."""
    return zero_settings(stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=0)


@contextlib.contextmanager
def zero_settings(**values: Any) -> Iterator[None]:
    """Engines with other settings of ZeRO than the project's."""
    real = engine_module.deepspeed_config

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = real(*args, **kwargs)
        found["zero_optimization"] |= values
        return found

    with mock.patch.object(engine_module, "deepspeed_config", changed):
        yield


def run_config_in(case: Case, folder: str, teacher: str = "") -> RunConfig:
    """The configuration of a case on a rank, which must not make a tokenizer or a teacher of its own."""
    with (
        mock.patch(f"{__name__}.tokenizer_folder", lambda: folder),
        mock.patch(f"{__name__}.teacher_folder", lambda: teacher),
    ):
        return run_config(case)


@functools.cache
def trajectory(case: Case) -> Trajectory:
    """The trajectory of a case, run once a session; all ranks must report the same (unless the code is broken)."""
    teacher = teacher_folder() if case.objective == "distillation" else ""
    results = run_ranks(case.world, run_case, case, tokenizer_folder(), teacher)
    for other in results[1:] if not case.mutation else []:
        for name, values in other.items():
            assert np.allclose(values, results[0][name], rtol=1e-6), f"ranks report different {name}"
    return results[0]


# ---------------------------------------------------------------------------------------------------- comparison


def deviations(a: Trajectory, b: Trajectory) -> dict[str, tuple[float, float]]:
    """(largest |Δ|, |mean Δ|) relative to b, of loss, router loss and gradient norm over the steps.

    The mean keeps its sign: rounding averages out, a dropped factor does not.
    """
    found = {}
    for name in b:
        if name.startswith("loss") or name.startswith("grad_norm"):
            relative = (a[name] - b[name]) / np.maximum(np.abs(b[name]), 1e-12)
            found[name] = (float(np.abs(relative).max()), float(np.abs(relative.mean())))
    return found


LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
MEAN_SHARE = 0.5
"""The mean deviation may be this part of what the largest may be."""


def differences(a: Trajectory, b: Trajectory) -> list[str]:
    """What differs by more than the tolerances; empty when the trajectories are the same."""
    wrong = []
    for name, (largest, mean) in deviations(a, b).items():
        tolerance = NORM_TOLERANCE if name.startswith("grad_norm") else LOSS_TOLERANCE
        if not (largest <= tolerance and mean <= MEAN_SHARE * tolerance):
            wrong.append(f"{name}: largest {largest:.1e}, mean {mean:.1e}, allowed {tolerance:.0e}")
    return wrong


# ---------------------------------------------------------------------------------------------------- mutations


def _one_segment(lengths: list[int], device: torch.device | str = "cpu") -> Segments:
    """Segments that are all one: what lies beside each other attends to each other."""
    return Segments([sum(lengths)], device)


@contextlib.contextmanager
def _local_counts() -> Iterator[None]:
    """Each rank divides by its own labels: the average of averages."""
    real = train.Trainer._agree

    def local(trainer: train.Trainer, packs: list[Pack], *more: Any) -> tuple:
        divisors, *others = real(trainer, packs, *more)
        own = [trainer.stage.counts(pack) for pack in packs]
        world = torch.distributed.get_world_size()
        return {name: max(world * sum(c[name] for c in own), 1.0) for name in divisors}, *others

    with mock.patch.object(train.Trainer, "_agree", local):
        yield


def _world_factor(engine, loss: torch.Tensor) -> None:
    """As for ranks whose gradients are averaged."""
    engine.backward(loss * engine.world_size, scale_wrt_gas=False)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "world_factor": lambda: mock.patch.object(train, "backward", _world_factor),
    "local_counts": _local_counts,
    "pack_mask": lambda: mock.patch.object(thinker, "Segments", _one_segment),
    "media_mask": lambda: mock.patch.object(towers, "Segments", _one_segment),
    "labels_not_shifted": lambda: mock.patch.object(encode, "shift_labels", lambda labels: labels),
    "labels_shifted_twice": lambda: mock.patch.object(
        encode, "shift_labels", lambda labels: np.append(labels[2:], [IGNORE_INDEX] * 2)
    ),
}
"""Ways to break the code that the comparisons must notice; each is switched on inside the ranks."""
