"""DeepSpeed engines from typed configuration: the only place that knows DeepSpeed's dictionary."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from omni_train.config import ComponentConfig, EngineConfig, Precision, StageConfig
from omni_train.models.components import parameter_groups

BUCKET_NUMBERS = {"cuda": 500_000_000, "cpu": 1_000_000}
"""Largest bucket of gradients, in numbers: DeepSpeed's own size; on CPU one that a processor's cache holds."""
MOE_LAYERS = r"((llm|talker)\.)?model\.layers\.\d+\.mlp"


def has_experts(module: nn.Module) -> bool:
    """Whether a module holds MoE blocks that AutoEP takes over."""
    return any(name.endswith("mlp.experts.gate_up_proj") for name, _ in module.named_parameters())


def deepspeed_config(
    engine: EngineConfig, stage: StageConfig, *, num_trained: int, moe: Any | None, micro_batches: int
) -> dict[str, Any]:
    """The DeepSpeed dictionary of one engine that trains ``num_trained`` numbers (0: a frozen one).

    ``moe`` is the text configuration of a module with experts, else None.
    Losses are sums over ranks and micro-batches (divided by global counts), so gradients are summed, not averaged
    (ZeRO 3 knows averages only: see ``backward``).
    """
    is_trained = num_trained > 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches if is_trained else 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": engine.zero_stage if is_trained else 0},
        "gradient_allreduce_op": "mean" if engine.zero_stage == 3 else "sum",
    }
    if engine.precision is Precision.bf16 and is_trained:
        # Each gradient goes to its fp32 sum, and out of memory, when it is there. NOTE: else it is cleared by a hook on
        # outputs that the towers do not have (see ``backward``): with each pack the ones before were added again.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"  # else these sums are rounded to bf16 before ranks add theirs
    if moe is not None:
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": engine.expert_parallel,
            "preset_model": "qwen3_moe",
            "moe_layer_pattern": MOE_LAYERS,
            "top_k": moe.num_experts_per_tok,
            "route_norm": moe.norm_topk_prob,
        }
        if hasattr(moe, "shared_expert_intermediate_size"):  # the Talker's; without this AutoEP drops it silently
            config["expert_parallel"] |= {
                "has_shared_experts": True,
                "shared_experts_pattern": "shared_expert",
                "shared_experts_gate_pattern": "shared_expert_gate",
            }
    if is_trained:
        # overlap_comm needs streams; on CPU it only adds copies.
        config["zero_optimization"] |= {"overlap_comm": engine.device == "cuda", "contiguous_gradients": True}
        # On CPU each rank's share goes to it alone: all of it to all is twice the copies, which are what it costs.
        config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = engine.device == "cuda"
        # A buffer of this size is made at every backward.
        config["zero_optimization"]["reduce_bucket_size"] = min(num_trained, BUCKET_NUMBERS[engine.device])
        config["gradient_clipping"] = stage.grad_clip
        config["optimizer"] = {
            "type": "AdamW",
            # torch's fused kernel: a ninth of the time of its plain one on CPU, and nothing to compile on a GPU.
            "params": {"lr": 0.0, "betas": list(stage.betas), "eps": 1e-8, "torch_adam": True, "fused": True},
        }
    return config


def build_engine(
    module: nn.Module,
    engine: EngineConfig,
    stage: StageConfig,
    components: dict[str, ComponentConfig] | None,
    *,
    micro_batches: int,
):
    """A DeepSpeed engine that trains ``components`` of ``module``; or, without, the frozen module, its experts sharded.

    NOTE: a frozen module is called directly: its engine's forward would refuse the backward that flows through it.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    config = deepspeed_config(
        engine,
        stage,
        num_trained=sum(p.numel() for p in module.parameters() if p.requires_grad) if components else 0,
        moe=module.config if has_experts(module) else None,
        micro_batches=micro_batches,
    )
    if components is None:
        module.requires_grad_(False)
        in_precision(module, engine.precision)  # DeepSpeed's own bf16 wants an optimizer, also one of experts
        return deepspeed.initialize(model=module, config=config)[0].module
    groups = parameter_groups(module, components)
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory after each group
        return deepspeed.initialize(model=module, model_parameters=groups, config=config)[0]


def in_precision(module: nn.Module, precision: Precision) -> nn.Module:
    """A frozen module with its parameters in a precision; buffers stay: rotary frequencies are fp32."""
    if precision is Precision.bf16:
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    return module


def set_learning_rates(engine, components: dict[str, ComponentConfig], scale: float) -> None:
    """Each group's rate = its component's rate × scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = components[group["component"]].lr * scale


def backward(engine, loss: torch.Tensor) -> None:
    """Gradients of ``loss``, a rank's share of a sum over ranks, added to those of the step's packs before."""
    # NOTE: DeepSpeed tells the optimizer from hooks on the outputs of a forward, which it finds in tuples, lists and
    # dictionaries alone, whether this is the step's last pack. Those of towers are in none: on a GPU, where gradients
    # are reduced while others are computed, what came after a step's first pack was lost.
    engine.optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())
    # ZeRO 3 averages.
    engine.backward(loss * engine.world_size if engine.gradient_average else loss, scale_wrt_gas=False)


@contextlib.contextmanager
def non_finite_gradients(engines: Iterable) -> Iterator[list[tuple[int, str]]]:
    """Trained parameters whose gradient is found not finite within the block, in the order of backward: how many
    gradients came before, and "gradient of" its name.

    For looking after the fact: at every step it would be a tenth of a small model's backward.
    """
    found: list[tuple[int, str]] = []
    numbers = itertools.count()

    def note(name: str, grad: torch.Tensor) -> None:
        before = next(numbers)
        if not grad.isfinite().all():
            found.append((before, f"gradient of {name}"))

    parameters = [pair for engine in engines for pair in engine.module.named_parameters() if pair[1].requires_grad]
    hooks = [parameter.register_hook(functools.partial(note, name)) for name, parameter in parameters]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
