"""Settings of codec and Code2Wav that a user can get wrong."""

from __future__ import annotations

import dataclasses

import pytest
from support import micro_model

from omni_train.config import ConfigError, ReconstructionConfig, load

ADVERSARIES = "+stage.components.discriminator={lr: 2e-4, weight_decay: 0.0}"


def test_a_weight_without_effect_is_refused():
    with pytest.raises(ConfigError, match=r"stage\.reconstruction\.stft \(0\.5\) has no effect on codec"):
        load("codec", ["stage.reconstruction.stft=0.5"])
    with pytest.raises(ConfigError, match="has no effect on next_token, only on codec"):
        load("s2_general", ["stage.reconstruction.semantic=1.0"])


def test_adversaries_have_a_weight_and_a_rate_or_neither():
    for overrides in (["stage.reconstruction.adversarial=0.1"], [ADVERSARIES]):
        with pytest.raises(ConfigError, match="belong together"):
            load("code2wav", overrides)
    config = load("code2wav", ["stage.reconstruction.adversarial=0.1", ADVERSARIES])
    assert config.stage.components["discriminator"].lr == 2e-4


@pytest.mark.parametrize("override", ["engine.zero_stage=3", "engine.precision=bf16"])
def test_averages_need_whole_fp32_weights(override):
    with pytest.raises(ConfigError, match="needs whole fp32 weights"):
        load("codec", [override])


def test_the_average_has_a_decay_below_one():
    with pytest.raises(ConfigError, match="average_decay"):
        ReconstructionConfig(average_decay=1.0)


def test_the_codec_and_code2wav_agree_on_codes_and_rates():
    model = micro_model(4)
    with pytest.raises(ConfigError, match=r"model\.codec\.codebook_size \(64\) and model\.code2wav\.codebook_size"):
        dataclasses.replace(model, codec=dataclasses.replace(model.codec, codebook_size=64))
    with pytest.raises(ConfigError, match="must multiply to 8"):
        dataclasses.replace(model.codec, strides=[2, 2])
    with pytest.raises(ConfigError, match="must multiply to 1920"):
        dataclasses.replace(model.code2wav, upsample_rates=[8, 5, 4, 2])
