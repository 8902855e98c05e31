"""What an AuT export hears: its own decoder transcribes held-out speech, at given attention windows of its encoder.

export folder ─ load_transcriber ─▶ EncoderDecoder ─ transcribe_all ─▶ (answer, reference) ─ score ─▶ exact, CER
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from omni_train.config import (
    ConfigError,
    RunConfig,
    model_of,
)
from omni_train.data.contracts import Sample
from omni_train.data.encode import Encoder, collate
from omni_train.data.pipeline import DataPipeline
from omni_train.data.tokenizer import load_tokenizer, media_token_ids
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import Answers, gather, langs_of, split_tasks
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
    model = model_of(description["model"])
    tokenizer = load_tokenizer(folder)
    transcriber = EncoderDecoder(
        build_encoder(model, "audio", seed=0),
        build_decoder(model, model.audio.d_model, seed=0),
        "audio",
        media_token_ids(tokenizer, "audio"),
    )
    load_components(transcriber, folder, {"audio_encoder", "audio_adapter", "aut_decoder"})
    return transcriber.eval(), tokenizer


def transcribe_all(
    model: EncoderDecoder,
    encoder: Encoder,
    samples: list[Sample],
    window_sec: list[int],
    max_new_tokens: int,
    device: Any = "cpu",
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
            tokens = transcribe(model, pack, stop_id=encoder.ids.im_end, max_new_tokens=max_new_tokens)
            answers |= {n: encoder.tokenizer.decode(row).strip() for n, row in zip(batch, tokens, strict=True)}
        found[window] = [(answers[n], prompts[n][1].strip()) for n in range(len(prompts))]
    return found


def transcribe_tasks(
    config: RunConfig,
    folder: Path,
    tasks: dict[str, str],
    split: str,
    ranks: Ranks,
    max_new_tokens: int,
    window_sec: list[int],
) -> Iterator[Answers]:
    """Transcripts of an AuT export for ``tasks`` ({task: source}) of a split, named aut_TASK_FIGURE_8s. Collective.

    A control compares each answer with the reference of the next item.
    """
    for window in window_sec:
        if not 1 <= window <= 8:
            raise ConfigError(f"--window-sec {window} must lie within 1 and 8 seconds, what AuT trains with")
    model, tokenizer = load_transcriber(folder)
    model.to(ranks.device)
    data = DataPipeline(config, tokenizer)
    for task, samples in split_tasks(data, tasks, split).items():
        own = samples[ranks.rank :: ranks.world]
        mine = transcribe_all(model, data.message_encoder, own, window_sec, max_new_tokens, ranks.device)
        for window, part in mine.items():
            pairs = gather(part)
            others = [reference for _, reference in [*pairs[1:], pairs[0]]]
            swapped = [(answer, other) for (answer, _), other in zip(pairs, others, strict=True)]
            yield Answers(f"aut_{task}", pairs, swapped, f"_{window}s", langs_of(samples), langs_of(samples))
