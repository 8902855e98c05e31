"""What an AuT export hears: its own decoder transcribes held-out speech, at given attention windows of its encoder.

export folder ─ load_transcriber ─▶ EncoderDecoder ─ transcribe_all ─▶ (answer, reference) ─ score ─▶ exact, CER
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from omni_train.config import (
    AudioModelConfig,
    ConfigError,
    DecoderModelConfig,
    ModelConfig,
    RunConfig,
    TextModelConfig,
    VisionModelConfig,
)
from omni_train.data.contracts import Sample
from omni_train.data.encode import Encoder, collate
from omni_train.data.pipeline import DataPipeline
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine import parallel
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import MAX_NEW_TOKENS, gather, read_tasks, score
from omni_train.models.build import build_decoder, build_encoder
from omni_train.models.encoder_decoder import EncoderDecoder
from omni_train.models.weights import load_components
from omni_train.rollout.generate import transcribe

MODEL_TYPE = "omni_train_transcription"
BATCH_FRAMES = 10_000  # mel frames a batch: 100 s of speech


def load_transcriber(folder: Path) -> tuple[EncoderDecoder, PreTrainedTokenizerBase]:
    """AuT's encoder and decoder from an export folder, with the tokenizer beside them. The CTC head stays behind."""
    description = json.loads((folder / "config.json").read_text())
    if description.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"'{folder}' is no AuT export (model_type {MODEL_TYPE}); give aut_pretrain's export/ folder")
    model = _model_config(description["model"])
    tokenizer = load_tokenizer(folder)
    transcriber = EncoderDecoder(
        build_encoder(model, "audio", seed=0),
        build_decoder(model, model.audio.d_model, seed=0),
        "audio",
        tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
    )
    load_components(transcriber, folder, {"audio_encoder", "audio_adapter", "aut_decoder"})
    return transcriber.eval(), tokenizer


def _model_config(values: dict[str, Any]) -> ModelConfig:
    parts = {
        "text": TextModelConfig(**values["text"]),
        "audio": AudioModelConfig(**values["audio"]),
        "vision": VisionModelConfig(**values["vision"]),
        "decoder": DecoderModelConfig(**values["decoder"]),
    }
    return ModelConfig(**{**values, **parts})


def transcribe_all(
    model: EncoderDecoder, encoder: Encoder, samples: list[Sample], window_sec: list[int], device: Any = "cpu"
) -> dict[int, list[tuple[str, str]]]:
    """(answer, reference) of every sample in their order, by attention window in seconds."""
    prompts = [encoder.prompt_and_answer(sample) for sample in samples]
    frames = [sum(mel.shape[1] for mel in prompt.mels) for prompt, _ in prompts]
    batches: list[list[int]] = [[]]
    for n in sorted(range(len(prompts)), key=lambda n: frames[n]):
        if batches[-1] and sum(frames[m] for m in batches[-1]) + frames[n] > BATCH_FRAMES:
            batches.append([])
        batches[-1].append(n)
    found: dict[int, list[tuple[str, str]]] = {}
    for window in window_sec:
        answers: dict[int, str] = {}
        for batch in filter(None, batches):
            documents = [prompts[n][0] for n in batch]
            windows = [window for document in documents for _ in document.mels]
            pack = collate(documents, windows, patch_dim=encoder.geometry.patch_dim).to(device)
            tokens = transcribe(model, pack, stop_id=encoder.ids.im_end, max_new_tokens=MAX_NEW_TOKENS)
            answers |= {n: encoder.tokenizer.decode(row).strip() for n, row in zip(batch, tokens, strict=True)}
        found[window] = [(answers[n], prompts[n][1].strip()) for n in range(len(prompts))]
    return found


def evaluate_transcriber(
    config: RunConfig, folder: Path, *, tasks: dict[str, str], split: str, prefix: str, window_sec: list[int]
) -> tuple[dict[str, float], dict[str, float]]:
    """(capabilities, controls) of an AuT export on ``tasks`` ({task: source}) of a split, named aut_TASK_exact_8s.

    A control compares each answer with the reference of the next item. Collective.
    """
    for window in window_sec:
        if not 1 <= window <= 8:
            raise ConfigError(f"--window-sec {window} must lie within 1 and 8 seconds, what AuT trains with")
    ranks: Ranks = parallel.start(config.engine)
    model, tokenizer = load_transcriber(folder)
    model.to(ranks.device)
    data = DataPipeline(config, tokenizer)
    by_task = read_tasks(data, {source: f"{split}/{source}/*.tar" for source in tasks.values()}, tasks)
    capabilities: dict[str, float] = {}
    controls: dict[str, float] = {}
    for task, samples in by_task.items():
        if not samples:
            raise ConfigError(f"no sample of task '{task}' in {split}/{tasks[task]}; see the corpus's card.yaml")
        mine = transcribe_all(model, data.encoder, samples[ranks.rank :: ranks.world], window_sec, ranks.device)
        for window, part in mine.items():
            name = f"{prefix}aut_{task}"
            pairs = gather(part, ranks)
            others = [reference for _, reference in [*pairs[1:], pairs[0]]]
            swapped = [(answer, other) for (answer, _), other in zip(pairs, others, strict=True)]
            capabilities |= {f"{name}_{key}_{window}s": value for key, value in score(pairs, True).items()}
            controls |= {f"{name}_{key}_{window}s": value for key, value in score(swapped, True).items()}
            if ranks.is_main:
                wrong = [pair for pair in pairs if pair[0] != pair[1]][:4]
                exact = capabilities[f"{name}_exact_{window}s"]
                print(f"{name}, windows of {window} s: {len(pairs)} clips, exact {exact:.3f}; e.g. {wrong}", flush=True)
    dist.barrier()
    parallel.stop()
    return capabilities, controls
