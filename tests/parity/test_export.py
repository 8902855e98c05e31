"""From the same files, our engine under expert parallelism and stock `transformers` on its export: the same logits.

Videos too: what stock is fed comes from its whole processor where torchvision is there (``make test-torchvision``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stock import KINDS, config_of, encoder_of, perturb, sample, stock_inputs, stock_thinker
from support import run_ranks, tokenizer_folder

from omni_train.data.encode import collate
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.export import export
from omni_train.engine.parallel import Ranks
from omni_train.stage import build_modules

TOLERANCE = 1e-5
SCALE_OF_LOGITS = 1.0  # at least: an error of 1e-5 on tiny logits would prove nothing


def export_and_run(ranks: Ranks, tokenizer: str, folder: str, yarn_factor: float) -> dict[str, np.ndarray]:
    """Export a Thinker whose experts two ranks share; its logits of each document of one pack of all kinds."""
    config = config_of(yarn_factor=yarn_factor, expert_parallel=2, folder=tokenizer)
    modules = build_modules(config, load_tokenizer(tokenizer))
    perturb(modules["thinker"])
    thinker = build_engine(modules["thinker"], config.engine, config.stage, None, micro_batches=1).eval()
    export({"thinker": thinker}, config, load_tokenizer(tokenizer), Path(folder) / "export")
    encoder = encoder_of(tokenizer)
    media = Path(folder) / f"rank{ranks.rank}"
    media.mkdir()
    pack = collate([encoder.encode(sample(kind, media)) for kind in KINDS], patch_dim=encoder.geometry.patch_dim)
    pack.shift_labels = torch.zeros_like(pack.shift_labels)  # logits everywhere
    seen: list[torch.Tensor] = []
    thinker.llm.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        thinker(pack)
        logits = thinker.llm.lm_head(seen[0])
    return dict(zip(KINDS, (part.numpy() for part in logits.split(pack.cu_seqlens.diff().tolist())), strict=True))


@pytest.fixture(scope="module", params=[1.0, 4.0], ids=["rope", "yarn"])
def exported(request, tmp_path_factory):
    """(export folder, folder of media files, our logits by kind on each rank)."""
    folder = tmp_path_factory.mktemp("export")
    logits = run_ranks(2, export_and_run, tokenizer_folder(), str(folder), request.param)
    return folder / "export", folder / "rank0", logits


@pytest.fixture(scope="module")
def stock(exported):
    return stock_thinker(exported[0])


def test_stock_loads_it_whole(stock):
    _, info = stock
    assert {name: list(found) for name, found in info.items() if found} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, exported, stock):
    export_folder, media, ours = exported
    inputs = stock_inputs(kind, media, export_folder)
    with torch.no_grad():
        theirs = stock[0](**inputs, use_cache=False).logits[0].numpy()
    assert np.abs(theirs).max() > SCALE_OF_LOGITS
    for rank in range(2):
        assert ours[rank][kind].shape == theirs.shape
        assert np.abs(ours[rank][kind] - theirs).max() <= TOLERANCE


def test_a_wrong_order_of_experts_would_show(exported, stock):
    export_folder, media, ours = exported
    model, swapped = stock[0], [4, 5, 6, 7, 0, 1, 2, 3]  # the halves that the two ranks hold
    experts = [layer.mlp.experts.down_proj for layer in model.model.language_model.layers]
    for weights in experts:
        weights.data = weights.data[swapped]
    with torch.no_grad():
        changed = model(**stock_inputs("text", media, export_folder), use_cache=False).logits[0].numpy()
    for weights in experts:
        weights.data = weights.data[swapped]
    assert np.abs(changed - ours[0]["text"]).max() > 0.1
