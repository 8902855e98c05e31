"""torchvision where there is only a CPU build of torch: what stock `transformers` wants for videos.

The package index serves builds for CUDA; their compiled operators do not load beside torch+cpu, and the first import
of torchvision stops at ``nms``. Declaring the missing operators is enough for what the video processor needs, which is
resize and the like. Nothing outside tests/parity imports this, and omni_train never needs torchvision.

    make test-torchvision        # installs torchvision into a folder of its own and runs the tests that need it
"""

import functools
import os
import sys

FOLDER = "OMNI_TRAIN_TORCHVISION"
"""Environment variable: the folder into which torchvision was installed (pip install --no-deps --target)."""


@functools.cache
def import_torchvision() -> str:
    """Makes torchvision importable; returns why it is not, or an empty string. Call it before `transformers` is
    imported."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return f"{FOLDER} is not set: stock video processors need torchvision; run make test-torchvision"
    if "transformers" in sys.modules:
        return "transformers was imported before torchvision was in reach; run make test-torchvision"
    import torch

    try:
        torch.ops.torchvision.nms  # noqa: B018  (there is no other way to ask)
    except AttributeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(library)
    sys.path.append(folder)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return f"torchvision of {folder} cannot be imported: {error}"
    return ""


_KEEP: list = []  # operators go away with their library
