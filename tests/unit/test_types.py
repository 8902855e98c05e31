"""The annotations of the package agree with one another."""

import subprocess
import sys
from pathlib import Path


def test_mypy_has_nothing_to_say() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", "mypy", "omni_train"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
