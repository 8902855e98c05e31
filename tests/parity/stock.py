"""What parity tests share: a micro Thinker away from its initial weights, samples of every kind as files, and what
stock `transformers` makes of the same files with the tokenizer and processors of an export folder.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from support import Case, run_config, run_config_in, tokenizer_folder
from torch import nn
from transformers import AutoTokenizer, Qwen3OmniMoeThinkerForConditionalGeneration, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths

from omni_train.config import (
    AudioModelConfig,
    DecoderModelConfig,
    ModelConfig,
    RunConfig,
    TextModelConfig,
    VisionModelConfig,
)
from omni_train.data.contracts import Sample
from omni_train.data.encode import Encoder
from omni_train.data.pipeline import media_geometry
from omni_train.data.tokenizer import load_tokenizer

MICRO = ModelConfig(
    name="micro",
    text=TextModelConfig(
        vocab_size=320,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        mrope_section=[4, 2, 2],
        max_position_embeddings=64,
        rope_theta=10_000.0,
    ),
    audio=AudioModelConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, downsample_hidden_size=8
    ),
    vision=VisionModelConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 2],
        patch_size=4,
        min_pixels=64,
        max_pixels=4096,
    ),
    decoder=DecoderModelConfig(num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
)

KINDS = ("text", "image", "audio", "short_audio", "image_audio", "two_pictures")
ANSWER = "a cat<|im_end|>\n"
_MEDIA = {
    "text": "",
    "image": "i",
    "audio": "a",
    "short_audio": "s",
    "image_audio": "is",
    "two_pictures": "iqa",
}


def config_of(*, yarn_factor: float = 1.0, expert_parallel: int = 1, folder: str | None = None) -> RunConfig:
    """A stage that trains the whole micro Thinker."""
    case = Case(world=expert_parallel, expert_parallel=expert_parallel)
    config = run_config_in(case, folder) if folder else run_config(case)
    config.model, config.stage.yarn_factor = MICRO, yarn_factor
    return config


@torch.no_grad()
def perturb(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter far from its initial value, so that norms, biases, routers and experts all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter += 0.2 * noise
        else:
            fan_in = parameter[0].numel() if "experts" not in name else parameter.shape[-1]
            parameter += noise * fan_in**-0.5


def files(kind: str, folder: Path) -> dict[str, Path]:
    """Media files of a sample of this kind by member name, written into ``folder`` if they are not there."""
    found = {}
    for letter in _MEDIA[kind]:
        rng = np.random.default_rng(ord(letter))
        name = f"{letter}.png" if letter in "iq" else f"{letter}.flac"
        path = folder / name
        if letter in "iq":
            height, width = {"i": (21, 34), "q": (60, 12)}[letter]
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        else:
            seconds = {"a": 2.37, "s": 0.61}[letter]
            time = np.arange(int(seconds * 16_000)) / 16_000
            wave = 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time) + 0.05 * rng.standard_normal(len(time))
            soundfile.write(path, wave.astype(np.float32), 16_000)
        found[name] = path
    return found


def sample(kind: str, folder: Path, answer: str = "a cat") -> Sample:
    """A conversation about the files, as a shard would hold it."""
    members = {name: path.read_bytes() for name, path in files(kind, folder).items()}
    parts = [{"type": t, t: name} for name in members for t in ["image" if name.endswith("png") else "audio"]]
    content = {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": f"what is {kind}?"}]},
            {"role": "assistant", "content": answer},
        ]
    }
    return Sample("test", "shard", kind, content, members)


def encoder_of(folder: str | None = None) -> Encoder:
    """Our encoder for the micro model."""
    return Encoder(load_tokenizer(folder or tokenizer_folder()), media_geometry(MICRO.vision))


def stock_thinker(export: Path, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(stock model in fp32 from an export folder, loading info)."""
    model, info = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True, local_files_only=True, **config
    )
    return model.eval(), info


def stock_inputs(kind: str, media: Path, export: Path, answer: str = ANSWER) -> dict[str, torch.Tensor]:
    """Inputs of the stock model for the same files, made by stock parts built from the export's files alone.

    What Qwen3OmniMoeProcessor does to text is done here by hand: it cannot be built without torchvision.
    """
    tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
    text, waves, pictures = "<|im_start|>user\n", [], []
    inputs: dict[str, torch.Tensor] = {}
    for path in files(kind, media).values():
        if path.suffix == ".flac":
            waves.append(soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32")[0])
        else:
            pictures.append(Image.open(path))
    if waves:
        extractor = WhisperFeatureExtractor.from_pretrained(export)
        arguments = {"sampling_rate": 16_000, "padding": True, "truncation": False, "return_attention_mask": True}
        features = extractor(waves, return_tensors="pt", **arguments)
        inputs |= {"input_features": features["input_features"], "feature_attention_mask": features["attention_mask"]}
        audio_tokens = iter(_get_feat_extract_output_lengths(features["attention_mask"].sum(-1)).tolist())
    if pictures:
        processor = Qwen2VLImageProcessorPil.from_pretrained(export)
        inputs |= dict(processor(images=pictures, return_tensors="pt"))
        image_tokens = iter((inputs["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist())
    for path in files(kind, media):
        if path.endswith("flac"):
            text += "<|audio_start|>" + "<|audio_pad|>" * next(audio_tokens) + "<|audio_end|>"
        else:
            text += "<|vision_start|>" + "<|image_pad|>" * next(image_tokens) + "<|vision_end|>"
    text += f"what is {kind}?<|im_end|>\n<|im_start|>assistant\n{answer}"
    return {**tokenizer(text, return_tensors="pt"), **inputs}
