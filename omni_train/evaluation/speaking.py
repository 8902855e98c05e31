"""What an exported Talker says, heard through Code2Wav by a recogniser that knows the original voices alone.

    prompts, replies ──Talker, MTP──▶ codes ──Code2Wav──▶ waves ──Recogniser──▶ words, characters

The texts are those of the data, not of the Thinker: what is measured is the speaking. Held-out replies are new
combinations of known words; as many of train show what was seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jiwer
import numpy as np
import torch
from torch import Tensor

from omni_train.config import THINKER_COMPONENTS, ConfigError, RunConfig, init_of
from omni_train.data.contracts import Sample
from omni_train.data.encode import Encoder
from omni_train.data.media_tokens import SAMPLES_PER_CODEC_FRAME
from omni_train.data.pipeline import DataPipeline
from omni_train.data.talker_sequence import CODES, read_codes, reply_tokens
from omni_train.data.tokenizer import IM_END
from omni_train.engine.deepspeed import in_precision
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import TryOut, gather, split_tasks
from omni_train.evaluation.speech import (
    Recogniser,
    SpeechFigures,
    clip_of,
    clips_of,
    listener_of,
    swapped,
    word_accuracy,
)
from omni_train.evaluation.voice import median_pitch
from omni_train.models.build import build_talker, build_thinker, talker_config, thinker_config
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import codec_mel
from omni_train.models.talker import Talker
from omni_train.models.thinker import compose
from omni_train.models.weights import load_components
from omni_train.rollout.speak import GREEDY, MTP_SAMPLING, Sampling, Utterance, media_states, speak

BATCH_UTTERANCES = 48
ROUNDS = 4
TIMES_AS_LONG = 4
"""A reply that goes on for so many times the longest original beside it is cut."""


class Speaker:
    """Talker, Code2Wav and the Thinker's layers that the Talker reads (all of them where it ``answers`` too), of
    exports, whole on every rank: codes and waves of replies."""

    def __init__(
        self,
        config: RunConfig,
        talker: Path,
        code2wav: Path,
        data: DataPipeline,
        ranks: Ranks,
        *,
        answers: bool = False,
    ) -> None:
        model, tokenizer = config.model, data.tokenizer
        assert model.talker is not None  # RunConfig refuses such a stage
        # One layer more than the Talker reads: what comes after the last one is normed.
        layers = min(model.text.num_hidden_layers, model.talker.accept_hidden_layer + 1)
        if not answers:
            model = replace(model, text=replace(model.text, num_hidden_layers=layers))
        self.thinker = compose(build_thinker(thinker_config(model, tokenizer, config.stage.yarn_factor), seed=0))
        for component in THINKER_COMPONENTS:
            folder = init_of(config.init, component)
            if folder is None:
                raise ConfigError(f"init.{component}: a Talker speaks beside a Thinker; add +init.thinker=ITS_EXPORT")
            load_components(self.thinker, Path(folder), {component})
        self.talker = Talker(build_talker(talker_config(model, tokenizer), seed=0, embedding_std=1.0))
        load_components(self.talker, talker, {"talker", "mtp"})
        self.code2wav = Code2Wav(model)
        load_components(self.code2wav, code2wav, {"code2wav"})
        for module in (self.thinker, self.talker):
            in_precision(module, config.engine.precision)
        for module in (self.thinker, self.talker, self.code2wav):
            module.eval().to(ranks.device)
        self.device = ranks.device
        assert isinstance(data.encoder, Encoder) and data.encoder.speech is not None  # a Talker's stage
        self.encoder, self.format = data.encoder, data.encoder.speech

    def codes(self, samples: list[Sample], generator: torch.Generator | None = None, heat: float = 1.0) -> list[Tensor]:
        """Codes [G, T] of each sample's reply in the voice of its speaker; [G, 0] where nothing is said.

        The most likely ones, or where a ``generator`` is given drawn as stock draws them by default, its temperatures
        times ``heat``.
        """
        drawn = [replace(own, temperature=heat * own.temperature) for own in (Sampling(), MTP_SAMPLING)]
        sampling, mtp_sampling = drawn if generator is not None else (GREEDY, GREEDY)
        prompts = [self.encoder.prompt_and_answer(sample) for sample in samples]
        states = media_states(self.thinker, [prompt for prompt, _ in prompts], self.format, self.encoder.geometry)
        utterances = [
            Utterance(prompt, own, self.tokens(answer), sample.content["speaker"])
            for (prompt, answer), own, sample in zip(prompts, states, samples, strict=True)
        ]
        num_groups = self.format.talker.num_code_groups
        longest = max(read_codes(sample.members[CODES], header_only=True).shape[1] for sample in samples)
        found: list[list[Tensor]] = [[] for _ in samples]
        for frames, is_open in speak(
            self.thinker.llm,
            self.talker,
            utterances,
            self.format,
            self.encoder.geometry,
            sampling=sampling,
            mtp_sampling=mtp_sampling,
            max_frames=TIMES_AS_LONG * longest,
            generator=generator,
        ):
            for own, frame, still in zip(found, frames, is_open.tolist(), strict=True):
                own += [frame] if still else []
        silence = torch.empty(num_groups, 0, dtype=torch.long, device=self.device)
        return [torch.stack(own, dim=1) if own else silence for own in found]

    def tokens(self, text: str) -> list[int]:
        """The tokens of a reply, as they follow the head of its turn."""
        return self._read(text)[len(self.format.tokens.head) - 3 :].tolist()

    def num_read(self, text: str) -> int:
        """How many tokens of a reply are read, one a frame."""
        return len(self._read(text))

    def _read(self, text: str) -> np.ndarray:
        ids = self.encoder.tokenizer(text + IM_END, add_special_tokens=False).input_ids
        return reply_tokens(np.array([*self.format.tokens.head, *ids]), self.format.tokens)

    @torch.no_grad()
    def waves(self, codes: list[Tensor]) -> tuple[Tensor, list[int]]:
        """(waves [B, N], silent behind their ends, numbers of samples) of codes [G, T]."""
        longest = max(1, *(own.shape[1] for own in codes))
        padded = torch.stack([torch.nn.functional.pad(own, (0, longest - own.shape[1])) for own in codes])
        made = self.code2wav.decode(padded)
        made = torch.nn.functional.pad(made, (0, longest * SAMPLES_PER_CODEC_FRAME - made.shape[1]))
        lengths = [own.shape[1] * SAMPLES_PER_CODEC_FRAME for own in codes]
        ends = torch.tensor(lengths, device=made.device)
        return made * (torch.arange(made.shape[1], device=made.device) < ends[:, None]), lengths


@dataclass(slots=True)
class Heard:
    """A reply as it was heard, letter by letter, and its pitch in Hz, beside what was to be said and the pitch of the
    original; NaN where a pitch was not asked for."""

    text: str
    said: str
    speaker: str
    pitch: float
    original_pitch: float


def talker_figures(
    config: RunConfig,
    folder: Path,
    tasks: dict[str, str],
    split: str,
    ranks: Ranks,
    run_dir: Path | None,
    through: Path,
) -> Iterator[SpeechFigures]:
    """What is heard of an exported Talker, figures named after the task. Collective.

    Words of a split (``unseen_words``) and of as many replies of train (``seen_words``); ``cer``: character error rate
    of the unseen before words are snapped to the lexicon; ``f0_error``: how far the median pitch of a speaker is from
    that of the originals, relative, the mean over speakers.
    """
    data = DataPipeline.of(config)
    speaker = Speaker(config, folder, through, data, ranks)
    listener = listener_of(data, run_dir, ranks)
    for task, source in tasks.items():
        found = SpeechFigures(task, {}, {}, [])
        unseen = split_tasks(data, {task: source}, split, prompt_and_clip(data))[task]
        seen = split_tasks(data, {task: source}, "train", prompt_and_clip(data), most=len(unseen))[task]
        for name, samples in ((f"{task}_seen_words", seen), (f"{task}_unseen_words", unseen)):
            heard = gather(hear_replies(speaker, listener, samples[ranks.rank :: ranks.world]))
            found.pairs = [(listener.snap(reply.text), reply.said) for reply in heard]
            found.figures[name] = word_accuracy(found.pairs)
            found.controls[name] = word_accuracy(swapped(found.pairs))
        found.figures[f"{task}_cer"] = float(jiwer.cer([h.said for h in heard], [h.text or " " for h in heard]))
        voices = sorted({reply.speaker for reply in heard})
        own = {voice: [reply for reply in heard if reply.speaker == voice] for voice in voices}
        words = {v: word_accuracy([(listener.snap(h.text), h.said) for h in replies]) for v, replies in own.items()}
        pitches = {voice: medians(replies) for voice, replies in own.items()}
        found.by_speaker[f"{task}_unseen_words"] = {voice: [words[voice], None] for voice in voices}
        found.by_speaker[f"{task}_f0_hz"] = {voice: [*pitches[voice]] for voice in voices}
        errors = [abs(made / original - 1) for made, original in pitches.values()]
        found.figures[f"{task}_f0_error"] = float(np.mean(errors))
        yield found


def preference_figures(
    config: RunConfig,
    folder: Path,
    tasks: dict[str, str],
    split: str,
    ranks: Ranks,
    run_dir: Path | None,
    through: Path,
) -> Iterator[SpeechFigures]:
    """What preferences changed: character error rates of the replies to a split before the stage and after it, each
    reply drawn ROUNDS times, and the 95 % interval of the gain by a paired bootstrap over replies. Collective."""
    data = DataPipeline.of(config)
    start = init_of(config.init, "talker")
    if start is None:
        raise ConfigError(f"{config.stage.name} is measured against its start; add +init.talker=ITS_EXPORT")
    speakers = [Speaker(config, Path(talker), through, data, ranks) for talker in (start, folder)]
    listener = listener_of(data, run_dir, ranks)
    for task, samples in split_tasks(data, tasks, split, prompt_and_clip(data)).items():
        mine = samples[ranks.rank :: ranks.world]
        errors, pairs = [], []
        for speaker in speakers:
            heard = [hear_replies(speaker, listener, mine, seed, has_pitch=False) for seed in range(ROUNDS)]
            by_item = gather([[replies[n] for replies in heard] for n in range(len(mine))])
            errors.append(np.array([np.mean([jiwer.cer(h.said, h.text or " ") for h in item]) for item in by_item]))
            pairs = [(item[0].text, item[0].said) for item in by_item]
        before, after = (float(each.mean()) for each in errors)
        low, high = bootstrap_interval(errors[0] - errors[1])
        figures = {"dpo_cer": after, "dpo_gain_low": low, "dpo_gain_high": high}
        yield SpeechFigures(task, figures, {"dpo_cer": before}, pairs)


def bootstrap_interval(values: np.ndarray, num_rounds: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean, by drawing as many of the values with replacement."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (num_rounds, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def medians(heard: list[Heard]) -> tuple[float, float]:
    """Median pitch in Hz of replies and of their originals; NaN where none has a pitch."""
    made, own = ([getattr(reply, name) for reply in heard] for name in ("pitch", "original_pitch"))
    voiced = ([hz for hz in each if hz == hz] for each in (made, own))
    made_hz, own_hz = (float(np.median(each)) if each else float("nan") for each in voiced)
    return made_hz, own_hz


def prompt_and_clip(data: DataPipeline) -> TryOut:
    """Decodes what a reply is made from and what it is compared with."""

    def decode(sample: Sample) -> None:
        if CODES not in sample.members or "speaker" not in sample.content:
            raise ValueError(f"it has no {CODES} or names no speaker")
        data.message_encoder.prompt_and_answer(sample)
        clip_of(sample)

    return decode


def hear_replies(
    speaker: Speaker, listener: Recogniser, samples: list[Sample], seed: int | None = None, has_pitch: bool = True
) -> list[Heard]:
    """Replies of samples, spoken and heard: the most likely, or drawn from ``seed``; with pitches if ``has_pitch``."""
    device = speaker.talker.talker.codec_head.weight.device
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    pitch_of = median_pitch if has_pitch else lambda wave: float("nan")
    found: list[Heard] = []
    for start in range(0, len(samples), BATCH_UTTERANCES):
        part = samples[start : start + BATCH_UTTERANCES]
        waves, lengths = speaker.waves(speaker.codes(part, generator))
        texts = listener.hear(codec_mel(waves.cpu()), lengths)
        for n, (sample, original) in enumerate(zip(part, clips_of(part), strict=True)):
            own = pitch_of(waves[n, : lengths[n]].cpu().numpy())
            name = str(sample.content["speaker"])
            found.append(Heard(texts[n], original.text, name, own, pitch_of(original.wave)))
    return found
