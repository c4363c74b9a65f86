"""The wheel holds every package of the tree with its data, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
# What the packages need besides code; each pattern stands in pyproject.toml, [tool.setuptools.package-data].
DATA = ("demo/atlas/*", "demo/model/*", "exporter/presets/*.json", "profiles/devices/*.toml", "reports/*.jinja")
DATA += ("runtime/kernels.cu", "runtime/kernels.ptx")


def packages() -> list[Path]:
    """Every folder of the tree that is a package, by path relative to the root."""
    found = [Path()]
    for folder in found:
        inside = (init.parent.relative_to(ROOT) for init in (ROOT / folder).glob("*/__init__.py"))
        found += sorted(path for path in inside if not path.name.startswith("."))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The wheel's files, built from a copy of the tree, so that nothing left by an older build gets in."""
    tree = tmp_path_factory.mktemp("tree") / "vlmc"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "build", "dist", "*.egg-info")
    )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree.parent)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tree.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_it_holds_every_module_and_data_file_and_nothing_else(files: set[str]) -> None:
    code = {path.relative_to(ROOT) for folder in packages() for path in (ROOT / folder).glob("*.py")}
    data = {path.relative_to(ROOT) for pattern in DATA for path in ROOT.glob(pattern)}
    expected = {f"vlmc/{path.as_posix()}" for path in code | data}
    found = {name for name in files if ".dist-info/" not in name}
    assert (sorted(expected - found), sorted(found - expected)) == ([], [])


@pytest.mark.parametrize("extra", ["tensorrt", "rtx"])
def test_an_extra_for_engines_on_a_gpu_brings_what_the_runtime_and_the_meters_import_there(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {re.split("[=<>~!]", wanted)[0] for wanted in project["optional-dependencies"][extra]}
    assert packages >= {"cuda-bindings", "nvidia-ml-py"}  # cuda.bindings and pynvml


@pytest.mark.parametrize("pattern", DATA)
def test_the_tree_has_the_data_that_is_asked_of_the_wheel(pattern: str) -> None:
    assert list(ROOT.glob(pattern))


def test_it_brings_the_licence_and_the_command(files: set[str]) -> None:
    assert {name.partition(".dist-info/")[2] for name in files} >= {"licenses/LICENSE", "entry_points.txt", "METADATA"}
