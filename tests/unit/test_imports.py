"""The shape of the package: data flows one way, imports never point back, files and functions stay readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "omni_train"

# From left to right; a part imports what stands to its left, and itself.
ORDER = (
    "data",
    "models",
    "objectives",
    "rollout",
    "engine",
    "evaluation",
    "reporting",
    "planning",
    "launching",
    "stage",
    "train",
    "corpus",
    "recipe",
    "measure",
    "pairs",
    "run",
    "cli_data",
    "cli",
    "__main__",
)
ANYWHERE = ("config", "data.contracts")
REPORTING_USERS = ("train", "measure", "run", "cli", "__main__")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def modules(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)


def imported_names(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below the package) of every import of the package's own modules, also those in functions."""
    module = path.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(f"{package.name}."):
                yield node.lineno, name.removeprefix(f"{package.name}.")


def is_anywhere(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in ANYWHERE)


def offence(importer: str, name: str) -> str | None:
    """Why the part ``importer`` may not import ``name``, or None."""
    imported = name.split(".")[0]
    if imported == importer or is_anywhere(name) or name == "__version__":
        return None
    if imported not in ORDER:
        return f"{imported} has no place in ORDER of this test"
    if importer == "config":
        return "config imports the contracts and nothing else of ours"
    if importer == "reporting":
        return "reporting imports nothing of ours but itself"
    if imported == "reporting" and importer not in REPORTING_USERS:
        return f"reporting is imported by {', '.join(REPORTING_USERS)} only"
    if ORDER.index(imported) > ORDER.index(importer):
        return f"{imported} is to the right of {importer}"
    return None


def import_offences(package: Path) -> list[str]:
    found = []
    for path in modules(package):
        importer = path.relative_to(package).parts[0].removesuffix(".py")
        if importer == "__init__":
            continue
        where = path.relative_to(package.parent)
        if importer not in ORDER and importer != "config":
            found.append(f"{where}:1: {importer} has no place in ORDER of this test")
            continue
        for line, name in imported_names(path, package):
            reason = offence(importer, name)
            if reason:
                found.append(f"{where}:{line}: imports {name}: {reason}")
    return found


def size_offences(package: Path) -> list[str]:
    found = []
    for path in modules(package):
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(package.parent)
        num_lines = len(text.splitlines())
        if num_lines > MAX_FILE_LINES:
            found.append(f"{where}:1: {num_lines} lines, at most {MAX_FILE_LINES}: split it by idea")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return found


def write_package(root: Path, files: dict[str, str]) -> Path:
    package = root / "omni_train"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_imports_of_the_package_point_left():
    offences = import_offences(PACKAGE)
    assert not offences, "imports that point back:\n" + "\n".join(offences)


def test_files_and_functions_stay_short():
    offences = size_offences(PACKAGE)
    assert not offences, "too long:\n" + "\n".join(offences)


def test_the_whole_package_is_seen():
    seen = {path.relative_to(PACKAGE).parts[0] for path in modules(PACKAGE)}
    assert {"config", "data", "models", "objectives", "engine", "evaluation", "reporting"} <= seen


def test_an_import_to_the_right_is_found_with_its_line(tmp_path):
    package = write_package(
        tmp_path,
        {
            "data/loader.py": "import os\n\ndef load():\n    from omni_train.engine import parallel\n",
            "models/build.py": "from omni_train.data.contracts import Pack\nfrom omni_train.config import Config\n",
            "engine/step.py": "from ..reporting.metrics import MetricsWriter\nfrom ..models import build\n",
            "reporting/report.py": "import omni_train.data.contracts\nfrom . import metrics\nimport omni_train.data\n",
            "config.py": "from omni_train.data.contracts import MODALITIES\nfrom omni_train.models.build import x\n",
            "train.py": "from omni_train.reporting import metrics\nfrom omni_train import __version__, data\n",
            "extra/new.py": "",
        },
    )
    where = [line.split(": ")[0].removeprefix("omni_train/") for line in import_offences(package)]
    assert where == ["config.py:2", "data/loader.py:4", "engine/step.py:1", "extra/new.py:1", "reporting/report.py:3"]


def test_a_long_file_and_a_long_function_are_found(tmp_path):
    body = "".join(f"    x = {i}\n" for i in range(MAX_FUNCTION_LINES))
    package = write_package(
        tmp_path,
        {
            "long.py": "x = 1\n" * (MAX_FILE_LINES + 1),
            "tall.py": f"y = 1\n\n\ndef tall():\n{body}",
            "fits.py": f"def fits():\n{body[: body.rindex('    x')]}"
            + "x = 1\n" * (MAX_FILE_LINES - MAX_FUNCTION_LINES),
        },
    )
    assert size_offences(package) == [
        "omni_train/long.py:1: 401 lines, at most 400: split it by idea",
        "omni_train/tall.py:4: tall has 81 lines, at most 80",
    ]
