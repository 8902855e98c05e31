"""Where the two Debian packages lie: a folder given, the system, or fetched without root.

OMNI_TRAIN_DEBIAN_ROOT ─┐
/usr/share of the system ├─▶ <root>/usr/share/tuxpaint/stamps, <root>/usr/share/pocketsphinx/test/data
OUT/packages ◀─ apt-get download, dpkg-deb -x
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

STAMPS = ("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
POCKETSPHINX = ("pocketsphinx-testdata", "usr/share/pocketsphinx/test/data")
ROOT_VARIABLE = "OMNI_TRAIN_DEBIAN_ROOT"


def find(package: tuple[str, str], cache: Path) -> Path:
    """The data folder of a package (name, path below a root).

    Looks into the folder that OMNI_TRAIN_DEBIAN_ROOT names (then nowhere else), into the system, into ``cache``, and
    fetches the package into ``cache`` at last. Raises ValueError with the commands to run by hand where none works.
    """
    name, inside = package
    given = os.environ.get(ROOT_VARIABLE)
    for root in [Path(given)] if given else [Path("/"), cache]:
        if (root / inside).is_dir():
            return root / inside
    if given:
        raise ValueError(f"{ROOT_VARIABLE}={given} has no {inside}; {_by_hand(name, given)}")
    _fetch(name, cache)
    return cache / inside


def _fetch(name: str, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching the Debian package {name}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True, capture_output=True, text=True)
            (archive,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", archive.name, str(cache.resolve())], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise ValueError(
                f"cannot fetch the Debian package {name} ({detail[-1] if detail else error}); {_by_hand(name)}"
            ) from error


def _by_hand(name: str, root: str = "FOLDER") -> str:
    return (
        f"on a Debian machine run `apt-get download {name} && dpkg-deb -x {name}_*.deb {root}`, "
        f"then prepare again with {ROOT_VARIABLE}={root}"
    )
