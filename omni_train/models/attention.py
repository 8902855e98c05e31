"""Variable-length attention: documents of a pack, clips and pictures attend within themselves only.

Registered with transformers under ``VARLEN``. The towers and the language model call it with ``varlen=Segments`` for
packed sequences; with a dense ``attention_mask`` (generation) it is plain SDPA. No T × T mask is built for a pack.

Half precision on a GPU takes PyTorch's varlen flash attention, in one call; all else SDPA on a few padded blocks.

Shapes: T tokens of the pack, S segments, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

VARLEN = "omni_flash_varlen"
"""NOTE: the name must contain "flash": only then do upstream's towers make one call instead of one a segment."""


@dataclass(slots=True)
class Bucket:
    """Segments of similar length as a padded block: ``index`` [n, m] token numbers; ``valid`` [n, m], None: all."""

    index: Tensor
    valid: Tensor | None


class Segments:
    """How T tokens fall into consecutive segments, none of them empty. Built once for all layers, as first asked for.

    NOTE: all of it on the host, then moved: reading from the device would wait for it, and each layer again.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = [length for length in lengths if length > 0]
        self.device = device
        self.longest = max(self.lengths, default=0)

    @cached_property
    def boundaries(self) -> Tensor:
        """int32 [S + 1]: where each segment begins, and the end."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32).to(self.device)

    @cached_property
    def blocks(self) -> tuple[list[Bucket], Tensor]:
        """A few padded blocks, each of lengths within a factor of 1.5; where each token stands in all of them, [T]."""
        lengths = self.lengths
        starts = (torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)).tolist()
        groups: list[list[int]] = []
        for n in sorted(range(len(lengths)), key=lambda n: lengths[n]):
            if groups and lengths[n] <= 1.5 * lengths[groups[-1][0]] + 2:
                groups[-1].append(n)
            else:
                groups.append([n])
        buckets, place_T, num_slots = [], torch.zeros(sum(lengths), dtype=torch.long), 0
        for group in groups:
            size = torch.tensor([lengths[n] for n in group])[:, None]
            step = torch.arange(lengths[group[-1]])[None, :]
            valid = step < size
            index = torch.tensor([starts[n] for n in group])[:, None] + torch.minimum(step, size - 1)
            place_T[index[valid]] = num_slots + valid.flatten().nonzero()[:, 0]
            num_slots += index.numel()
            buckets.append(Bucket(index.to(self.device), None if bool(valid.all()) else valid.to(self.device)))
        return buckets, place_T.to(self.device)


def has_flash(q: Tensor) -> bool:
    """Whether PyTorch's flash attention takes queries like these: its heads have multiples of 8 numbers, to 256."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float) -> Tensor:
    """Attention within segments: q [T, Hq, D], k and v [T, Hkv, D] → [T, Hq, D]; Hq a multiple of Hkv."""
    is_grouped = q.shape[1] != k.shape[1]
    if has_flash(q):
        where = segments.boundaries, segments.boundaries, segments.longest, segments.longest  # of queries and of keys
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, *where, scale=scale, window_size=window, enable_gqa=is_grouped)
    outputs = []
    buckets, place_T = segments.blocks
    for bucket in buckets:
        qb, kb, vb = (x[bucket.index].transpose(1, 2) for x in (q, k, v))  # [n, H, m, D]
        # Causal queries never look at the padding behind them; others need it masked.
        mask = None if causal or bucket.valid is None else bucket.valid[:, None, None, :]
        out = F.scaled_dot_product_attention(
            qb, kb, vb, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=is_grouped
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[place_T]


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
