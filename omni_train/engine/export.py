"""Full weights out of engines: experts gathered over EP, parameters over ZeRO-3, names of transformers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

from omni_train.config import (
    THINKER_OBJECTIVES,
    ConfigError,
    ModelConfig,
    Objective,
    RunConfig,
    WaveHead,
    init_of,
    to_dict,
)
from omni_train.engine.checkpoint import fsync_folder, fsync_tree
from omni_train.models.build import build_omni, build_thinker, thinker_config
from omni_train.models.components import component_of
from omni_train.models.weights import canonical, codebooks, dtype_of, load_components, wave_head_of, yarn_factor_of


def gathered(parameter: nn.Parameter):
    """Context in which a ZeRO-3 parameter is whole (nothing to do for others)."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])
    return contextlib.nullcontext()


def _whole(parameter: nn.Parameter) -> Tensor:
    with gathered(parameter):
        return parameter.detach().clone()


def _over_experts(tensor: Tensor, group: Any) -> Tensor:
    """Experts of all EP ranks [E, ...] from this rank's [E / ep, ...]."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


@torch.no_grad()
def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter by its name before AutoEP took the module over, whole, on CPU. Collective: all ranks call it."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    state: dict[str, Tensor] = {}
    expert_layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, AutoEPMoELayer)}
    for name, layer in expert_layers.items():
        w1, w2, w3 = (_over_experts(_whole(getattr(layer.experts, w)), layer.ep_group) for w in ("w1", "w2", "w3"))
        state[f"{name}.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1).cpu()
        state[f"{name}.experts.down_proj"] = w2.cpu()
        state[f"{name}.gate.weight"] = _whole(layer.router.gate.weight).cpu()
        if layer.shared_experts is not None:
            for part, parameter in layer.shared_experts.named_parameters():
                state[f"{name}.shared_expert.{part}"] = _whole(parameter).cpu()
            state[f"{name}.shared_expert_gate.weight"] = _whole(layer.shared_experts_gate.weight).cpu()
    for name, parameter in module.named_parameters():
        if not any(name.startswith(f"{layer}.") for layer in expert_layers):
            state[name] = _whole(parameter).cpu()
    return state | {name: buffer.cpu() for name, buffer in codebooks(module).items()}


def component_hashes(state: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each component's weights, for proofs that a frozen part did not move."""
    digests: dict[str, Any] = {}
    for name in sorted(state):
        digest = digests.setdefault(component_of(name), hashlib.sha256())
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return {component: digest.hexdigest() for component, digest in digests.items()}


def stock_name(name: str) -> str:
    """Our parameter name → that of Qwen3OmniMoeThinkerForConditionalGeneration in memory."""
    name = name.removeprefix("towers.").removeprefix("llm.")
    if name.startswith(("audio_tower.", "visual.")):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def export(modules: dict[str, nn.Module], config: RunConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the modules of a stage as a transformers folder, committed by rename. Collective: all ranks call it.

    Thinker stages write a whole Qwen3OmniMoeThinkerForConditionalGeneration, with freshly initialised towers where
    the stage has none (text_pretrain). AuT and the captioner write their encoder under its name in the Thinker, and
    their decoder; Code2Wav has its names in the whole model, the codec our own. Talker stages write the Talker with its
    MTP, without the Thinker that they left as it was.
    """
    kind = config.stage.objective
    if kind in (Objective.talker, Objective.talker_dpo):
        modules = {"talker": modules["talker"]}
    state: dict[str, Tensor] = {}
    for module in modules.values():
        state |= full_state_dict(module)
    if dist.get_rank() == 0:
        with committed(folder) as temporary:
            if kind in THINKER_OBJECTIVES:
                write_thinker(state, config, tokenizer, temporary)
            else:
                write_parts(state, config, temporary)
            tokenizer.save_pretrained(temporary)
            write_processor(config.model, temporary)
    dist.barrier()


@contextlib.contextmanager
def committed(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of ``folder`` by one rename at the end."""
    temporary = folder.with_name(f"tmp_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    make_readable(temporary)
    fsync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    fsync_folder(folder.parent)


def make_readable(folder: Path) -> None:
    """Give the files the mode that the user's umask asks for: safetensors writes its own for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def write_thinker(
    state: dict[str, Tensor], config: RunConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save a Thinker with stock transformers (per-expert names on disk) from full weights by our names."""

    def stock_config():
        return thinker_config(config.model, tokenizer, config.stage.yarn_factor)

    state = {stock_name(name): tensor for name, tensor in state.items()}
    whole = build_thinker(stock_config(), seed=config.seed, device="meta")
    missing = {name for name, _ in whole.named_parameters()} - set(state)
    if missing:  # a stage of the LLM alone: the towers are those that any stage of this seed starts from
        initial = build_thinker(stock_config(), seed=config.seed).state_dict()
        state |= {name: initial[name] for name in missing}
    dtype = next(iter(state.values())).dtype
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    whole.to(dtype).save_pretrained(folder, state_dict=state)  # config.json names the model's: readers follow it


def write_parts(state: dict[str, Tensor], config: RunConfig, folder: Path) -> None:
    """Save AuT, the captioner, the codec, Code2Wav or the Talker: one safetensors file, a config.json of sizes."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    description = {"model_type": f"omni_train_{config.stage.objective.name}", "model": to_dict(config)["model"]}
    (folder / "config.json").write_text(json.dumps(description, indent=2))


def write_processor(model: ModelConfig, folder: Path) -> None:
    """The processor files that stock transformers needs beside a Thinker: mel features, patches of pictures and videos.

    NOTE: the videos' limits are in a file of their own, without which stock takes those of pictures. They count where
    the video processor is called alone: stock's Qwen3OmniMoeProcessor puts published limits in their place unless a
    call passes ``size``. The frame rate is not here because stock wants it with each call (``fps``).
    """
    vision = model.vision
    shared = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3OmniMoeProcessor",
    }
    WhisperFeatureExtractor(feature_size=model.audio.num_mel_bins).save_pretrained(folder)
    picture = json.loads((folder / "preprocessor_config.json").read_text()) | shared
    picture |= {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": vision.min_pixels,
        "max_pixels": vision.max_pixels,
        "size": {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels},
    }
    video = shared | {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "max_frames": vision.video_max_frames,
        "size": {"shortest_edge": vision.video_min_pixels, "longest_edge": vision.video_max_pixels},
    }
    if vision.video_total_pixels is not None:  # stock takes nine tenths of the tokens
        tokens = vision.video_total_pixels / (vision.patch_size * vision.spatial_merge_size) ** 2
        video |= {"cap_pixels_per_frame": True, "max_video_tokens": math.ceil(tokens / 0.9)}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture, indent=2))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2))


def write_omni(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    init: dict[str, str],
    folder: Path,
    card: Callable[[dict[str, str]], str] | None = None,
) -> dict[str, str]:
    """Write the whole model from the exports of stages, as a folder for stock's Qwen3OmniMoeForConditionalGeneration.

    ``init``: component → folder, as a stage's. Returns what was taken: component → folder, of which ``card`` makes the
    text of README.md. Raises ConfigError
    for a component without a folder, one that its folder does not hold, or a Code2Wav whose head stock does not have.
    """
    thinker = init_of(init, "llm")
    if thinker is None:
        raise ConfigError("init.llm: a whole model needs a folder for every component; give +init.llm=FOLDER")
    omni = build_omni(model, tokenizer, yarn_factor_of(Path(thinker)), device="cpu")
    components = sorted({component_of(canonical(name)) for name, _ in omni.named_parameters()})
    sources = {name: init_of(init, name) or "" for name in components}
    missing = [name for name, source in sources.items() if not source]
    if missing:
        raise ConfigError(f"init has no folder for {', '.join(missing)}; give +init.{missing[0]}=FOLDER")
    _check_stock_voice(Path(sources["code2wav"]))
    for name, source in sources.items():
        load_components(omni, Path(source), {name})
    omni.to(dtype_of(Path(thinker)))
    with committed(folder) as temporary:
        omni.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_processor(model, temporary)
        if card:
            (temporary / "README.md").write_text(card(sources))
    return sources


def _check_stock_voice(code2wav: Path) -> None:
    head = wave_head_of(code2wav)
    if head is not WaveHead.conv:
        raise ConfigError(
            f"init.code2wav: '{code2wav}' has the head '{head.name}', which stock transformers does not have; train "
            "one with model.code2wav.head=conv on the same codec (recipes/tiny_stock_voice.yaml does), give its export"
        )
