"""How fast answers are sampled, beside stock ``generate`` on the same prompts with the same weights.

    PYTHONPATH=. python tests/benchmark/rollout.py runs/quickstart/s3_long_context/export [--prompts 16] [--copies 8]

Groups of ``--copies`` answers to each prompt, by turns: at equal length (nobody may stop), and at the lengths that the
model chooses. Tokens are those of answers, the stop token included. The corpus must be there (``make corpus``).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step import histogram
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from omni_train import config as configuration
from omni_train.config.post_training import SamplingConfig
from omni_train.data.contracts import Document, Prompt
from omni_train.data.encode import collate
from omni_train.data.pipeline import DataPipeline
from omni_train.evaluation.capabilities import split_tasks
from omni_train.models.weights import load_thinker
from omni_train.rollout.sample import ThinkerSampler


def stock_inputs(documents: list[Document], pad_id: int) -> dict[str, torch.Tensor]:
    """The prompts as stock's processor pads them for generation: on the left."""
    width = max(document.num_tokens for document in documents)
    ids = torch.full((len(documents), width), pad_id)
    mask = torch.zeros(len(documents), width, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, width - document.num_tokens :] = torch.from_numpy(document.input_ids)
        mask[row, width - document.num_tokens :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    mels = [torch.from_numpy(mel).T for document in documents for mel in document.mels]
    pad = torch.nn.utils.rnn.pad_sequence
    if mels:
        inputs["input_features"] = pad(mels, batch_first=True).transpose(1, 2).contiguous()
        inputs["feature_attention_mask"] = pad([torch.ones(len(m), dtype=torch.long) for m in mels], batch_first=True)
    patches = [torch.from_numpy(p) for document in documents for p in document.image_patches]
    if patches:
        inputs["pixel_values"] = torch.cat(patches)
        inputs["image_grid_thw"] = torch.tensor([grid for document in documents for grid in document.image_grids])
    return inputs


def by_turns(samplers: dict[str, Callable[[], list[int]]], num_rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each sampler, round by round; a sampler returns the lengths of its answers."""
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    for round_ in range(num_rounds + 1):
        for name, sampler in samplers.items():
            started = time.perf_counter()
            lengths = sampler()
            if round_:  # the first warms up
                rates[name].append(sum(lengths) / (time.perf_counter() - started))
            if round_ == num_rounds:
                print(f"    {name}: {statistics.median(rates[name]):,.0f} tokens/s; by length: {histogram(lengths)}")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="of a Thinker")
    parser.add_argument("--tasks", nargs="+", default=["spoken_phrase", "picture_name", "digit_sum"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    config = configuration.load("thinker_gspo", ["engine=cpu1", "data.lanes=1"])
    data = DataPipeline.of(config)
    sources = {"spoken_phrase": "speech", "picture_name": "pictures", "digit_sum": "sums"}
    found = split_tasks(data, {task: sources[task] for task in options.tasks}, "heldout")
    samples = [sample for each in zip(*found.values(), strict=False) for sample in each][: options.prompts]
    documents = [data.encoder.prompt_and_answer(sample)[0] for sample in samples]
    thinker = load_thinker(options.export).eval()
    stock = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(options.export, local_files_only=True).eval()
    inputs = stock_inputs(documents, data.encoder.ids.endoftext)
    print(f"python {platform.python_version()}, torch {torch.__version__}, one thread; {options}")
    print(f"prompts by length: {histogram([document.num_tokens for document in documents])}")
    for name, stop_id in (("equal length", -1), ("natural lengths", data.encoder.ids.im_end)):
        sampling = SamplingConfig(max_new_tokens=options.max_new_tokens)
        sampler = ThinkerSampler(
            thinker,
            sampling,
            lambda chosen: collate(chosen, patch_dim=data.encoder.geometry.patch_dim),
            stop_id=stop_id,
            batch=options.prompts * options.copies,
        )

        def ours(sampler=sampler) -> list[int]:
            keys = [str(n) for n in range(len(documents))]
            groups = sampler([Prompt(document) for document in documents], keys, options.copies)
            return [len(answer.tokens) for group in groups for answer in group]

        @torch.no_grad()
        def stocks(stop_id=stop_id) -> list[int]:
            rows = stock.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=options.copies,
                max_new_tokens=options.max_new_tokens,
                eos_token_id=stop_id if stop_id >= 0 else None,
                pad_token_id=data.encoder.ids.endoftext,
            )[:, inputs["input_ids"].shape[1] :]
            ended = [(row == stop_id).nonzero() for row in rows]
            return [int(end[0]) + 1 if len(end) else len(row) for end, row in zip(ended, rows, strict=True)]

        print(f"  {name}")
        rates = by_turns({"ours": ours, "stock": stocks}, options.rounds)
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["stock"], strict=True))
        print(f"  {name}: our tokens/s / stock generate {ratio:.2f}")


if __name__ == "__main__":
    main()
