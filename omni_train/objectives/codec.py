"""The codec's objective: log-mel from quantised latents, commitment, semantic features.

Shapes: B clips, F frames, X anything averaged over, M mel bands, T codec frames, D channels. A loss [B] is a mean over
the real part of each clip; times the clips' numbers of codec frames it makes the sum of a pack.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from omni_train.config import ReconstructionConfig
from omni_train.data.contracts import Pack
from omni_train.objectives.terms import Losses, LossTerm


def num_frames(pack: Pack) -> dict[str, int]:
    """Counts that a pack adds to the global divisors: codec frames, none for a pack without samples."""
    return {"tokens": pack.num_tokens if pack.sample_ids else 0}


def clip_means(values_BXF: Tensor, is_real_BF: Tensor) -> Tensor:
    """Mean over all X of a clip's real frames, [B]; 0 for a clip without any."""
    weights = is_real_BF[:, None].to(values_BXF.dtype)
    return (values_BXF * weights).sum((1, 2)) / (weights.sum((1, 2)) * values_BXF.shape[1]).clamp(min=1)


def mel_regression(predicted_BMF: Tensor, mel_BMF: Tensor, is_real_BF: Tensor) -> Tensor:
    """|difference| of log-mel spectrograms, as they are and averaged over 4 frames: the mean of both scales, [B]."""
    pooled = [F.avg_pool1d(x, 4) for x in (predicted_BMF, mel_BMF)]
    fine = clip_means((predicted_BMF - mel_BMF).abs(), is_real_BF)
    coarse = clip_means((pooled[0] - pooled[1]).abs(), is_real_BF[:, ::4])
    return (fine + coarse) / 2


def semantic_distance(features_BTD: Tensor, teacher_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
    """Mean over real frames of 1 − cosine (Zhang et al. 2023, SpeechTokenizer), [B]."""
    cosine = F.cosine_similarity(features_BTD.float(), teacher_BTD.float(), dim=-1)
    return clip_means((1 - cosine)[:, None], is_real_BT)


def codec_losses(output: dict[str, Tensor], weights: ReconstructionConfig) -> Losses:
    """Loss terms of ``Codec.forward``'s output, and the share of codewords in use. ``teacher`` [B, T, E] belongs to
    it where the first codebook is drawn to features."""
    mel = mel_regression(output["predicted"], output["mel"], output["is_mel"])
    frames = output["frames"].to(mel.dtype)
    commitment = clip_means(output["commitment"][:, None], output["is_real"])
    terms = [
        LossTerm("codec", "mel", (mel * frames).sum(), "tokens"),
        LossTerm("codec", "commitment", (commitment * frames).sum(), "tokens", weights.commitment),
    ]
    if weights.semantic > 0:
        semantic = semantic_distance(output["semantic"], output["teacher"], output["is_real"])
        terms.append(LossTerm("codec", "semantic", (semantic * frames).sum(), "tokens", weights.semantic))
    return Losses(terms, {"codec/codewords_in_use": output["usage"]})
