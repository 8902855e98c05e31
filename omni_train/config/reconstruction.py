"""How a codec's and Code2Wav's losses are weighed."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from omni_train.config.model import ConfigError


@dataclass(kw_only=True, slots=True)
class ReconstructionConfig:
    """Weights of the losses beside the mel loss, whose weight is 1; what objective each belongs to."""

    commitment: float = 0.25  # codec: residuals are drawn to their codewords
    semantic: float = 0.0  # codec: the first codebook is drawn to the features of init.audio_encoder
    stft: float = 0.0  # code2wav: log-magnitude spectrograms at three scales
    adversarial: float = 0.0  # code2wav: above 0, discriminators train beside it
    feature_matching: float = 2.0  # code2wav: relative to the adversarial loss
    discriminator_channels: int = 32  # code2wav
    average_decay: float = 0.999  # code2wav: of the average of its weights, which is what is exported

    def __post_init__(self) -> None:
        if not 0 <= self.average_decay < 1:
            raise ConfigError(f"stage.reconstruction.average_decay ({self.average_decay}) must lie in 0 … 1, below 1")

    def check(self, objective: str, components: Container[str]) -> None:
        """Raises ConfigError for a value that has no effect on a stage with this objective and these components."""
        defaults = ReconstructionConfig()
        for name in self.__slots__:
            user = "codec" if name in ("commitment", "semantic") else "code2wav"
            if getattr(self, name) != getattr(defaults, name) and objective != user:
                raise ConfigError(
                    f"stage.reconstruction.{name} ({getattr(self, name):g}) has no effect on {objective}, only on "
                    f"{user}; leave it out"
                )
        if objective == "code2wav" and (self.adversarial > 0) != ("discriminator" in components):
            raise ConfigError(
                f"stage.reconstruction.adversarial ({self.adversarial:g}) and stage.components.discriminator belong "
                "together: give the discriminators a learning rate where the weight is above 0, leave them out at 0"
            )
