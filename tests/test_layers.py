"""The import order of docs/architecture.md, as import-linter's contract in pyproject.toml states it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent


def contract() -> list[dict[str, object]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, object]] = settings["tool"]["importlinter"]["contracts"]
    return found


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the package `vlmc` that lies in the folder `tree`."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package's code, to be broken."""
    code = shutil.ignore_patterns(".*", "tests", "out", "build", "dist", "benchmarks", "docs", "model", "atlas")
    shutil.copytree(ROOT, tmp_path / "vlmc", ignore=code)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_layers_are_those_of_the_design() -> None:
    order = next(c["layers"] for c in contract() if c["type"] == "layers")
    assert order == [
        "cli",
        "(serving) | reports",
        "engines",
        "calibration",
        "exporter",
        "profiles",
        "evaluation",
        "runtime",
        "console",
        "artifact",
        "records",
        "files",
        "errors",
        "demo",
    ]


def test_the_contract_is_kept(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(contract())} kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("runtime/session.py", "from ..engines import build"),  # a lower room uses a higher one
        ("profiles/device.py", "import torch"),  # what runs on the device needs PyTorch
        ("runtime/images.py", "def late():\n    import onnx"),  # late is no better
        ("demo/words.py", "from ..errors import VlmcError"),  # the demo imports nothing of vlmc
        ("strayed.py", ""),  # a module that has no place in the order
    ],
)
def test_a_breach_is_found(tree: Path, module: str, line: str) -> None:
    with (tree / "vlmc" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
