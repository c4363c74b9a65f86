"""A step in a process of its own says in one sentence why it failed, and never outlives the build."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from vlmc.artifact import Artifact, EngineSpec
from vlmc.engines import child
from vlmc.engines.build import build
from vlmc.errors import VlmcError
from vlmc.profiles.device import load_device
from vlmc.records import read_record

EMBED = ("cpu", "embed_tokens", "onnxruntime", "fp32")


def freeze_a_step(root: Path) -> int:
    """Stops a process while it writes an engine, and returns its number."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in root.glob("engines/cpu/*/.*.partial"):
            pid = int(path.name.split(".")[-2])
            os.kill(pid, signal.SIGSTOP)
            if path.exists():
                return pid
            os.kill(pid, signal.SIGCONT)  # it was done already
        time.sleep(0.001)
    raise AssertionError("no step began")


def written(root: Path) -> list[str]:
    return [path.name for path in (root / "engines").rglob("*") if path.is_file() or path.name.endswith(".partial")]


def gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        try:  # a zombie that a container's init does not collect has ended as well
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_step_builds_and_another_tries_what_was_built(tiny_copy: Path) -> None:
    assert child.run("candidate", "Building", str(tiny_copy), *EMBED) == ""
    child.run("candidate", "Building", str(tiny_copy), "cpu", "vision_encoder", "onnxruntime", "fp32")
    spec, _ = Artifact(tiny_copy).engine("cpu", "vision_encoder", "onnxruntime-fp32")
    assert 0 < spec.report.peak_memory_bytes < 500e6  # the step's own, not pytest's with torch in it
    engines = ("cpu", "vision_encoder", "onnxruntime-fp32", "onnxruntime-fp32")
    outcome = json.loads(child.run("trial", "Trying", str(tiny_copy), *engines))
    assert outcome["onnxruntime-fp32"]["agreement"] > 0.99999
    assert outcome["onnxruntime-fp32"]["latency_ms"]["run"] > 0


def run_step(parent: int) -> tuple[str, str]:
    """What a step answers that writes to stdout, and what goes to stderr; `parent` is who is said to have begun it."""
    program = f"import os, sys; from vlmc.engines import child; sys.argv[1:] = ['{parent}']; "
    program += "child.main(lambda: str(os.write(1, b'noise')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_what_a_library_prints_is_no_part_of_the_answer() -> None:
    """TensorRT's native code for one."""
    assert run_step(os.getpid()) == ("5", "noise")


def test_a_step_whose_build_is_gone_already_does_nothing() -> None:
    """The build may end before the step has asked the kernel to be ended with it."""
    nobody = 2**22 + 1  # above the kernel's largest process number
    assert run_step(nobody) == ("", "")


def test_its_own_sentence_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(VlmcError) as error:
        child.run("candidate", "Building", str(tmp_path), *EMBED)
    assert str(error.value) == str(VlmcError(error.value.what))
    assert str(error.value).startswith(f"{tmp_path} is no artefact. Found: no manifest.json in it. To mend it: run")


def test_another_failure_is_told_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match=r"Building it failed. Found: TypeError: .*missing"):
        child.run("candidate", "Building it", str(tmp_path))


def test_a_step_that_is_killed_leaves_nothing(tiny_copy: Path) -> None:
    killer = threading.Thread(target=lambda: os.kill(freeze_a_step(tiny_copy), signal.SIGKILL))
    killer.start()
    with pytest.raises(VlmcError, match=r"Building vision_encoder .* failed. Found: .*SIGKILL; it may .*swap"):
        build(Artifact(tiny_copy), load_device("cpu"), "fp32", lambda *_: None)
    killer.join()
    assert [name for name in written(tiny_copy) if name.endswith("partial")] == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_build_that_is_stopped_takes_its_step_along(sign: signal.Signals, tiny_copy: Path) -> None:
    command = [sys.executable, "-m", "vlmc", "build", str(tiny_copy), "--recipe", "fp32"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    ) as parent:
        step = freeze_a_step(tiny_copy)
        os.killpg(parent.pid, sign) if sign == signal.SIGINT else parent.send_signal(sign)  # Ctrl-C is for the group
        try:
            said = parent.communicate(timeout=30)
            assert gone(step), "the step outlived the build"
        finally:
            parent.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(step, signal.SIGKILL)
    if sign == signal.SIGINT:
        assert (parent.returncode, said[0]) == (130, "")
        assert said[1].strip() == "Interrupted. What was finished is kept; run the same command again to go on."
        assert [name for name in written(tiny_copy) if name.endswith("partial")] == []
    else:
        assert (parent.returncode, said) == (-sign, ("", ""))


def test_the_same_command_goes_on_with_what_was_finished(built_copy: Path) -> None:
    """As after a kill in the middle: some engines are there, one is half-written, one was never begun."""
    engines = built_copy / "engines" / "cpu"
    (engines / "int8.json").unlink()
    half = engines / "vision_encoder" / f".openvino-fp32.{2**22 + 1}.partial"
    (engines / "vision_encoder" / "openvino-fp32").rename(half)
    (half / "engine.json").unlink()
    shutil.rmtree(engines / "decoder")
    command = [sys.executable, "-m", "vlmc", "build", str(built_copy), "--recipe", "fp32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["cached"] == ["vision_encoder onnxruntime-fp32", "embed_tokens onnxruntime-fp32"]
    assert not half.exists()
    for row in said["engines"]:
        assert read_record(EngineSpec, built_copy / row["folder"] / "engine.json")
    assert done.stderr == ""


def test_a_step_runs_nothing_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("open('run', 'w')")
    with pytest.raises(VlmcError, match=r"no artefact|manifest"):
        child.run("candidate", "Building", str(tmp_path), *EMBED)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("end", ["print('done', end='')", "sys.exit('it broke')"])
def test_what_a_step_says_is_heard_while_it_works(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no part of what is said of its end, and a library's bytes that are no text do not matter."""
    program = f"""
import os, pathlib, sys, time
from vlmc.engines import child
child.say("half")
end = time.monotonic() + 20
while not pathlib.Path({str(tmp_path / "half")!r}).exists() and time.monotonic() < end:
    time.sleep(0.01)
if time.monotonic() >= end:
    sys.exit("nobody heard")
os.write(2, b"\\xff\\n")
child.say("more")
{end}"""
    monkeypatch.setattr(child, "command", lambda *_: [sys.executable, "-c", program])

    def run() -> str:
        return child.run("candidate", "Building", listen=lambda text: (tmp_path / text).touch())

    if "done" in end:
        assert run() == "done"
    else:
        with pytest.raises(VlmcError, match="it broke"):
            run()
    assert (tmp_path / "more").exists()
