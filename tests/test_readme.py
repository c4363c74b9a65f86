"""The documents name only what exists: links, commands with their options, make targets, families and devices."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
from vlmc.calibration import recipes
from vlmc.cli import COMMANDS, vlmc
from vlmc.exporter import checkpoint, family
from vlmc.profiles.device import device_names, load_device

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def shell_lines(document: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(document))
    broken = [link for link in links if "://" not in link and not (document.parent / link.partition("#")[0]).exists()]
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_commands_parse(document: Path) -> None:
    for line in shell_lines(document):
        words = shlex.split(line, comments=True)
        if not words or Path(words[0]).name != "vlmc":
            continue
        command = vlmc.get_command(click.Context(vlmc), words[1])
        assert command is not None, line
        command.make_context(words[1], words[2:])  # click raises where an argument or option is not one of its own


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_make_targets_exist(document: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    for target in re.findall(r"(?:^|`)make ([a-z]+)", text_of(document), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_every_command_and_recipe_is_shown() -> None:
    text = text_of(README)
    assert [name for name in COMMANDS if f"vlmc {name}" not in text] == []
    assert "Recipes: " + ", ".join(sorted(recipes.names())) + "." in text


def families() -> dict[str, list[str]]:
    """The model types of each family, by its file."""
    found: dict[str, list[str]] = {}
    for model_type, known in family.all_families().items():
        found.setdefault(type(known).__module__.rpartition(".")[2], []).append(model_type)
    return found


def test_the_table_of_models_is_what_vlmc_models_lists() -> None:
    rows, presets = [], checkpoint.preset_names()
    for file, types in families().items():
        own = ", ".join(preset for preset in presets if preset.startswith(f"{file}-"))
        rows.append([f"`{file}`", ", ".join(types), own])
    section = text_of(README).partition("\n## Models\n")[2].partition("\n## ")[0]
    table = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    assert [row.split(" | ")[:3] for row in table] == rows


@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "exporter" / "families").glob("[!_]*.py")))
def test_the_row_of_every_family_is_held_by_its_own_test(file: str) -> None:
    """By one that calls `assert_supported(…, "FAMILY")`, which does what the row says. A file without model types is of
    the family with whose name its own begins."""
    row = max((name for name in families() if f"{file}_".startswith(f"{name}_")), key=len)
    tests = ast.parse(text_of(ROOT / "tests" / "exporter" / "families" / f"test_{file}.py")).body
    held = [
        ast.literal_eval(call.args[1])
        for test in tests
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_")
        for call in ast.walk(test)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "assert_supported"
    ]
    assert row in held


def test_below_the_table_is_what_export_says_is_left_out() -> None:
    family.all_families()  # imports them
    kinds: list[type[family.Family]] = [family.Family]
    for kind in kinds:  # grows
        kinds += kind.__subclasses__()
    left_out = {kind.left_out for kind in kinds} - {""}
    assert set(re.findall(r"^- (.+), left out: ", text_of(README), re.MULTILINE)) == left_out


def test_the_table_of_devices_is_that_of_the_device_files() -> None:
    rows = []
    for device in map(load_device, device_names()):
        gives = "engines" if device.ahead_of_time else "lowered graphs here, engines there"
        rows.append(f"| `{device.name}` | {device.title} | {', '.join(device.backends)} | {gives} |")
    table = text_of(README).partition("<!-- devices:")[2].partition("\n\n")[0].splitlines()
    assert table[3:] == rows


def test_the_tour_names_every_room() -> None:
    rooms = [init.parent.name for init in ROOT.glob("[!.]*/__init__.py")] + [p.name for p in ROOT.glob("[!_]*.py")]
    tour = text_of(ROOT / "docs" / "architecture.md")
    assert [room for room in rooms if f"`{room}" not in tour] == []
