"""What holds for every command: what it loads, how it explains itself, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from vlmc.cli import COMMANDS, vlmc

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "matplotlib")


def vlmc_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`vlmc` as a person starts it."""
    command = [sys.executable, "-m", "vlmc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.mark.parametrize("arguments", ["--help", "--version", "run --help", "devices"])
def test_a_light_command_imports_nothing_heavy(arguments: str) -> None:
    code = (
        "import sys; from vlmc.cli import main\n"
        f"sys.argv = ['vlmc', *{arguments.split()!r}]\n"
        "try: main()\n"
        f"finally: print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    shown = CliRunner().invoke(vlmc, [name, "--help"])
    assert shown.exit_code == 0, shown.output
    assert "Example: vlmc " + name in shown.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_where_asked(name: str) -> None:
    command = vlmc.get_command(click.Context(vlmc), name)
    assert command is not None
    assert any("--json" in parameter.opts for parameter in command.params)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name: str) -> None:
    command = vlmc.get_command(click.Context(vlmc), name)
    assert command is not None
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


def test_help_lists_every_command() -> None:
    shown = CliRunner().invoke(vlmc, ["--help"])
    assert all(f"\n  {name} " in shown.output for name in COMMANDS)


def test_a_failure_is_one_sentence_on_stderr_and_exit_code_1(tmp_path: Path) -> None:
    done = vlmc_process("build", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ") and "is no artefact" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("no-such-command",), ("build",), ("models", "--no-such-option")])
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = vlmc_process(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


def test_the_shell_completes_commands_and_options() -> None:
    script = vlmc_process(_VLMC_COMPLETE="bash_source")
    assert script.returncode == 0 and "complete -o nosort -F" in script.stdout

    def completed(*words: str) -> list[str]:
        line = " ".join(("vlmc", *words))
        done = vlmc_process(_VLMC_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words)))
        return [entry.partition(",")[2] for entry in done.stdout.splitlines()]

    assert completed("pro") == ["profile"]
    assert completed("build", "--dev") == ["--device"]
