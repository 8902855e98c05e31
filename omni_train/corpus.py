"""Prepare a corpus of ``data/``: its shards, its tokenizer, its index, the link ``current`` that data.root names."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omni_train.config import CONF_DIR, ConfigError, LayoutConfig, load_corpus, nearest

if TYPE_CHECKING:
    from omni_train.data.index import ShardIndex


def prepare_corpus(name: str, out: Path, vocab_size: int | None = None, scale: float = 1.0) -> Path:
    """The folder of the finished corpus, ``scale`` of its full size; ``out/current`` points to it. Cached by content.

    ``vocab_size`` of the tokenizer over its texts; None takes that of conf/corpus/NAME.yaml.

    Raises ConfigError for a corpus that data/ does not have, and where a package that it is made from is missing.
    """
    from omni_train.data.index import expand
    from omni_train.data.tokenizer import train_tokenizer

    root = CONF_DIR.parent
    known = sorted(path.parent.name for path in (root / "data").glob("*/prepare.py"))
    if name not in known:
        raise ConfigError(f"no corpus is called '{name}'; {nearest(name, known)}")
    started = time.perf_counter()
    jobs = os.cpu_count() or 1
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        folder = Path(importlib.import_module(f"data.{name}.prepare").prepare(out, jobs=jobs, scale=scale))
    except ImportError as error:
        raise ConfigError(f"corpus '{name}' cannot be made here: {error}") from error
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        texts = (folder / "tokenizer_texts.txt").read_text(encoding="utf-8").splitlines()
        train_tokenizer(texts, vocab_size or load_corpus(name).vocab_size, tokenizer)
    index_shards(expand([f"{folder}/*/*/*.tar"]), tokenizer, LayoutConfig())
    link, temporary = out / "current", out / f"current.{os.getpid()}"
    temporary.symlink_to(folder.name)
    temporary.replace(link)
    print(f"corpus {name}: {folder} ({time.perf_counter() - started:.0f} s)", flush=True)
    return folder


def index_shards(
    shards: Sequence[str | Path], tokenizer: Path, layout: LayoutConfig, max_bad_samples: float = 0.0
) -> list[ShardIndex]:
    """The indexes of shards, missing and stale ones written.

    Raises DataError naming shard, sample, byte and fix on damage and for more than ``max_bad_samples`` bad samples.
    """
    from omni_train.data.chatml import Describe
    from omni_train.data.index import ensure_index
    from omni_train.data.layouts import layout_id
    from omni_train.data.tokenizer import fingerprint, load_tokenizer

    describe, name = Describe(tokenizer, layout), fingerprint(load_tokenizer(tokenizer))
    return ensure_index(shards, describe, name, os.cpu_count() or 1, layout_id(layout), max_bad_samples)
