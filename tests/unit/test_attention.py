"""Attention within segments against a dense masked reference, and the plan of segments by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from omni_train.models import attention
from omni_train.models.attention import Segments, _attention, segment_attention


def dense(q, k, v, lengths, causal, scale):
    """The definition: softmax over the keys of the own segment, in float64, one head at a time."""
    tokens, heads, _ = q.shape
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = segment[:, None] == segment[None, :]
    if causal:
        allowed &= torch.arange(tokens)[:, None] >= torch.arange(tokens)[None, :]
    out = torch.empty_like(q, dtype=torch.float64)
    for head in range(heads):
        kv = head // (heads // k.shape[1])
        scores = (q[:, head].double() @ k[:, kv].double().T) * scale
        out[:, head] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, kv].double()
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [[7], [1, 1, 1], [5, 2, 9, 1, 3], [3, 0, 4], [40, 1, 40, 2], [4, 4, 4], list(range(1, 20))],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_equals_a_dense_reference(lengths, causal, kv_heads):
    generator = torch.Generator().manual_seed(sum(lengths))
    q = torch.randn(sum(lengths), 4, 8, generator=generator)
    k, v = (torch.randn(sum(lengths), kv_heads, 8, generator=generator) for _ in range(2))
    found = segment_attention(q, k, v, Segments(lengths), causal=causal, scale=0.3)
    assert (found - dense(q, k, v, lengths, causal, 0.3)).abs().max() < 1e-6


def test_by_hand():
    """Two segments of two tokens, one head of width 1, scale 1, all keys 0: weights are even, values are averaged."""
    q, k = torch.ones(4, 1, 1), torch.zeros(4, 1, 1)
    v = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(4, 1, 1)
    both = segment_attention(q, k, v, Segments([2, 2]), causal=False, scale=1.0)
    assert both.flatten().tolist() == [2.0, 2.0, 20.0, 20.0]
    left = segment_attention(q, k, v, Segments([2, 2]), causal=True, scale=1.0)
    assert left.flatten().tolist() == [1.0, 2.0, 10.0, 20.0]


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_those_of_the_reference(causal):
    lengths = [5, 2, 9, 1]
    inputs = [torch.randn(17, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    weight = torch.randn(17, 4, 8)
    (segment_attention(*inputs, Segments(lengths), causal=causal, scale=0.3) * weight).sum().backward()
    found = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    (dense(*inputs, lengths, causal, 0.3) * weight).sum().backward()
    for x, grad in zip(inputs, found, strict=True):
        assert (x.grad - grad).abs().max() < 1e-5


def test_plan_by_hand():
    """Lengths 2, 9, 3 and 0: 2 and 3 are alike (3 ≤ 1.5 · 2 + 2) and share a padded block, 9 has its own."""
    buckets, place = Segments([2, 9, 3, 0]).blocks
    assert [bucket.index.tolist() for bucket in buckets] == [[[0, 1, 1], [11, 12, 13]], [list(range(2, 11))]]
    assert buckets[0].valid.tolist() == [[True, True, False], [True, True, True]]
    assert buckets[1].valid is None
    # The blocks hold tokens 0 1 - 11 12 13 2 … 10; where each of them is found:
    assert place.tolist() == [0, 1, *range(6, 15), 3, 4, 5]


@pytest.mark.parametrize("lengths", [[1] * 50, list(range(1, 60)), [1000, 1, 500, 2, 250]])
def test_every_token_is_in_one_block_and_padding_is_bounded(lengths):
    buckets, place = Segments(lengths).blocks
    seen = torch.cat([b.index.flatten() if b.valid is None else b.index[b.valid] for b in buckets])
    assert sorted(seen.tolist()) == list(range(sum(lengths)))
    slots = torch.cat([bucket.index.flatten() for bucket in buckets])
    assert torch.equal(slots[place], torch.arange(sum(lengths)))
    assert len(slots) <= 1.5 * sum(lengths) + 2 * len(lengths)


@pytest.fixture
def flash(monkeypatch):
    """As on a GPU in half precision, where PyTorch's kernel is called in place of the blocks."""
    monkeypatch.setattr(attention, "has_flash", lambda q: True)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gpus_kernel_is_asked_for_the_same(flash, monkeypatch, causal):
    """With a kernel in its place that does what PyTorch's documentation says of each argument."""
    calls = []

    def documented(q, k, v, begin_q, begin_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        calls.append((begin_q.dtype, begin_k.tolist(), longest_q, longest_k, enable_gqa))
        return dense(q, k, v, begin_q.diff().tolist(), {(-1, 0): True, (-1, -1): False}[window_size], scale).float()

    monkeypatch.setattr(attention, "varlen_attn", documented)
    q, k, v = (torch.randn(7, heads, 8) for heads in (4, 2, 2))
    found = segment_attention(q, k, v, Segments([3, 0, 4]), causal=causal, scale=0.3)
    assert (found - dense(q, k, v, [3, 4], causal, 0.3)).abs().max() < 1e-6
    assert calls == [(torch.int32, [0, 3, 7], 4, 4, True)]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_pytorchs_kernel_takes_the_call(flash, kv_heads):
    """On tensors without data: the arguments, the shapes of what it gives, and that it has gradients."""
    q, k, v = (
        torch.randn(7, n, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, kv_heads, kv_heads)
    )
    out = segment_attention(q, k, v, Segments([3, 4], "meta"), causal=True, scale=0.3)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_no_kernel_but_the_blocks_without_a_gpu():
    assert not attention.has_flash(torch.zeros(1, 1, 8, dtype=torch.bfloat16))


def test_transformers_calls_use_the_modules_causality_and_the_default_scale():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 6, 8, generator=generator)
    k, v = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(2))
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    for module_is_causal in (True, False):
        module = SimpleNamespace(is_causal=module_is_causal)
        found, weights = _attention(module, q, k, v, varlen=Segments([2, 4]))
        assert weights is None and found.shape == (1, 6, 4, 8)
        assert (found[0] - dense(*rows, [2, 4], module_is_causal, 8**-0.5)).abs().max() < 1e-6
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    generated, _ = _attention(SimpleNamespace(is_causal=True), q, k, v, mask)
    assert (generated[0] - dense(*rows, [6], True, 8**-0.5)).abs().max() < 1e-6
