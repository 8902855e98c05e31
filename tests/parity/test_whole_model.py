"""One folder made of the exports of stages: stock `transformers` loads all of it and answers in text and sound."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stock import MICRO, stock_inputs
from stock_omni import NUM_FRAMES, NUM_TEXT, Models, build_models, model_of
from support import tokenizer_folder
from transformers import Qwen3OmniMoeForConditionalGeneration

from omni_train.config import ConfigError
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.export import write_omni, write_processor

COMPONENTS = ("llm", "audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter")


@pytest.fixture(scope="module")
def models() -> Models:
    found = build_models(3, tokenizer_folder())
    for parameter in found.stock.code2wav.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.02)
    return found


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Exports as stages write them: a Thinker's, a Talker's, a Code2Wav's."""
    root = tmp_path_factory.mktemp("exports")
    models.stock.thinker.save_pretrained(root / "thinker")
    for name, module in (("talker", models.talker), ("code2wav", models.stock.code2wav)):
        prefix = "code2wav." if name == "code2wav" else ""
        (root / name).mkdir()
        state = {prefix + key: value.contiguous() for key, value in module.named_parameters()}
        save_file(state, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"model_type": f"omni_train_{name}"}))
    init = {component: str(root / "thinker") for component in COMPONENTS}
    return init | {"talker": str(root / "talker"), "mtp": str(root / "talker"), "code2wav": str(root / "code2wav")}


@pytest.fixture(scope="module")
def loaded(folders, tmp_path_factory):
    """(stock's whole model from the folder, what loading reported, the folder)."""
    folder = tmp_path_factory.mktemp("whole") / "omni"
    assert write_omni(model_of(3), load_tokenizer(tokenizer_folder()), folders, folder, ", ".join) == folders
    assert (folder / "README.md").read_text() == ", ".join(sorted(folders))
    model, report = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    return model.eval(), report, folder


def test_nothing_is_missing_and_every_weight_is_ours(loaded, models):
    model, report, _ = loaded
    assert {name: list(found) for name, found in report.items() if found} == {}
    theirs, expected = dict(model.named_parameters()), dict(models.stock.named_parameters())
    assert set(theirs) == set(expected)
    assert [name for name in theirs if not theirs[name].equal(expected[name])] == []


@pytest.mark.parametrize("kind", ["text", "image_audio"])
def test_it_answers_in_text_and_sound(kind, loaded, models, tmp_path):
    """A picture beside a sound too, over which stock's own configuration of the Talker stumbles."""
    model, _, folder = loaded
    write_processor(MICRO, tmp_path)
    load_tokenizer(tokenizer_folder()).save_pretrained(tmp_path)
    inputs = stock_inputs(kind, tmp_path, tmp_path, answer="")
    options = {
        "speaker": "aiden",
        "thinker_max_new_tokens": NUM_TEXT,
        "thinker_eos_token_id": None,
        "thinker_pad_token_id": 0,
        "talker_max_new_tokens": NUM_FRAMES,
        "talker_min_new_tokens": NUM_FRAMES,
        "talker_pad_token_id": 0,
        "talker_do_sample": False,
    }
    found = []
    for answering in (model, models.stock):
        with torch.no_grad():
            text, wave = answering.generate(**inputs, **options)
        found.append((text[0].tolist(), wave[0, 0].numpy()))
    assert len(found[0][0]) == inputs["input_ids"].shape[1] + NUM_TEXT
    assert found[0][0] == found[1][0]
    assert found[0][1].size > 100 and np.isfinite(found[0][1]).all() and found[0][1].std() > 1e-6
    assert np.abs(found[0][1] - found[1][1]).max() < 1e-5


def test_a_component_without_a_folder_is_named(folders, tmp_path):
    without = {name: folder for name, folder in folders.items() if name != "code2wav"}
    with pytest.raises(ConfigError, match="init has no folder for code2wav"):
        write_omni(model_of(3), load_tokenizer(tokenizer_folder()), without, tmp_path / "omni")


def test_a_voice_that_stock_cannot_load_is_named(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"code2wav": {"head": "istft"}}}))
    with pytest.raises(ConfigError, match="has the head 'istft', which stock transformers does not have"):
        write_omni(
            model_of(3), load_tokenizer(tokenizer_folder()), folders | {"code2wav": str(tmp_path)}, tmp_path / "omni"
        )
