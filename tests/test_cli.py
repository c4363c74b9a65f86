"""What holds for every command: what it loads, how it explains itself, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from vlmc.cli import COMMANDS, main, vlmc

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


LITTLE = "from vlmc import cli; cli.vlmc.main = lambda **_: print('written as Python ends'); cli.main()"
BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}
PRINTING = [["-m", "vlmc", "devices"], ["-m", "vlmc", "devices", "--json"], ["-m", "vlmc", "--help"], ["-c", LITTLE]]


@pytest.mark.parametrize("arguments", PRINTING)
def test_output_that_no_disk_takes_is_a_sentence(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, check=False)
    said = "Error: No space is left for what vlmc writes. To mend it: free some space and run the same command again.\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("arguments", PRINTING)
def test_output_that_nobody_reads_any_more_is_nothing_to_tell(arguments: list[str]) -> None:
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=BUFFERED) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_name_that_no_file_can_have_is_a_sentence(tmp_path: Path) -> None:
    done = vlmc_process("run", "x" * 300, "-p", "?")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: x") and done.stderr.count("\n") == 1
    assert "cannot be read or written. Found: File name too long. To mend it: check that path." in done.stderr


def test_what_the_output_cannot_show_is_replaced() -> None:
    code = "from vlmc import cli, console; cli.vlmc.main = lambda **_: console.output().print('2–3 ≥ 1'); cli.main()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2?3 ? 1\n", "")


def without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where the module is not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['vlmc', *{arguments!r}]\n"
        "from vlmc import cli; cli.main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("module", "arguments"), [("torch", ("models",)), ("onnx_ir", ("build", "nothing"))])
def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    module: str, arguments: tuple[str, ...]
) -> None:
    done = without(module, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"Error: This command needs the Python package {module}. Found: it is not installed.")
    assert "`pip install 'vlm-compile[export]'`" in done.stderr


def test_a_module_of_vlmc_that_is_missing_is_not_hidden() -> None:
    done = without("vlmc.profiles.command", "devices")
    assert "ModuleNotFoundError" in done.stderr and "Traceback" in done.stderr


def test_the_shell_completes_commands_options_devices_and_recipes() -> None:
    script = vlmc_process(_VLMC_COMPLETE="bash_source")
    assert script.returncode == 0 and "complete -o nosort -F" in script.stdout

    def completed(*words: str) -> list[str]:
        line = " ".join(("vlmc", *words))
        done = vlmc_process(_VLMC_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words)))
        return [entry.partition(",")[2] for entry in done.stdout.splitlines()]

    assert completed("pro") == ["profile"]
    assert completed("build", "--dev") == ["--device"]
    assert completed("build", "out", "--device", "rpi") == ["rpi4", "rpi5"]
    assert completed("build", "out", "--recipe", "w") == ["w4", "w8"]
    assert completed("profile", "out", "--device", "th") == ["thor"]
    assert completed("calibrate", "out", "--recipe", "fp") == ["fp32"]


def test_memory_that_is_not_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vlmc, "main", lambda **_: bytearray(1 << 62))
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.startswith("Error: This needs more memory than there is. Found: ")
