"""Files are whole or absent, whatever stops the writer, and paths stay inside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc import files
from vlmc.errors import VlmcError
from vlmc.files import alone, inside, read_json, sha256_of, staged_folder, write_json, write_text, writing

DEAD = 2**22 + 1  # above Linux' largest process number
NAMES = st.text(st.characters(codec=None), max_size=12)  # lone surrogates and NUL included
PATHS = st.lists(st.sampled_from(["..", ".", "a", "b", "", "/", "out", "link"]) | NAMES, max_size=5).map("/".join)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def stage_with(target: Path, content: str, stopped_by: BaseException | None = None, key: str = "") -> None:
    with staged_folder(target, key) as stage:
        (stage / "content").write_text(content)
        if stopped_by:
            raise stopped_by


# Checksums and paths


def test_sha256_is_of_the_whole_file(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "f").write_bytes(content)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(relative=PATHS)
def test_a_path_is_inside_or_refused(relative: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "root"
    if not root.exists():
        (root / "a").mkdir(parents=True)
        (root / "link").symlink_to("/tmp")
        (root / "b").symlink_to("b")
    try:
        path = inside(root, relative)
    except VlmcError:
        return
    assert path == root.resolve() or root.resolve() in path.parents
    path.is_file()


@pytest.mark.parametrize(
    "relative", ["/etc/passwd", "../x", "a/../../x", "out/x", "round", "n\0l", "x" * 300, "\ud800"]
)
def test_what_leaves_the_folder_is_refused(relative: str, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(VlmcError, match="path"):
        inside(tmp_path, relative)


def test_what_stays_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path, "link/x") == inside(tmp_path, "real/../real/x") == tmp_path.resolve() / "real" / "x"


# JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(value=JSON)
def test_json_comes_back_as_it_was_written(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.binary(max_size=40) | st.text().map(lambda text: json.dumps(text)[:-1].encode()))
def test_what_is_no_json_is_a_sentence(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        json.loads(content.decode())
    except ValueError:
        with pytest.raises(VlmcError, match=r"any\.json is not valid JSON"):
            read_json(path)
    else:
        read_json(path)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "{} {}", ""])
def test_json_that_makes_the_parser_stumble_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(VlmcError, match="not valid JSON"):
        read_json(tmp_path / "x.json")


def test_missing_oversized_and_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VlmcError, match=r"gone\.json is missing"):
        read_json(tmp_path / "gone.json")
    os.mkfifo(tmp_path / "pipe.json")  # which would be waited for without end
    for path in (tmp_path, tmp_path / "pipe.json"):
        with pytest.raises(VlmcError, match=r"cannot be read. Found: it is no file"):
            read_json(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 3)
    (tmp_path / "big.json").write_text("1234")
    with pytest.raises(VlmcError, match="too large"):
        read_json(tmp_path / "big.json")


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", float("nan"))
    assert read_json(tmp_path / "x.json") == 1


# One file in one step


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "f", "old")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(VlmcError, match="Input/output error"):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_file_that_a_killed_run_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    (tmp_path / f".f.{DEAD}.partial").write_text("ha")
    (tmp_path / ".f.notes.partial").write_text("a person's own")
    (tmp_path / f".fg.{DEAD}.partial").write_text("another file's")
    write_text(tmp_path / "f", "whole")
    assert leftovers(tmp_path) == [".f.notes.partial", f".fg.{DEAD}.partial"]


def test_folders_are_made_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "f", "x")
    assert (tmp_path / "a" / "b" / "f").read_text() == "x"
    with pytest.raises(VlmcError, match="cannot be written"):
        write_text(tmp_path / "a" / "b" / "f" / "g", "x")


# A folder in one step


def test_the_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    stage_with(target, "old")
    with staged_folder(target) as stage:
        (stage / "new").write_text("new")
        assert (target / "content").read_text() == "old"
    assert [path.name for path in target.iterdir()] == ["new"]
    assert leftovers(target.parent) == []


def test_files_are_synced_before_the_rename_and_it_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, done = os.replace, list[str]()
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}").rpartition("/")[2]))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or replace(*paths))
    stage_with(tmp_path / "target", "whole")
    stage = f".target.{os.getpid()}.partial"
    assert done == ["content", stage, "renamed", tmp_path.name]


@pytest.mark.parametrize("error", [ValueError("x"), VlmcError("x"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("there", [True, False])
def test_an_exception_keeps_what_was_there(error: BaseException, there: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if there:
        stage_with(target, "old")
    with pytest.raises(type(error)):
        stage_with(target, "new", error)
    assert target.exists() == there
    assert not there or (target / "content").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_an_interruption_between_the_two_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    stage_with(target, "old")
    replace = os.replace

    def interrupted(source: Path, destination: Path) -> None:
        if destination == target and source.name.endswith(".partial"):
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage_with(target, "new")
    assert (target / "content").read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["target", "a[1]", "a*", "a.b"])
@pytest.mark.parametrize("pid", [DEAD, os.getpid()], ids=["dead", "ours"])  # ours was another's, as in containers
def test_what_killed_runs_left_is_cleared_away(name: str, pid: int, tmp_path: Path) -> None:
    target = tmp_path / name
    for kind in ("partial", "old"):
        (tmp_path / f".{name}.{pid}.{kind}").mkdir()
        (tmp_path / f".{name}.{pid}.{kind}" / "x").write_text("x")
    (tmp_path / f".{name}.notes.partial").mkdir()
    stage_with(target, "new")
    assert (target / "content").read_text() == "new"
    assert leftovers(tmp_path) == [f".{name}.notes.partial"]


def test_one_that_was_killed_between_the_renames_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "target"
    stage_with(target, "old")
    target.rename(tmp_path / f".target.{DEAD}.old")
    with pytest.raises(ValueError, match="again"):
        stage_with(target, "new", ValueError("again"))
    assert (target / "content").read_text() == "old"


def test_a_run_that_still_works_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".target.{os.getppid()}.partial"
    other.mkdir()
    stage_with(tmp_path / "target", "new")
    assert other.is_dir()


def test_the_current_folder_and_a_link_can_be_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    stage_with(Path(), "new")
    assert (tmp_path / "here" / "content").read_text() == "new"
    stage_with(tmp_path / "link", "newer")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "here" / "content").read_text() == "newer"


def test_sigkill_leaves_the_old_folder_and_nothing_that_the_next_run_keeps(tmp_path: Path) -> None:
    target = tmp_path / "target"
    stage_with(target, "old")
    program = f"""
        import time
        from pathlib import Path
        from vlmc.files import staged_folder
        with staged_folder(Path({str(target)!r})) as stage:
            (stage / "content").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert (target / "content").read_text() == "old"
    assert len(leftovers(tmp_path)) == 1
    stage_with(target, "new")
    assert (target / "content").read_text() == "new"
    assert leftovers(tmp_path) == []


# A folder that a killed run goes on filling


@pytest.mark.parametrize("name", ["target", "a[1]", "a.b"])
@pytest.mark.parametrize("pid", [DEAD, os.getpid()], ids=["dead", "ours"])
def test_a_killed_runs_folder_is_handed_out_again_for_the_same_key_alone(name: str, pid: int, tmp_path: Path) -> None:
    for key in ("k1", "k2"):
        (tmp_path / f".{name}.{pid}.partial-{key}").mkdir()
        (tmp_path / f".{name}.{pid}.partial-{key}" / "half").write_text(key)
    with staged_folder(tmp_path / name, "k1") as stage:
        assert (stage / "half").read_text() == "k1"
        assert leftovers(tmp_path) == [stage.name]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["half"]
    assert leftovers(tmp_path) == []


def test_of_several_one_is_handed_out_and_the_others_are_cleared_away(tmp_path: Path) -> None:
    for pid in (DEAD, DEAD + 1):
        (tmp_path / f".target.{pid}.partial-k").mkdir()
        (tmp_path / f".target.{pid}.partial-k" / "half").write_text("x")
    with staged_folder(tmp_path / "target", "k") as stage:
        assert (stage / "half").read_text() == "x"
        assert leftovers(tmp_path) == [stage.name]


def test_one_that_is_still_being_filled_is_not_handed_out(tmp_path: Path) -> None:
    other = tmp_path / f".target.{os.getppid()}.partial-k"
    other.mkdir()
    with staged_folder(tmp_path / "target", "k") as stage:
        assert stage != other
    assert other.is_dir()


def test_another_targets_folder_is_not_taken_for_one(tmp_path: Path) -> None:
    others = [f".target.{DEAD}.{os.getppid()}.partial-k", f".target.{DEAD}.partial-my notes"]
    for name in others:
        (tmp_path / name).mkdir()
    with staged_folder(tmp_path / "target", "k") as stage:
        assert list(stage.iterdir()) == []
    assert leftovers(tmp_path) == sorted(others)


@pytest.mark.parametrize("error", [ValueError("x"), VlmcError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_keeps_the_folder_and_a_failure_does_not(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        stage_with(tmp_path / "target", "half", error, "k")
    assert len(leftovers(tmp_path)) == (not isinstance(error, Exception))
    with staged_folder(tmp_path / "target", "k") as stage:
        assert (stage / "content").exists() != isinstance(error, Exception)


# A full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        OSError(27, "File too large"),
        OSError("1024 requested and 12 written"),  # numpy's tofile
        OSError("problem writing element 7168 to file"),
    ],
)
def test_no_space_is_one_sentence(error: OSError, tmp_path: Path) -> None:
    sentence = r"No space is left on the disk for .*target.*free some space"
    with pytest.raises(VlmcError, match=sentence), writing(tmp_path / "target"):
        raise error


def test_another_failure_names_the_file_that_failed(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match=r"No such file or directory: .*absent"), writing(tmp_path / "target"):
        (tmp_path / "absent").read_text()


def test_a_write_that_the_system_cuts_short_keeps_the_old_files(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: it needs no rights, and numpy fails the same way."""
    program = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from vlmc.errors import VlmcError
        from vlmc.files import staged_folder, write_text
        folder = Path(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        def array():
            with staged_folder(folder / "target") as stage, open(stage / "content", "wb") as file:
                np.zeros(100_000).tofile(file)
        def text():
            write_text(folder / "file", "x" * 100_000)
        for write in (array, text):
            try:
                write()
            except VlmcError as error:
                print(error)
    """
    stage_with(tmp_path / "target", "old")
    write_text(tmp_path / "file", "old")
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.startswith("No space is left on the disk for") for line in said] == [True, True]
    assert (tmp_path / "target" / "content").read_text() == (tmp_path / "file").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    code = f"import pathlib, vlmc.files as f\nwith f.alone(pathlib.Path({str(tmp_path)!r})): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(VlmcError, match="Another vlmc"), alone(tmp_path):
            pass
        other.kill()
    with alone(tmp_path):
        assert list(tmp_path.iterdir()) == []
