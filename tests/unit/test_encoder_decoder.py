"""AuT and the captioner: transcripts against a plain loop, packs against single documents, an export's way back."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from support import Case, documents, run_config, token_ids, tokenizer_folder

from omni_train.config import ConfigError
from omni_train.data.contracts import IGNORE_INDEX, Sample
from omni_train.data.encode import Encoder, collate, dummy_pack
from omni_train.data.pipeline import media_geometry
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.export import write_parts
from omni_train.evaluation import transcription
from omni_train.models.encoder_decoder import pad_rows
from omni_train.rollout.generate import transcribe
from omni_train.stage import build_modules

NEVER, NEW_TOKENS = -1, 10


def config_of(objective: str):
    components = {"transcription": ("audio_encoder", "aut_decoder"), "captioning": ("vision_encoder", "vision_decoder")}
    config = run_config(Case(components=components[objective], objective=objective))
    config.stage.ctc_weight = 0.3 if objective == "transcription" else 0.0
    return config


def build(objective: str):
    """(module away from its initial weights, encoder)."""
    config, tokenizer = config_of(objective), load_tokenizer(tokenizer_folder())
    (module,) = build_modules(config, tokenizer).values()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval(), Encoder(tokenizer, media_geometry(config.model.vision))


@pytest.fixture(scope="module")
def aut():
    return build("transcription")


def speech(number: int, seconds: float, question: str = "what is said?") -> Sample:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * rng.standard_normal(int(16_000 * seconds)).astype(np.float32), 16_000, format="flac")
    parts = [{"type": "audio", "audio": "a.flac"}, {"type": "text", "text": question}]
    content = {
        "task": "spoken_word",
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": f"cat {number}"}],
    }
    return Sample("speech", "shard", str(number), content, {"a.flac": buffer.getvalue()})


SAMPLES = [
    speech(0, 0.3),
    speech(1, 2.2, "a longer question?"),
    speech(2, 1.0, "what?"),
    speech(3, 0.9),
    speech(4, 1.7, "?"),
]


def plain_loop(module, encoder, sample, window: int) -> list[int]:
    """One clip at a time, the whole decoder anew for every token."""
    document = encoder.prompt_and_answer(sample)[0]
    pack = collate([document], [window], patch_dim=encoder.geometry.patch_dim)
    ids = [token for token in document.input_ids.tolist() if token != encoder.ids.audio_pad]
    with torch.no_grad():
        memory, mask = module.encode(pack)
        for _ in range(NEW_TOKENS):
            hidden = module.decode(torch.tensor([ids]), memory, mask)
            ids.append(int(module.text_decoder.head(hidden[0, -1]).argmax()))
    return ids[-NEW_TOKENS:]


@pytest.mark.parametrize("window", [1, 8])
def test_transcripts_equal_a_plain_loop_over_single_clips(window, aut):
    module, encoder = aut
    documents = [encoder.prompt_and_answer(sample)[0] for sample in SAMPLES]
    pack = collate(documents, [window] * len(documents), patch_dim=encoder.geometry.patch_dim)
    found = transcribe(module, pack, stop_id=NEVER, max_new_tokens=NEW_TOKENS)
    expected = [plain_loop(module, encoder, sample, window) for sample in SAMPLES]
    assert found == expected
    assert len({tuple(row) for row in found}) > 1 and len({token for row in found for token in row}) > 3


def test_windows_matter_and_answers_stop(aut):
    module, encoder = aut
    document = encoder.prompt_and_answer(SAMPLES[1])[0]
    memory = []
    for window in (1, 8):
        pack = collate([document], [window], patch_dim=encoder.geometry.patch_dim)
        with torch.no_grad():
            memory.append(module.encode(pack)[0])
    assert (memory[0] - memory[1]).abs().max() > 1e-3
    free = transcribe(module, pack, stop_id=NEVER, max_new_tokens=NEW_TOKENS)[0]
    stop = free[-1]
    assert transcribe(module, pack, stop_id=stop, max_new_tokens=NEW_TOKENS)[0] == free[: free.index(stop)]


def test_transcribe_all_keeps_the_order_of_samples(aut, monkeypatch):
    module, encoder = aut
    monkeypatch.setattr(transcription, "BATCH_FRAMES", 250)
    found = transcription.transcribe_all(module, encoder, SAMPLES, [8, 1], 24)
    assert list(found) == [8, 1]
    for window in (1, 8):
        assert [reference for _, reference in found[window]] == [f"cat {n}" for n in range(5)]
        singles = [transcription.transcribe_all(module, encoder, [s], [window], 24)[window][0] for s in SAMPLES]
        assert found[window] == singles


def test_an_export_transcribes_as_the_module_it_was_written_from(aut, tmp_path):
    module, encoder = aut
    write_parts(module.state_dict(), config_of("transcription"), tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = transcription.load_transcriber(tmp_path)
    kept = dict(module.named_parameters())
    assert all(torch.equal(parameter, kept[name]) for name, parameter in loaded.named_parameters())
    assert set(kept) - {name for name, _ in loaded.named_parameters()} == {
        "audio_decoder.ctc_head.weight",
        "audio_decoder.ctc_head.bias",
    }
    again = Encoder(tokenizer, encoder.geometry)
    assert transcription.transcribe_all(loaded, again, SAMPLES, [8], 24) == transcription.transcribe_all(
        module, encoder, SAMPLES, [8], 24
    )


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_omni_moe_thinker"}))
    with pytest.raises(ConfigError, match="is no AuT export .* give aut_pretrain's export"):
        transcription.load_transcriber(tmp_path)


def test_a_window_outside_of_what_aut_trains_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--window-sec 9 must lie within 1 and 8"):
        list(transcription.transcribe_tasks(SimpleNamespace(), tmp_path, {}, "heldout", SimpleNamespace(), 24, [8, 9]))


@pytest.mark.parametrize("objective", ["transcription", "captioning"])
def test_a_pack_of_documents_equals_each_alone(objective):
    module, encoder = build(objective)
    sounds, sights = ("audio", "short_audio", "audio"), ("video", "image", "video", "image")
    kinds = {"transcription": sounds, "captioning": sights}[objective]
    case = Case(kinds=kinds, components=("llm",), documents_per_pack=len(kinds))
    config = config_of(objective)
    found = documents(case, config, token_ids(encoder.tokenizer), 0)
    patch_dim = encoder.geometry.patch_dim
    with torch.no_grad():
        together = module(collate(found, patch_dim=patch_dim))
        single = [module(collate([document], patch_dim=patch_dim)) for document in found]
    assert (together["losses"] - torch.cat([out["losses"] for out in single])).abs().max() < 1e-5
    for name in ("labels", "predictions"):
        assert torch.equal(together[name], torch.cat([out[name] for out in single]))
    counts = [len(out["labels"]) for out in single]
    assert together["document"].tolist() == [n for n, count in enumerate(counts) for _ in range(count)]
    assert counts == [int((document.labels[1:] != IGNORE_INDEX).sum()) for document in found]


@pytest.mark.parametrize("objective", ["transcription", "captioning"])
def test_a_pack_without_samples_reaches_every_trained_parameter_with_zero(objective):
    module, encoder = build(objective)
    output = module(dummy_pack(encoder.geometry, encoder.ids))
    assert len(output["labels"]) == 0
    loss = output["losses"].sum()
    if "ctc_logits" in output:
        loss = loss + 0.0 * output["ctc_logits"].sum()
    loss.backward()
    # The adapters stand in the exported encoder but not in this stage's graph: they are frozen here.
    unused = ("proj1", "proj2", "merger")
    missing = [
        name for name, p in module.named_parameters() if p.grad is None and not any(part in name for part in unused)
    ]
    assert missing == []
    assert all(float(p.grad.abs().max()) == 0.0 for p in module.parameters() if p.grad is not None)


def test_media_and_placeholders_must_agree(aut):
    module, encoder = aut
    pack = collate([encoder.prompt_and_answer(SAMPLES[0])[0]], patch_dim=encoder.geometry.patch_dim)
    pack.input_ids[pack.input_ids == encoder.ids.audio_pad] = 0
    with pytest.raises(ValueError, match="0 media tokens for 4 encoder outputs"):
        module.encode(pack)


def test_pad_rows_by_hand():
    padded, mask = pad_rows(torch.tensor([1, 2, 3, 4]), [1, 3])
    assert padded.tolist() == [[1, 0, 0], [2, 3, 4]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_a_medium_that_the_encoder_cannot_read_is_refused(aut):
    """Its placeholders would be read as text."""
    _, encoder = aut
    module, _ = build("captioning")
    pack = collate([encoder.prompt_and_answer(SAMPLES[0])[0]], patch_dim=encoder.geometry.patch_dim)
    with pytest.raises(ValueError, match="captioning reads pictures and videos alone; sample speech/shard/0"):
        module(pack)
