"""Variable-length attention: documents of a pack, clips and pictures attend within themselves only.

Registered with transformers under ``VARLEN``. The towers and the language model call it with ``varlen=Segments`` for
packed sequences; with a dense ``attention_mask`` (generation) it is plain SDPA. No T × T mask is built for a pack.

Shapes: T tokens of the pack, S segments, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

VARLEN = "omni_flash_varlen"
"""NOTE: the name must contain "flash": only then do upstream's towers make one call instead of one a segment."""


@dataclass(slots=True)
class Bucket:
    """Segments of similar length as a padded block: ``index`` [n, m] token numbers; ``valid`` [n, m], None: all."""

    index: Tensor
    valid: Tensor | None


@dataclass(slots=True)
class Segments:
    """How T tokens fall into segments, as a few padded blocks. ``restore`` [T] undoes the order of the blocks."""

    buckets: list[Bucket]
    restore: Tensor

    @staticmethod
    def of(lengths: list[int], device: torch.device | str = "cpu") -> Segments:
        """The plan for consecutive segments of these lengths; each block holds lengths within a factor of 1.5."""
        ends = torch.tensor(lengths).cumsum(0)
        starts = (ends - torch.tensor(lengths)).tolist()
        order = sorted((n for n in range(len(lengths)) if lengths[n] > 0), key=lambda n: lengths[n])
        groups: list[list[int]] = []
        for n in order:
            if groups and lengths[n] <= 1.5 * lengths[groups[-1][0]] + 2:
                groups[-1].append(n)
            else:
                groups.append([n])
        buckets, visited = [], []
        for group in groups:
            longest = lengths[group[-1]]
            size = torch.tensor([lengths[n] for n in group])[:, None]
            step = torch.arange(longest)[None, :]
            valid = step < size
            index = torch.tensor([starts[n] for n in group])[:, None] + torch.minimum(step, size - 1)
            visited.append(index[valid])
            buckets.append(Bucket(index.to(device), None if bool(valid.all()) else valid.to(device)))
        order_T = torch.cat(visited) if visited else torch.zeros(0, dtype=torch.long)
        return Segments(buckets, order_T.argsort().to(device))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float) -> Tensor:
    """Attention within segments: q [T, Hq, D], k and v [T, Hkv, D] → [T, Hq, D]; Hq a multiple of Hkv."""
    outputs = []
    for bucket in segments.buckets:
        qb, kb, vb = (x[bucket.index].transpose(1, 2) for x in (q, k, v))  # [n, H, m, D]
        # Causal queries never look at the padding behind them; others need it masked.
        mask = None if causal or bucket.valid is None else bucket.valid[:, None, None, :]
        out = F.scaled_dot_product_attention(
            qb, kb, vb, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        outputs.append(out.flatten(0, 1) if bucket.valid is None else out[bucket.valid])
    return torch.cat(outputs)[segments.restore]


def _attention(module, query, key, value, attention_mask=None, *, scaling=None, varlen=None, is_causal=None, **kwargs):
    """transformers' attention signature: query [B, Hq, T, D] → ([B, T, Hq, D], None)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if varlen is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    causal = module.is_causal if is_causal is None else is_causal
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return segment_attention(q, k, v, varlen, causal=causal, scale=scale)[None], None


AttentionInterface.register(VARLEN, _attention)
AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
