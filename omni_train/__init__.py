"""omni-train: trains a Qwen3-Omni-class model whole.

shards → samples → packs → model → objective → engine → checkpoint
"""

__version__ = "0.1.0"
