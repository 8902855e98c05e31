"""Reading any component's weights from a local transformers folder (ours, Qwen3, Qwen3-VL, Qwen3-Omni, AuT).

Only the tensors that are asked for are read. Experts stored one by one are stacked into the fused form.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Qwen3OmniMoeThinkerConfig

from omni_train.config import THINKER_COMPONENTS, ConfigError, WaveHead
from omni_train.models.build import build_thinker
from omni_train.models.components import component_of
from omni_train.models.thinker import Thinker, compose

EXPERT = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
WAVE_HEAD = "code2wav.decoder."
VOCABULARY = re.compile(r"model\.(language_model\.)?embed_tokens\.weight$|lm_head\.weight$")


def canonical(name: str) -> str:
    """One spelling for a parameter in our modules, in transformers in memory, and in folders of the Qwen3 family."""
    for prefix in ("thinker.", "towers.", "llm."):
        name = name.removeprefix(prefix)
    for part in ("visual.", "audio_tower."):
        name = re.sub(rf"^model\.{re.escape(part)}", part, name)
    return re.sub(r"^model\.language_model\.", "model.", name)


class WeightFolder:
    """The tensors of a folder of safetensors files by canonical name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"no *.safetensors file in '{folder}'; give a local transformers folder")
        self.handles = [safe_open(file, framework="pt") for file in files]
        self.where = {canonical(key): (handle, key) for handle in self.handles for key in handle.keys()}

    def read(self, name: str) -> Tensor | None:
        """The tensor of a canonical name, experts stacked; None when the folder has none."""
        if name in self.where:
            handle, key = self.where[name]
            return handle.get_tensor(key)
        if match := EXPERT.match(name):
            return self._stack_experts(*match.groups())
        return None

    def _stack_experts(self, prefix: str, which: str) -> Tensor | None:
        experts: list[Tensor] = []
        while f"{prefix}.{len(experts)}.down_proj.weight" in self.where:
            stem = f"{prefix}.{len(experts)}"
            parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
            experts.append(torch.cat([self.read(f"{stem}.{part}.weight") for part in parts]))
        return torch.stack(experts) if experts else None


@torch.no_grad()
def load_components(module: nn.Module, folder: Path, components: set[str], leave_out: str | None = None) -> set[str]:
    """Copy these components' weights from ``folder`` into ``module`` and return which of them the module has.

    Names that begin with ``leave_out`` stay as initialised.

    A folder with a smaller vocabulary (Qwen3's 151,936 of Qwen3-Omni's 152,064) fills the first rows of embedding and
    head; the others stay as initialised. Raises ConfigError naming a tensor that is missing or has another shape.
    """
    weights, found = WeightFolder(folder), set()
    for name, parameter in (*module.named_parameters(), *codebooks(module).items()):  # ours, or stock's whole model's
        component = component_of(canonical(name))
        if component not in components:
            continue
        found.add(component)
        if leave_out and name.startswith(leave_out):
            continue
        tensor = weights.read(canonical(name))
        if tensor is None and name.endswith("lm_head.weight"):
            tensor = weights.read("model.embed_tokens.weight")  # tied in that folder
        if tensor is None:
            raise ConfigError(f"'{folder}' has no tensor '{canonical(name)}' of component {component}; {_hint(folder)}")
        if VOCABULARY.search(name) and tensor.shape[1:] == parameter.shape[1:] and len(tensor) < len(parameter):
            parameter[: len(tensor)].copy_(tensor)
            continue
        if tensor.shape != parameter.shape:
            raise ConfigError(
                f"'{canonical(name)}' is {list(tensor.shape)} in '{folder}', the model needs {list(parameter.shape)}; "
                "choose the preset that the folder was made with"
            )
        parameter.copy_(tensor)
    return found


def load_thinker(folder: Path) -> Thinker:
    """The exported Thinker in ``folder``, of its own size."""
    stock = Qwen3OmniMoeThinkerConfig.from_pretrained(folder, local_files_only=True)
    thinker = compose(build_thinker(stock, seed=0))
    load_components(thinker, folder, set(THINKER_COMPONENTS))
    return thinker


def codebooks(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are trained like weights: a codec's codebooks with their statistics, by name."""
    return {name: buffer for name, buffer in module.named_buffers() if ".quantizer." in name}


def _hint(folder: Path) -> str:
    config = Path(folder) / "config.json"
    kind = json.loads(config.read_text()).get("model_type", "unknown") if config.exists() else "without a config.json"
    return f"it is a folder of model type '{kind}'"


def wave_head_of(folder: Path) -> WaveHead:
    """The head of an exported Code2Wav; stock's where the folder does not say. ConfigError for an unknown one."""
    path = folder / "config.json"
    written = json.loads(path.read_text()) if path.is_file() else {}
    head = written.get("model", {}).get("code2wav", {}).get("head", WaveHead.conv.name)
    if head not in WaveHead.__members__:
        raise ConfigError(f"'{path}' names the head '{head}' of Code2Wav; known are {', '.join(WaveHead.__members__)}")
    return WaveHead[head]


def dtype_of(folder: Path) -> torch.dtype:
    """The type of number of an exported Thinker's weights."""
    embeddings = WeightFolder(folder).read("model.embed_tokens.weight")
    return torch.float32 if embeddings is None else embeddings.dtype


def yarn_factor_of(folder: Path) -> float:
    """The YaRN factor that an exported Thinker was trained with; 1 without YaRN."""
    description = json.loads((Path(folder) / "config.json").read_text())
    return float((description.get("text_config", {}).get("rope_parameters") or {}).get("factor", 1.0))
