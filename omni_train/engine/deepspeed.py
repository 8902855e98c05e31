"""DeepSpeed engines from typed configuration: the only place that knows DeepSpeed's dictionary."""

from __future__ import annotations

import logging
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
    Loss scaling over micro-batches is ours (sum / global count), so DeepSpeed's own averaging is bypassed at backward.
    """
    is_trained = num_trained > 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches if is_trained else 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": engine.zero_stage if is_trained else 0},
    }
    if engine.precision is Precision.bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
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
        return deepspeed.initialize(model=module, config=config)[0].module
    return deepspeed.initialize(model=module, model_parameters=parameter_groups(module, components), config=config)[0]


def set_learning_rates(engine, components: dict[str, ComponentConfig], scale: float) -> None:
    """Each group's rate = its component's rate × scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = components[group["component"]].lr * scale


class GradientGuard:
    """Notices non-finite gradients of trained parameters as they are made, before a reduction hides their origin.

    Looks at many at once: a look at each would be a tenth of a small model's backward.
    """

    WAITING_NUMBERS = 1 << 24  # gradients held back for a look, in numbers

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.waiting: list[torch.Tensor] = []
        self.num_waiting = 0
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._note)

    def _note(self, grad: torch.Tensor) -> None:
        self.waiting.append(grad.detach())  # the gradient itself, if held, would be copied on its way to `.grad`
        self.num_waiting += grad.numel()
        if self.num_waiting >= self.WAITING_NUMBERS:
            self._look()

    def _look(self) -> None:
        if self.waiting:
            norms = torch._foreach_norm(self.waiting)  # an eighth of the time of the largest number's
            self.bad |= ~torch.stack(norms).isfinite().all()
            self.waiting, self.num_waiting = [], 0

    def take(self) -> torch.Tensor:
        """Whether a non-finite gradient was seen since the last call, as a bool tensor."""
        self._look()
        seen, self.bad = self.bad, torch.zeros_like(self.bad)
        return seen
