"""Stages codec and code2wav: speech to codes, codes to speech."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omni_train.config import Objective, RunConfig
from omni_train.data.contracts import MODALITIES, Pack
from omni_train.engine.parallel import gather_over_ranks, sum_over_ranks
from omni_train.models.build import build_encoder
from omni_train.models.code2wav import WeightAverage, build_code2wav
from omni_train.models.codec import Codec, CodeStatistics, FrozenCodec, SpeechFeatures
from omni_train.models.discriminators import Discriminators, judge
from omni_train.objectives.code2wav import code2wav_losses, multi_scale_mel_loss
from omni_train.objectives.codec import codec_losses, mel_regression, num_frames
from omni_train.objectives.terms import Losses
from omni_train.stage.contract import Parts, Stage


def codec_modules(config: RunConfig, _: PreTrainedTokenizerBase) -> dict[str, nn.Module]:
    """Modules of codec and code2wav, randomly initialised."""
    model, weights = config.model, config.stage.reconstruction
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.stage.objective is Objective.codec:
            semantic_dim = model.audio.d_model if weights.semantic > 0 else 0
            modules: dict[str, nn.Module] = {"codec": Codec(model.codec, semantic_dim)}
            if semantic_dim:
                modules["aut"] = SpeechFeatures(build_encoder(model, "audio", seed=config.seed))
            return modules
        modules = {"code2wav": build_code2wav(model, seed=config.seed), "codec": FrozenCodec(model.codec)}
        if weights.adversarial > 0:
            modules["discriminators"] = Discriminators(weights.discriminator_channels)
        return modules


def codec_stage(parts: Parts) -> Stage:
    """The codec's stage: the codebooks move after each step, by the statistics of all ranks."""
    codec, weights = parts.engines["codec"], parts.config.stage.reconstruction
    quantizer = codec.module.codec_encoder.quantizer

    def forward(pack: Pack) -> dict[str, Tensor]:
        output = codec(pack)
        mel = mel_regression(output["predicted"], output["mel"], output["is_mel"])
        return {"losses": mel, "modality": pack.doc_modality.new_full((len(mel),), MODALITIES.index("audio"))}

    def losses(pack: Pack, _: Tensor | None) -> Losses:
        output = codec(pack)
        if weights.semantic > 0:
            output["teacher"] = parts.frozen["aut"](pack)
        return codec_losses(output, weights)

    def move_codebooks() -> None:
        mine = quantizer.take_statistics()
        everywhere = CodeStatistics(
            sum_over_ranks(mine.counts), sum_over_ranks(mine.sums), gather_over_ranks(mine.candidates)
        )
        quantizer.update(everywhere, parts.config.seed)

    return parts.stage(forward=forward, losses=losses, counts=num_frames, after_step=move_codebooks)


def code2wav_stage(parts: Parts) -> Stage:
    """Code2Wav's stage: what is measured and exported is the average of its weights."""
    code2wav, codec, weights = parts.engines["code2wav"], parts.frozen["codec"], parts.config.stage.reconstruction
    average = WeightAverage(code2wav.module, weights.average_decay)

    def forward(pack: Pack) -> dict[str, Tensor]:
        output = torch.func.functional_call(code2wav.module, average.average, (pack, codec(pack)))
        mel = multi_scale_mel_loss(output["wave"], output["target"], output["lengths"])
        return {"losses": mel, "modality": pack.doc_modality.new_full((len(mel),), MODALITIES.index("audio"))}

    def losses(pack: Pack, _: Tensor | None) -> Losses:
        output = code2wav(pack, codec(pack))
        judged = None
        if weights.adversarial > 0:
            judged = judge(parts.engines["discriminators"], output["wave"], output["target"])
        return code2wav_losses(output, weights, judged)

    return parts.stage(
        forward=forward,
        losses=losses,
        counts=num_frames,
        stateful={"average": average},
        after_step=average.update,
        before_export=average.install,
    )
