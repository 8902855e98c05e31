"""Puts this folder on the path, so that test modules find ``support``; one thread, before torch is imported."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
