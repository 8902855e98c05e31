"""Latency and speed of a spoken answer to a spoken question, by its parts.

    python tests/benchmark/speak.py runs/quickstart                      concurrency 1, 4 and 6, one core
    python tests/benchmark/speak.py runs/quickstart --talker talker_cpt --rounds 20

    question ──encode──▶ pack ──towers, prefill──▶ first text token ──states, talker──▶ frame ──code2wav──▶ samples

first_packet_ms: from the question's bytes to the first samples, medians over rounds; real_time_factor: computing time
of the whole reply over its duration. At concurrency n, n questions are answered side by side and each part is shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from omni_train import config as configuration
from omni_train.data.contracts import Sample
from omni_train.data.encode import collate
from omni_train.data.media_tokens import CODEC_SAMPLE_RATE_HZ
from omni_train.data.pipeline import DataPipeline
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import split_tasks
from omni_train.evaluation.speaking import Speaker
from omni_train.models.code2wav import StreamingCode2Wav
from omni_train.recipe import load_recipe, stage_overrides
from omni_train.rollout.speak import GREEDY, Utterance, media_states, speak, stream_text

MAX_FRAMES = 64
PARTS = ("encode", "towers", "prefill", "states", "talker", "code2wav")


class Clock:
    """Milliseconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def note(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] += 1e3 * (now - self.last)
        self.last = now


@torch.no_grad()
def answer(speaker: Speaker, questions: list[Sample], voice: str, frames_wanted: int) -> tuple[dict, float, float]:
    """(milliseconds to the first samples by part, seconds of computing, seconds of speech) of answers side by side."""
    clock, encoder, llm = Clock(), speaker.encoder, speaker.thinker.llm
    prompts = [encoder.prompt_and_answer(question)[0] for question in questions]
    packs = [collate([prompt], patch_dim=encoder.geometry.patch_dim) for prompt in prompts]
    clock.note("encode")
    media = [speaker.thinker.towers(pack) for pack in packs]
    clock.note("towers")
    texts = []
    for pack, own in zip(packs, media, strict=True):
        text = stream_text(llm, pack, own, stop_id=encoder.ids.im_end, max_new_tokens=64)
        first = next(text, None)
        texts.append(iter([]) if first is None else _chained(first, text))
    clock.note("prefill")
    states = media_states(speaker.thinker, prompts, speaker.format, encoder.geometry)
    clock.note("states")
    utterances = [Utterance(*each, voice) for each in zip(prompts, states, texts, strict=True)]
    spoken = speak(
        llm,
        speaker.talker,
        utterances,
        speaker.format,
        encoder.geometry,
        sampling=GREEDY,
        mtp_sampling=GREEDY,
        max_frames=frames_wanted,
    )
    streaming, first_packet, seconds, started = StreamingCode2Wav(speaker.code2wav), {}, 0.0, time.perf_counter()
    before = sum(clock.parts.values())
    for frames, is_open in spoken:
        clock.note("talker")
        streaming.decode(frames[:, :, None])
        clock.note("code2wav")
        first_packet = first_packet or dict(clock.parts)
        seconds += float(is_open.sum()) * 1920 / CODEC_SAMPLE_RATE_HZ
    return first_packet, before / 1e3 + time.perf_counter() - started, seconds


def _chained(first: int, rest):
    yield first
    yield from rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a recipe's run folder")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny.yaml"))
    parser.add_argument("--talker", default="talker_cpt", help="the stage whose Talker speaks")
    parser.add_argument("--through", default="code2wav")
    parser.add_argument("--task", default="spoken_phrase", help="its held-out clips are the questions")
    parser.add_argument("--voice", default="anna")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 6])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe)
    stage = recipe.stage(options.talker)
    config = configuration.load(stage.stage, stage_overrides(recipe, stage, options.run, []))
    source = recipe.source_of(options.task)
    questions_of = configuration.load("s2_general", [f"corpus={recipe.corpus}", *recipe.overrides])
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    data = DataPipeline.of(config)
    export = options.run / stage.stage / "export"
    speaker = Speaker(config, export, options.run / options.through / "export", data, ranks, answers=True)
    samples = split_tasks(DataPipeline.of(questions_of), {options.task: source}, "heldout")[options.task]
    print(
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds"
    )
    for number in options.concurrency:
        packets, computing, speech = [], 0.0, 0.0
        for round_ in range(options.rounds + 1):
            chosen = [samples[(round_ * number + n) % len(samples)] for n in range(number)]
            parts, seconds, spoken = answer(speaker, chosen, options.voice, MAX_FRAMES)
            if round_ and parts:  # the first warms up
                packets.append(parts)
                computing, speech = computing + seconds, speech + spoken
        medians = {part: round(float(np.median([packet[part] for packet in packets])), 1) for part in PARTS}
        total = float(np.median([sum(packet.values()) for packet in packets]))
        found = {"concurrency": number, "first_packet_ms": round(total, 1), "parts_ms": medians}
        print(json.dumps(found | {"real_time_factor": round(computing / max(speech, 1e-9), 3)}))


if __name__ == "__main__":
    main()
