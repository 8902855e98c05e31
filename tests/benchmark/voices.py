"""What a new voice costs the others: pitch and recognised words of each voice before and after its stage.

    PYTHONPATH=. python tests/benchmark/voices.py runs/quickstart [--before talker_dpo] [--after talker_speaker]

Each voice of the corpus says its held-out replies, and of train as many as bring its words to --words, with the Talker
of either stage and the likeliest codes; the run's recogniser listens (RUN/recogniser.pt, trained on original voices
alone). Items are paired: what changed is the mean over replies of the gain in words read rightly, with the 95 %
interval of a bootstrap. The new voice (task --new) is measured after its stage alone, its pitch against that of its
originals.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from omni_train import config as configuration
from omni_train.data.contracts import Sample
from omni_train.data.pipeline import DataPipeline
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import split_tasks
from omni_train.evaluation.speaking import Heard, Speaker, bootstrap_interval, hear_replies, medians
from omni_train.evaluation.speech import Recogniser, clips_of, listener_of, word_accuracy
from omni_train.recipe import load_recipe, stage_overrides


def by_voice(samples: list[Sample]) -> dict[str, list[Sample]]:
    """Samples by who says them."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[str(sample.content["speaker"])].append(sample)
    return dict(sorted(found.items()))


def enough(heldout: list[Sample], train: list[Sample], num_words: int) -> list[Sample]:
    """The held-out samples of a voice, then as many of train as it takes to have ``num_words`` words."""
    samples, words = [], 0
    for sample, clip in zip([*heldout, *train], clips_of([*heldout, *train]), strict=True):
        if len(samples) >= len(heldout) and words >= num_words:
            break
        samples.append(sample)
        words += len(clip.text.split())
    return samples


def words_of(heard: list[Heard], listener: Recogniser) -> list[float]:
    """Of each reply, how many of its words were recognised, snapped to the lexicon; a share."""
    return [word_accuracy([(listener.snap(reply.text), reply.said)]) for reply in heard]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a recipe's run folder, its speech measured")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny.yaml"))
    parser.add_argument("--before", default="talker_dpo", help="the stage that the new voice's started from")
    parser.add_argument("--after", default="talker_speaker", help="the new voice's stage")
    parser.add_argument("--through", default="code2wav")
    parser.add_argument("--task", default="talker", help="replies of the old voices")
    parser.add_argument("--new", default="speaker", help="replies of the new one")
    parser.add_argument("--words", type=int, default=400, help="at least so many a voice")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if not (options.run / "recogniser.pt").exists():
        parser.error(f"{options.run} has no recogniser.pt: its speech was not measured yet")
    recipe = load_recipe(options.recipe)
    stage = recipe.stage(options.after)
    config = configuration.load(stage.stage, stage_overrides(recipe, stage, options.run, []))
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    data = DataPipeline.of(config)
    listener = listener_of(data, options.run, ranks)
    speakers = [
        Speaker(config, options.run / name / "export", options.run / options.through / "export", data, ranks)
        for name in (options.before, options.after)
    ]
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    old = {options.task: recipe.source_of(options.task)}
    heldout, train = (by_voice(split_tasks(data, old, split)[options.task]) for split in ("heldout", "train"))
    for voice, own in heldout.items():
        samples = enough(own, train.get(voice, []), options.words)
        before, after = (hear_replies(speaker, listener, samples) for speaker in speakers)
        words_before, words_after = (np.array(words_of(heard, listener)) for heard in (before, after))
        hz_before, hz_after = medians(before)[0], medians(after)[0]
        low, high = bootstrap_interval(words_after - words_before)
        num_words = sum(len(reply.said.split()) for reply in before)
        print(
            f"{voice}: {len(samples)} replies, {len(own)} of them held out, {num_words} words; "
            f"F0 {hz_before:.1f} → {hz_after:.1f} Hz ({hz_after / hz_before - 1:+.1%}); "
            f"words {words_before.mean():.3f} → {words_after.mean():.3f} ({low:+.3f} … {high:+.3f})",
            flush=True,
        )
    new = {options.new: recipe.source_of(options.new)}
    for voice, samples in by_voice(split_tasks(data, new, "heldout")[options.new]).items():
        heard = hear_replies(speakers[1], listener, samples)
        hz, original_hz = medians(heard)
        print(
            f"{voice}, new: {len(samples)} replies, held out; F0 {hz:.1f} Hz, its originals' {original_hz:.1f} "
            f"({hz / original_hz - 1:+.1%}); words {np.mean(words_of(heard, listener)):.3f}"
        )


if __name__ == "__main__":
    main()
