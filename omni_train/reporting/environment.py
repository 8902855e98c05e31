"""What a figure depends on outside the configuration."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "webdataset", "hydra-core", "tokenizers", "numpy")


def describe_environment() -> dict[str, Any]:
    """What a result depends on outside the configuration: versions, processor count, accelerator, commit."""
    import torch

    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu_count": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    installed = {dist.metadata["Name"].lower(): dist.version for dist in map(_distribution, PACKAGES) if dist}
    return environment | installed | {"git_commit": _git_commit()}


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code in use, with "+dirty" after it if tracked files differ; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
