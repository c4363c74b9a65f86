"""`vlmc run`, as it is typed, in a process that knows neither torch nor transformers nor onnx."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.runtime.backends import openvino
from vlmc.runtime.command import run as command
from vlmc.runtime.session import Session

NOT_AT_RUNTIME = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", "psutil")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def question(built: Artifact) -> list[str]:
    case = golden.read(built)[0][0]
    return [str(built.root / case["image"]), "-p", case["prompt"], "--max-tokens", str(len(case["tokens"]))]


def test_the_answer_streams_without_torch_transformers_or_onnx(built: Artifact, question: list[str]) -> None:
    program = """
        import atexit, sys
        from vlmc.cli import main
        atexit.register(lambda: print(*sys.modules, file=sys.stderr))
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), "run", str(built.root), *question, "--recipe", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = done.stderr.split()
    assert "vlmc.runtime.session" in modules
    assert not set(NOT_AT_RUNTIME) & set(modules)
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()


def test_the_answer_is_pytorchs_with_float_engines(built_copy: Path, question: list[str], in_float: None) -> None:
    case = golden.read(Artifact(built_copy))[0][0]
    result = run(built_copy, *question)
    assert result.exit_code == 0, result.output
    assert result.stdout == case["text"] + "\n"


@pytest.fixture
def in_float(built_copy: Path) -> None:
    path = built_copy / "engines" / "cpu" / "int8.json"
    record = json.loads(path.read_text())
    for choice in record["choices"].values():
        choice["engine"] = "onnxruntime-fp32"
    path.write_text(json.dumps(record))


def test_json_has_the_answer_and_the_time_of_each_part(built_copy: Path, question: list[str], in_float: None) -> None:
    said = json.loads(run(built_copy, *question, "--json").stdout)
    assert said["answer"] == golden.read(Artifact(built_copy))[0][0]["text"]
    assert said["engines"]["decoder"] == "onnxruntime-fp32"
    assert said["tokens"] == 8
    assert len(said["decode_ms"]) == 7
    assert min(said["preprocess_ms"], said["vision_ms"], said["prefill_ms"], *said["decode_ms"]) > 0


def test_a_question_needs_no_picture_and_takes_two(built: Artifact) -> None:
    pictures = [built.root / "golden" / f"0{index}.png" for index in range(2)]
    for shown in ([], pictures):
        result = run(built.root, *shown, "-p", "Which?", "--max-tokens", 2, "--threads", 1)
        assert result.exit_code == 0, result.output


def test_an_answer_that_is_empty_or_may_be_cut_off_says_so_apart_from_it(
    built_copy: Path, question: list[str], in_float: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(built_copy, *question[:-1], 1)
    assert result.stderr == "The answer may be cut off: --max-tokens allows 1.\n"
    assert run(built_copy, *question[:-1], 1, "--json").stderr == ""
    monkeypatch.setattr(Session, "answer", lambda *given: iter(()))
    assert (result := run(built_copy, *question)).stdout == "\n"
    assert result.stderr == "The model's answer is empty.\n"


def test_wrong_input_is_a_sentence(built_copy: Path, question: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for arguments, says in (
        ([built_copy, tmp_path / "gone.png", "-p", "?"], "There is no picture"),
        ([built_copy, text, "-p", "?"], "is not a picture"),
        ([tmp_path, *question], "is no artefact"),
        ([built_copy, *question, "--device", "nope"], "no build for device nope. Found: cpu/int8. To mend it: choose"),
        ([built_copy, *question, "--recipe", "w4"], "no build for recipe w4"),
        ([built_copy, "-p", "boats " * 200], "longer than the KV cache"),
        ([built_copy, "-p", "<image>"], "contains the token that stands for a picture"),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, VlmcError)
        assert says in str(result.exception)
        assert result.stdout == ""


def test_a_build_that_lacks_an_engine_is_a_sentence(built_copy: Path, question: list[str]) -> None:
    path = built_copy / "engines" / "cpu" / "int8.json"
    record = json.loads(path.read_text())
    del record["choices"]["decoder"]
    path.write_text(json.dumps(record))
    result = run(built_copy, *question)
    assert "names no engine for the decoder. To mend it: run `vlmc build" in str(result.exception)


def test_the_newest_build_that_can_run_here_answers(
    built_copy: Path, question: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Pi: one for the Pi was made on another machine, which itself kept OpenVINO; an Orin's waits for the Orin."""

    def add(device: str, backend: str, hour: int) -> None:
        record = json.loads((built_copy / "engines" / "cpu" / "int8.json").read_text())
        record |= {"device": device, "created": f"2999-01-01T0{hour}:00:00+00:00", "remaining": "Measure it there."}
        record["choices"]["vision_encoder"]["engine"] = f"{backend}-int8"
        (built_copy / "engines" / device).mkdir()
        (built_copy / "engines" / device / "int8.json").write_text(json.dumps(record))

    def said() -> str:
        return str(run(built_copy, *question).exception)

    add("rpi5", "onnxruntime", 1)
    add("laptop", "openvino", 2)
    add("orin", "handover", 3)
    monkeypatch.setattr(openvino, "unavailable", lambda: "openvino is not installed")
    assert "There is no engine onnxruntime-fp32 of embed_tokens for device 'rpi5'" in said()
    monkeypatch.setattr(openvino, "unavailable", lambda: "")
    assert "for device 'laptop'" in said()


def test_a_build_without_a_build_says_how_to_make_one(tiny: Artifact, question: list[str]) -> None:
    result = run(tiny.root, *question)
    assert "holds no build. Found: none. To mend it: run `vlmc build" in str(result.exception)


def test_wrong_usage_is_clicks(built: Artifact, question: list[str]) -> None:
    assert run(built.root).exit_code == 2
    assert run(built.root, *question, "--max-tokens", 0).exit_code == 2
    for threads in (-1, 100_000, 10**20):
        assert run(built.root, *question, "--threads", threads).exit_code == 2
