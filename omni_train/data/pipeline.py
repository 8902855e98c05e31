"""From a run's configuration to packs: shards → index → planner → reader → encoder → packs.

The only place that puts the parts of the data layer together.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from omni_train.config import Objective, RunConfig, ShardsConfig, VisionModelConfig
from omni_train.data.bad_samples import FIX, BadSampleLog, SampleCount, bad_sample
from omni_train.data.chatml import Describe, question_of
from omni_train.data.contracts import BadSample, Document, DocumentPlan, Pack, PackPlan, Prompt
from omni_train.data.encode import Encoder, RangeError, collate, dummy_document
from omni_train.data.index import ShardIndex, ensure_index, expand
from omni_train.data.layouts import layout_id
from omni_train.data.loader import PackReader, StepLoader
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.order import is_usable
from omni_train.data.planner import Planner, Source, plan_once
from omni_train.data.shard import DataError, SampleError
from omni_train.data.speech import SpeechEncoder
from omni_train.data.talker_sequence import SpeechFormat, SpeechTokens, with_noise
from omni_train.data.tokenizer import fingerprint, load_tokenizer


@dataclass(slots=True)
class PackBuilder:
    """Reads and encodes the documents of a plan (in a worker or inline). Picklable, stateless.

    A sample that cannot be decoded is left out of its pack, which names it in ``bad_samples``: the pack is then that of
    the other documents, a dummy where there is none. The plan stays as it is, so nothing hangs on who meets the sample.
    ``audio_window_sec`` (least, most): the attention window of each clip, drawn from (seed, sample id, step), as is
    ``code_noise``: the share of the codes that a Talker reads which are random.
    """

    reader: PackReader
    encoder: Encoder | SpeechEncoder
    audio_window_sec: tuple[int, int]
    seed: int
    code_noise: float = 0.0

    def __call__(self, plan: PackPlan) -> Pack:
        documents: list[Document] = []
        bad: list[BadSample] = []
        for planned in plan.documents:
            try:
                documents.append(self._document(planned, plan.step))
            except SampleError as error:
                bad.append(BadSample(error.shard, error.key, error.offset, error.what))
        if not documents:
            pack = self.encoder.dummy()
        else:
            windows = [self._window(document.sample_id, plan.step) for document in documents for _ in document.mels]
            pack = collate(documents, windows, patch_dim=self.encoder.patch_dim)
        pack.bad_samples = bad
        return pack

    def _document(self, planned: DocumentPlan, step: int) -> Document:
        """Raises SampleError for a sample that cannot be decoded, DataError where shard and index disagree."""
        sample = self.reader.read(planned)
        shard, key, offset = self.reader.place(planned)
        try:
            document = self.encoder.encode(sample, planned.start, planned.stop)
        except ValueError as error:
            what = str(error).removeprefix(f"sample {sample.id}: ")
            if isinstance(error, RangeError):
                fix = "remove the shard's .idx files: a run writes what is missing"
                raise DataError.at(shard, offset, what, key=key, fix=fix) from error
            raise SampleError.at(shard, offset, what, key=key, fix=FIX) from error
        if self.code_noise > 0 and isinstance(self.encoder, Encoder) and self.encoder.speech is not None:
            rng = np.random.default_rng(self._draw(sample.id, step))
            size = self.encoder.speech.talker.codebook_size
            document.speeches = [with_noise(speech, self.code_noise, size, rng) for speech in document.speeches]
        return document

    def _draw(self, sample_id: str, step: int) -> int:
        key = f"{self.seed}/{sample_id}/{step}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")

    def _window(self, sample_id: str, step: int) -> int:
        least, most = self.audio_window_sec
        return least + self._draw(sample_id, step) % (most - least + 1)


@dataclass(slots=True)
class PromptBuilder:
    """Reads and encodes the prompt of a plan of one sample. Picklable, stateless.

    A sample that cannot be decoded, or has no reply to compare with, gives a dummy prompt that names it in ``bad``.
    """

    reader: PackReader
    encoder: Encoder

    def __call__(self, plan: PackPlan) -> Prompt:
        (planned,) = plan.documents
        place = self.reader.place(planned)
        try:
            sample = self.reader.read(planned)
            document, reference = self.encoder.prompt_and_answer(sample)
        except ValueError as error:
            return dataclasses.replace(self.dummy(), place=place, bad=[bad_sample(place, error)])
        question = question_of(sample.content)
        return Prompt(document, reference, question, planned, place)

    def dummy(self) -> Prompt:
        """A prompt of nobody, for a rank that has none."""
        return Prompt(dummy_document(self.encoder.ids))


def media_geometry(vision: VisionModelConfig) -> MediaGeometry:
    """How pictures become patches for a vision encoder of these sizes."""
    return MediaGeometry(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=vision.min_pixels,
        max_pixels=vision.max_pixels,
        video_min_pixels=vision.video_min_pixels,
        video_max_pixels=vision.video_max_pixels,
        video_total_pixels=vision.video_total_pixels,
        video_fps=vision.video_fps,
        video_max_frames=vision.video_max_frames,
    )


def speech_format(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> SpeechFormat | None:
    """How a stage reads speech targets; None for a stage that reads none."""
    objective = config.stage.objective
    if objective not in (Objective.talker, Objective.talker_dpo):
        return None
    assert config.model.talker is not None  # RunConfig refuses such a stage
    return SpeechFormat(config.model.talker, SpeechTokens.of(tokenizer), objective is Objective.talker_dpo)


def _one_token_each(source: Source, longest: int) -> Source:
    """The source with samples of one token; those longer than ``longest`` do not fit any more and are left out."""
    lengths = [np.where(own <= longest, 1, 2) for own in source.lengths]
    return dataclasses.replace(source, lengths=lengths, splittable=[np.zeros(len(own), bool) for own in lengths])


class DataPipeline:
    """The data of one run: its training packs by step, and its validation packs by source."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.encoder: Encoder | SpeechEncoder
        if config.stage.objective in (Objective.codec, Objective.code2wav):
            self.encoder = SpeechEncoder(with_mels=config.stage.reconstruction.semantic > 0)
        else:
            geometry, speech = media_geometry(config.model.vision), speech_format(config, tokenizer)
            self.encoder = Encoder(tokenizer, geometry, config.stage.loss_on.name, speech)
        self._indexed = SampleCount()

    @staticmethod
    def of(config: RunConfig) -> DataPipeline:
        """The pipeline with the tokenizer that the configuration names."""
        return DataPipeline(config, load_tokenizer(Path(config.data.tokenizer)))

    @property
    def message_encoder(self) -> Encoder:
        """The encoder of messages; a stage of waves alone has none."""
        assert isinstance(self.encoder, Encoder), "a codec's stage reads no messages"
        return self.encoder

    def indexed(self, source: ShardsConfig) -> list[tuple[str, ShardIndex]]:
        """(shard, index) of every shard that the source's patterns match, missing indexes built.

        Bad samples are left out; ``bad_sample_log`` or ``check_bad_samples`` tell whether they are too many.
        """
        root = Path(self.config.data.root)
        shards = expand([pattern if "://" in pattern else str(root / pattern) for pattern in source.shards])
        describe = Describe(self.config.data.tokenizer, source)
        indexes = ensure_index(shards, describe, fingerprint(self.tokenizer), layout=layout_id(source))
        found = list(zip(map(str, shards), indexes, strict=True))
        for shard, index in found:
            self._indexed.add(shard, index.num_samples + len(index.bad), index.bad)
        return found

    def bad_sample_log(self, path: Path) -> BadSampleLog:
        """The log of a run on everything indexed so far. Raises DataError when that has too many bad samples."""
        return BadSampleLog(path, self._indexed.bad, self._indexed.allowed(self.config.data.max_bad_samples))

    def _source(
        self, name: str, shards: list[tuple[str, ShardIndex]], weight: float = 1.0, max_epochs: float | None = None
    ) -> Source:
        lengths = [np.array([self.encoder.num_tokens(f) for f in index.samples], dtype=np.int64) for _, index in shards]
        splittable = [np.array([*map(self.encoder.is_splittable, index.samples)], dtype=bool) for _, index in shards]
        return Source(name, weight, lengths, splittable, max_epochs)

    def _builder(
        self, sources: Mapping[str, ShardsConfig], shards: dict[str, list[tuple[str, ShardIndex]]]
    ) -> PackBuilder:
        least, most = self.config.stage.audio_window_sec
        reader, noise = PackReader(shards, sources), self.config.stage.code_noise
        return PackBuilder(reader, self.encoder, (least, most), self.config.data.seed, noise)

    @property
    def _longest(self) -> int:
        """Tokens of the longest sample of the mixture that a pack, or a prompt, has room for."""
        stage = self.config.stage
        if stage.rollout is None:
            return stage.context
        return stage.rollout.max_prompt_tokens or stage.context - stage.rollout.max_new_tokens

    def loader(self, rank: int, world: int) -> StepLoader:
        """Training packs of this rank, step by step; prompts, one a plan, for a stage that samples answers.

        Prompts are mixed by number: to the planner each is one token long, in packs of one token.
        """
        config, rollout = self.config, self.config.stage.rollout
        shards = {name: self.indexed(source) for name, source in config.mixture.items()}
        sources = [
            self._source(name, shards[name], source.weight, source.max_epochs)
            for name, source in config.mixture.items()
        ]
        if rollout is not None:
            sources = [_one_token_each(source, self._longest) for source in sources]
        planner = Planner(
            sources,
            context=config.stage.context if rollout is None else 1,
            lanes=config.data.lanes,
            packs_per_lane=config.data.packs_per_lane,
            seed=config.data.seed,
            block_size=config.data.block_size,
        )
        workers = config.data.num_workers
        builder = self._builder(config.mixture, shards)
        if rollout is None:
            return StepLoader(planner, builder, self.dummy, rank, world, workers)
        prompts = PromptBuilder(builder.reader, self.message_encoder)
        return StepLoader(planner, prompts, prompts.dummy, rank, world, workers)

    def dummy(self) -> Pack:
        """A pack without samples, for a rank that has none."""
        return self.encoder.dummy()

    def too_long(self, planner: Planner) -> Iterator[str]:
        """A line for each source, of the mixture and of validation, that has samples longer than the context, which are
        left out."""
        stats = planner.stats()["sources"]
        left_out = {f"mixture.{name}": (source["left_out"], self._longest) for name, source in stats.items()}
        for name, settings in self.config.validation.items():
            usable = is_usable(self._source(name, self.indexed(settings)), self.config.stage.context)
            left_out[f"validation.{name}"] = sum(int((~mask).sum()) for mask in usable), self.config.stage.context
        for name, (number, longest) in left_out.items():
            if number:
                yield f"{name}: {number:,} samples are longer than {longest:,} tokens and left out"

    def validation_packs(self, name: str, settings: ShardsConfig, max_tokens: int) -> list[PackPlan]:
        """Plans of one ordered pass over a validation source, cut after ``max_tokens``."""
        source = self._source(name, self.indexed(settings))
        plans, total = [], 0
        for step, documents in enumerate(plan_once(source, self.config.stage.context)):
            if total >= max_tokens:
                break
            total += sum(document.num_tokens for document in documents)
            plans.append(PackPlan(step, 0, 0, documents))
        return plans

    def validation_builder(self, name: str, settings: ShardsConfig) -> PackBuilder:
        """Reads the packs that ``validation_packs`` planned; audio windows are the longest allowed, codes are exact."""
        builder = self._builder({name: settings}, {name: self.indexed(settings)})
        builder.audio_window_sec = (self.config.stage.audio_window_sec[1],) * 2
        builder.code_noise = 0.0
        return builder
