"""TRL as an oracle: what its trainers compute for given tensors. The only file that knows TRL's internals.

None of its trainers trains here; each loss is called on a stand-in for ``self`` that has what the method reads.
"""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, SFTTrainer
from trl.experimental.gkd import GKDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import add_fused_lm_head


def sft_loss(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """SFTTrainer's loss of ``inputs`` (with unshifted ``labels``): a mean over labelled tokens, no router loss."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    accelerator = types.SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda value: value)
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=accelerator,
        args=types.SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return SFTTrainer.compute_loss(trainer, model, dict(inputs))


def generalized_jsd(student: Tensor, teacher: Tensor, labels: Tensor, beta: float, temperature: float) -> Tensor:
    """GKDTrainer's divergence, a mean over labelled positions, of logits [B, T, V]."""
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta, temperature=temperature)


def chunked_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, beta: float, temperature: float
) -> Tensor:
    """TRL's chunked kernel: divergence [K] from hidden states and heads."""
    states = hidden, weight, None, teacher_hidden, teacher_weight, None
    return ChunkedDivergenceFunction.apply(*states, beta, temperature)[0]


def gspo_loss(
    log_probabilities: Tensor,
    sampled: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    reference: Tensor | None = None,
    kl_weight: float = 0.0,
) -> Tensor:
    """GRPOTrainer's loss of padded answers [B, T] with one ratio a sequence, a mean over sequences."""
    accelerator = types.SimpleNamespace(
        gather=lambda value: value, reduce=lambda value, **_: value, num_processes=1, sync_gradients=True
    )
    model = types.SimpleNamespace(training=True)
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=accelerator,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probabilities, torch.zeros_like(mask), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence",
        loss_type="grpo",
        beta=kl_weight,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
    )
    ids = mask.long()
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": advantages, "old_per_token_logps": sampled, "ref_per_token_logps": reference}
    return GRPOTrainer._compute_loss(trainer, model, inputs)


def overlong_punishment(lengths: list[int], limit: int, buffer: int) -> list[float]:
    """TRL's soft punishment of answers of these lengths in tokens."""
    return get_soft_overlong_punishment(limit, buffer)([[0] * length for length in lengths])
