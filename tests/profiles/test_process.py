"""The parent's end of a worker, where there is no worker at the other end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vlmc.profiles import limits
from vlmc.profiles.process import Died, Process, command


def test_an_interpreter_that_cannot_be_started_is_a_worker_that_died(tmp_path: Path) -> None:
    job = {"python": str(tmp_path / "python"), "arguments": {}}
    with pytest.raises(Died, match=r"/python does not start: No such file or directory"):
        Process(job, tmp_path / "job.json", tmp_path / "log")


@pytest.mark.parametrize(("threads", "told"), [(3, "3"), (0, "7")])
def test_a_worker_has_its_own_thread_count_and_its_own_session(
    threads: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session, for Ctrl-C in the terminal would end the workers before their parent."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    python = tmp_path / "python"
    told_by_it = "os.environ['OMP_NUM_THREADS'] + f' threads, {os.getsid(0) == os.getpid()}'"
    python.write_text(f"#!{sys.executable}\nimport os\nexit({told_by_it})\n")
    python.chmod(0o755)
    with pytest.raises(Died, match=f"its last words: {told} threads, True$"):
        Process({"python": str(python), "arguments": {"threads": threads}}, tmp_path / "job.json", tmp_path / "log")


def test_a_module_gets_its_arguments_and_takes_none_of_its_own_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("json", "numpy", "vlmc"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the working folder was run')")
    (tmp_path / "given.json").write_text('{"a":  1}')
    asked = command(sys.executable, "json.tool", "--compact", "given.json")
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == '{"a":1}\n'
    job = {"python": "", "arguments": {}}
    with pytest.raises(Died, match="KeyError: 'artifact'"):  # so far it came
        Process(job, tmp_path / "job.json", tmp_path / "log")
    started: list[list[str]] = []
    answer = subprocess.CompletedProcess([], 0, "{}")
    monkeypatch.setattr(subprocess, "run", lambda asked, **_: started.append(asked) or answer)
    limits.measure(1)
    assert started == [command(sys.executable, "vlmc.profiles.limits", "1")]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
def test_what_was_started_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)")
    starter = (
        "import subprocess, sys; from vlmc.profiles.process import command; "
        "subprocess.run(command(sys.executable, 'sleeper'))"
    )
    path = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", starter], env=path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "here\n"
        parent.kill()
        parent.communicate(timeout=10)  # which waits until nobody has the pipe any more
