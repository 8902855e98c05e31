"""What parity tests share: a micro Thinker away from its initial weights, samples of every kind as files, and what
stock `transformers` makes of the same files with the tokenizer and processors of an export folder.
"""

from __future__ import annotations

import functools
import io
import types
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from clips import steady_video
from PIL import Image
from support import Case, micro_talker, run_config, run_config_in, stock_arguments, tokenizer_folder
from torch import nn
from torchvision_for_tests import import_torchvision
from transformers import AutoTokenizer, Qwen3OmniMoeThinkerForConditionalGeneration, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as stock_model
from transformers.models.qwen3_omni_moe import processing_qwen3_omni_moe as stock_processor
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths
from transformers.video_utils import load_video

from omni_train.config import (
    AudioModelConfig,
    Code2WavModelConfig,
    CodecModelConfig,
    DecoderModelConfig,
    ModelConfig,
    RunConfig,
    TextModelConfig,
    VisionModelConfig,
)
from omni_train.data.contracts import Document, Sample
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
        video_min_pixels=128,
        video_max_pixels=1024,
        video_max_frames=16,
    ),
    decoder=DecoderModelConfig(num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    codec=CodecModelConfig(encoder_dim=16, latent_dim=8, num_codebooks=4, codebook_size=32),
    code2wav=Code2WavModelConfig(
        num_quantizers=4,
        codebook_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        decoder_dim=32,
    ),
    talker=micro_talker(accept_hidden_layer=3),
)

VIDEO_KINDS = ("video", "video_audio", "video_and_picture")
KINDS = ("text", "image", "audio", "short_audio", "image_audio", "two_pictures", *VIDEO_KINDS)
ANSWER = "a cat<|im_end|>\n"
_MEDIA = {
    "text": "",
    "image": "i",
    "audio": "a",
    "short_audio": "s",
    "image_audio": "is",
    "two_pictures": "iqa",
    "video": "v",
    "video_audio": "w",
    "video_and_picture": "vi",
    "two_videos": "wv",
    "one_frame": "f",
    "long_video": "l",
    "long_video_audio": "m",
    "all": "aiws",
}


@dataclass(frozen=True)
class Clip:
    """A video file: ``size`` is (width, height), ``tones`` the samples of its sound."""

    num_frames: int
    fps: Fraction
    size: tuple[int, int]
    tones: int = 0


CLIPS = {
    "v": Clip(11, Fraction(6), (50, 37)),  # an odd number of frames, sides that need a resize
    "w": Clip(12, Fraction(6), (64, 48), 30_080),
    "f": Clip(1, Fraction(2), (41, 23)),
    "l": Clip(25, Fraction(5, 2), (33, 23)),  # more than video_max_frames at 2 a second
    "m": Clip(25, Fraction(5, 2), (33, 23), 150_000),
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
        name = f"{letter}.mp4" if letter in CLIPS else f"{letter}.png" if letter in "iq" else f"{letter}.flac"
        path = folder / name
        if clip := CLIPS.get(letter):
            path.write_bytes(steady_video(clip.num_frames, clip.fps, clip.size, clip.tones))
        elif letter in "iq":
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
    return Sample("test", "shard", kind, {"messages": messages(kind, list(members), answer)}, members)


def messages(kind: str, members: list[str], answer: str = "a cat") -> list[dict[str, Any]]:
    """A question about the media and its answer."""
    parts: list[dict[str, Any]] = []
    for name in members:
        letter, suffix = name.split(".")
        medium = {"png": "image", "flac": "audio", "mp4": "video"}[suffix]
        parts.append({"type": medium, medium: name})
        if medium == "video":
            parts[-1]["use_audio_in_video"] = CLIPS[letter].tones > 0
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": f"what is {kind}?"}]},
        {"role": "assistant", "content": answer},
    ]


def encoder_of(folder: str | None = None) -> Encoder:
    """Our encoder for the micro model."""
    return Encoder(load_tokenizer(folder or tokenizer_folder()), media_geometry(MICRO.vision))


def stock_thinker(export: Path, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(stock model in fp32 from an export folder, loading info)."""
    model, info = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True, local_files_only=True, **config
    )
    return model.eval(), info


def stock_positions(input_ids, ids, frames=(), images=(), videos=(), seconds=(), with_sound=False):
    """``get_rope_index`` of the Thinker, which reads nothing but these few values of the model."""
    owner = stock_model.Qwen3OmniMoePreTrainedModelForConditionalGeneration
    config = types.SimpleNamespace(
        image_token_id=ids.image_pad,
        video_token_id=ids.video_pad,
        audio_token_id=ids.audio_pad,
        vision_start_token_id=ids.vision_start,
        audio_start_token_id=ids.audio_start,
        position_id_per_seconds=13,
        audio_config=types.SimpleNamespace(n_window=50),
    )
    model = types.SimpleNamespace(config=config, spatial_merge_size=2)
    model.get_llm_pos_ids_for_vision = functools.partial(owner.get_llm_pos_ids_for_vision, model)
    tokens = torch.tensor(input_ids)[None]
    positions, _ = owner.get_rope_index(
        model,
        tokens,
        torch.tensor(images) if len(images) else None,
        torch.tensor(videos) if len(videos) else None,
        torch.ones_like(tokens),
        with_sound,
        torch.tensor(frames) if len(frames) else None,
        torch.tensor(seconds) if len(seconds) else None,
    )
    return positions[:, 0].numpy()


def sound_in_video(ids, grid, seconds, num_audio_tokens, ids_per_second=13.0):
    """Ids of a video with its sound, as the stock processor interleaves them."""
    tokens = {"audio_bos_token": "S", "audio_eos_token": "E", "video_token": "V", "audio_token": "A"}
    owner = types.SimpleNamespace(video_processor=types.SimpleNamespace(merge_size=2), **tokens)
    text = stock_processor.Qwen3OmniMoeProcessor.replace_video_with_audio_token(
        owner,
        {"video_grid_thw": np.array([grid]), "video_second_per_grid": [seconds]},
        0,
        {"num_audio_tokens": [num_audio_tokens]},
        0,
        position_id_per_seconds=ids_per_second,
    )
    table = {"S": ids.audio_start, "E": ids.audio_end, "V": ids.video_pad, "A": ids.audio_pad}
    return [table[letter] for letter in text]


def processor_inputs(kind: str, media: Path, export: Path, document: Document, answer: str = ANSWER) -> dict[str, Any]:
    """Inputs of the stock model for the same files, made by stock's whole Qwen3OmniMoeProcessor from an export folder.

    Needs torchvision. Stock gets the frames that are on screen when ours are looked at, decoded by its own PyAV reader:
    its sampling differs (see test_video_processor). ``document`` says how many and how far apart. Pictures go through
    stock's PIL processor, which ours equals; its torchvision twin resizes to bytes that differ by one here and there.
    NOTE: a call has one ``fps`` for all its videos, and ``size`` must be passed: the processor's class has published
    limits that go before those of the export's files.
    """
    from transformers import Qwen3OmniMoeProcessor

    processor = Qwen3OmniMoeProcessor.from_pretrained(export, local_files_only=True)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(export)
    pictures, waves, videos, video_of_wave = [], [], [], []
    found = files(kind, media)
    for path in found.values():
        if path.suffix == ".png":
            pictures.append(Image.open(path))
        elif path.suffix == ".flac":
            waves.append(soundfile.read(path, dtype="float32")[0])
            video_of_wave.append(None)
        else:
            number = len(videos)
            videos.append(seen_frames(path, document.video_grids[number][0], document.video_seconds_per_grid[number]))
            if CLIPS[path.stem].tones:
                waves.append(sound_of(path))
                video_of_wave.append(number)
    (seconds,) = set(document.video_seconds_per_grid)
    limits = processor.video_processor.size
    has_sound = any(video is not None for video in video_of_wave)
    question = messages(kind, list(found))[:1]
    text = processor.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=text + answer,
        images=pictures or None,
        videos=videos,
        audio=waves or None,
        audio_from_video_indices=video_of_wave if has_sound else None,
        load_audio_from_video=has_sound,
        videos_kwargs={
            "fps": processor.video_processor.temporal_patch_size / seconds,
            "cap_pixels_per_frame": False,
            "size": {"shortest_edge": limits.shortest_edge, "longest_edge": limits.longest_edge},
        },
        return_tensors="pt",
    )
    return {**inputs, "use_audio_in_video": has_sound}


def seen_frames(path: Path, num_grids: int, seconds_per_grid: float) -> np.ndarray:
    """Frames uint8 [2 * num_grids, height, width, 3] on screen in the middle of each share of a clip's time."""

    def all_frames(metadata: Any, **_: Any) -> np.ndarray:
        return np.arange(metadata.total_num_frames)

    clip = CLIPS[path.stem]
    times = (np.arange(2 * num_grids) + 0.5) * seconds_per_grid / 2
    shown = np.minimum(np.floor(times * float(clip.fps)), clip.num_frames - 1).astype(int)
    return load_video(str(path), backend="pyav", sample_indices_fn=all_frames)[0][shown]


def sound_of(path: Path) -> np.ndarray:
    """The sound of a clip as decoded, float32 at 16 kHz, without the silence that fills its last AAC frame."""
    with av.open(str(path)) as container:
        wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return wave[: CLIPS[path.stem].tones]


def stock_inputs(kind: str, media: Path, export: Path, answer: str = ANSWER) -> dict[str, Any]:
    """Inputs of the stock model for the same files, made by stock parts built from the export's files alone.

    What Qwen3OmniMoeProcessor does to text is done here by hand: it cannot be built without torchvision. For the same
    reason a video's tokens and features are ours where torchvision is missing; its positions are stock's all the same.
    """
    if any(letter in CLIPS for letter in _MEDIA[kind]):
        encoder = encoder_of(str(export))
        said = sample(kind, media, answer.removesuffix("<|im_end|>\n"))
        document = encoder.encode(said) if answer else encoder.prompt_and_answer(said)[0]
        if not import_torchvision():
            return processor_inputs(kind, media, export, document, answer)
        return {**stock_arguments(document), "use_audio_in_video": any(document.video_has_sound)}
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
