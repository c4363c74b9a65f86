"""The command `vlmc`: a group that loads each stage's `command.py` only when that command is called."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from typing import NoReturn

import click

from . import __version__
from .errors import VlmcError, reason
from .files import is_full

# command: (module, attribute, help line). The help lines stand here so that `vlmc --help` imports no stage.
COMMANDS = {
    "export": ("exporter.command", "export", "Checkpoint to canonical ONNX, checked against PyTorch."),
    "calibrate": ("calibration.command", "calibrate", "Observe image+prompt pairs and write a quantisation plan."),
    "build": ("engines.command", "build", "Build engines for a device and keep what wins."),
    "run": ("runtime.command", "run", "Answer a question about a picture with the built engines."),
    "profile": ("profiles.command", "profile", "Measure speed, memory, energy and accuracy of every variant."),
    "report": ("reports.command", "report", "Draw the report again from the raw samples."),
    "models": ("exporter.command", "models", "List the families and presets."),
    "devices": ("profiles.command", "devices", "List the devices and what is known of them."),
    "doctor": ("profiles.command", "doctor", "Say what can run here, and why the rest cannot."),
}


class Stages(click.Group):
    """A click group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in COMMANDS.items()])


@click.command(cls=Stages, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vlmc")
def vlmc() -> None:
    """Compile vision-language models for edge devices, and measure what that gains.

    Example: vlmc export demo -o out/demo && vlmc build out/demo --device cpu --int8 && vlmc profile out/demo
    """


def main() -> None:
    """Runs `vlmc`; a VlmcError is one sentence on stderr and exit code 1, and so are a package that is not installed,
    memory that is not there and what the operating system refuses; Ctrl-C is exit code 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal and locale has a – or a ≥
    try:
        vlmc.main(prog_name="vlmc", standalone_mode=False)
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()  # here, where a failure can still be told
    except (KeyboardInterrupt, click.exceptions.Abort):  # click makes the second of the first
        click.echo("Interrupted. What was finished is kept; run the same command again to go on.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except VlmcError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == __package__:
            raise
        fix = (
            "install vlmc with its extra `export`: `pip install 'vlm-compile[export]'`, of a wheel 'FILE.whl[export]'; "
        )
        fix += "for `vlmc build` on a device `build` is enough"
        _fail(VlmcError(f"This command needs the Python package {error.name}", found="it is not installed", fix=fix))
    except MemoryError as error:
        fix = "end other programs, or take a machine with more memory"
        _fail(VlmcError("This needs more memory than there is", found=reason(error), fix=fix))
    except OSError as error:
        with contextlib.suppress(OSError, AttributeError):  # what stdout refused, Python would try again as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # as `vlmc models | head -1` makes it
            sys.exit(1)
        _fail(_told(error))


def _fail(error: VlmcError) -> NoReturn:
    click.echo(f"Error: {error}", err=True)
    sys.exit(1)


def _told(error: OSError) -> VlmcError:
    """The sentence for a failure of the operating system that no stage foresaw."""
    if is_full(error):
        where = error.filename or "what vlmc writes"
        return VlmcError(f"No space is left for {where}", fix="free some space and run the same command again")
    what = f"{error.filename} cannot be read or written" if error.filename else "Something cannot be read or written"
    fix = "check that path" if error.filename else "check where input and output of the command go"
    return VlmcError(what, found=error.strerror or reason(error), fix=fix)
