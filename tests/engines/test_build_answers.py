"""Where the best engines come from two backends whole answers are tried, and the mix has to win in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from vlmc.artifact import Artifact, BuildSpec, MatchSpec
from vlmc.engines import trial
from vlmc.engines.build import TURNS, build, results
from vlmc.profiles.device import load_device
from vlmc.records import read_record, write_record


def run(artifact: Artifact) -> BuildSpec:
    return build(artifact, load_device("cpu"), "int8", lambda *_: None)[0]


MIX = {"vision_encoder": "openvino-int8", "embed_tokens": "onnxruntime-fp32", "decoder": "onnxruntime-int8"}
SINGLE = MIX | {"vision_encoder": "onnxruntime-int8"}


def kept(record: BuildSpec) -> dict[str, str]:
    return {component: choice.engine for component, choice in record.choices.items()}


EACH = [trial.WHOLE] * 2 * TURNS  # a process for each of two mixes, in turns


def test_one_backend_is_kept_where_its_whole_answers_are_faster(
    artifact: Artifact, recorded: Callable[..., None], in_process: list[tuple[str, ...]]
) -> None:
    recorded(mix=66.0, single=62.0)
    record = run(artifact)
    assert kept(record) == SINGLE
    assert record.choices["vision_encoder"].reason.startswith(
        "ONNX Runtime for all parts answers in 62.0 ms, the mix in 66.0; by itself "
    )
    assert "for all parts" not in record.choices["decoder"].reason
    assert [(answer.engines, answer.milliseconds) for answer in record.answers] == [(MIX, 66.0), (SINGLE, 62.0)]
    assert [step[2] for step in in_process if step[0] == "trial"] == ["vision_encoder", "decoder", *EACH]
    mixes = [step[4:] for step in in_process if step[2] == trial.WHOLE]
    assert mixes == [("+".join(MIX.values()),), ("+".join(SINGLE.values()),)] * TURNS
    assert read_record(BuildSpec, artifact.root / "engines" / "cpu" / "int8.json") == record
    assert [row["engine"] for row in results(artifact, record) if row["kept"]] == list(SINGLE.values())


def test_the_mix_is_kept_where_its_whole_answers_are_faster(artifact: Artifact, recorded: Callable[..., None]) -> None:
    recorded(mix=50.0, single=62.0)
    record = run(artifact)
    assert kept(record) == MIX
    assert record.choices["vision_encoder"].reason.startswith("fastest here: 12.00 ms")
    assert len(record.answers) == 2


def test_whole_answers_are_tried_once_for_the_same_engines(
    artifact: Artifact, recorded: Callable[..., None], in_process: list[tuple[str, ...]]
) -> None:
    recorded(mix=66.0, single=62.0)
    first = run(artifact)
    in_process.clear()
    recorded(mix=1.0, single=2.0)
    again = run(artifact)
    assert in_process == []
    assert (again.choices, again.answers) == (first.choices, first.answers)

    path = artifact.root / "engines" / "cpu" / "int8.json"
    other = replace(first.answers[1], key="of another engine of that name")
    write_record(path, replace(first, answers=(first.answers[0], other)))
    assert kept(run(artifact)) == MIX  # both are tried anew
    assert [step[2] for step in in_process] == EACH


def test_answers_count_by_their_median_and_their_worst_turn(
    artifact: Artifact, recorded: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(mix=66.0, single=62.0)
    trials, turns = trial.try_component, iter([(50.0, 0.99), (70.0, 0.97), (54.0, 0.98)])

    def in_turns(a: Artifact, device: str, component: str, engines: list[str], embed: str) -> dict[str, Any]:
        if engines != ["+".join(MIX.values())]:
            return trials(a, device, component, engines, embed)
        ms, near = next(turns)
        return {engines[0]: {"latency_ms": {"run": ms}, "agreement": near}}

    monkeypatch.setattr(trial, "try_component", in_turns)
    mix = run(artifact).answers[0]
    assert (mix.milliseconds, mix.agreement, mix.turns) == (54.0, 0.97, (50.0, 70.0, 54.0))


def test_an_answer_without_a_time_is_tried_again(
    artifact: Artifact, recorded: Callable[..., None], in_process: list[tuple[str, ...]]
) -> None:
    recorded(mix=66.0, single=62.0)
    first = run(artifact)
    path = artifact.root / "engines" / "cpu" / "int8.json"
    write_record(path, replace(first, answers=tuple(replace(one, milliseconds=0.0) for one in first.answers)))
    in_process.clear()
    assert run(artifact).answers == first.answers
    assert [step[2] for step in in_process] == EACH


def test_a_record_from_before_whole_answers_is_read_and_they_are_tried(
    artifact: Artifact, recorded: Callable[..., None], in_process: list[tuple[str, ...]]
) -> None:
    recorded(mix=66.0, single=62.0)
    run(artifact)
    path = artifact.root / "engines" / "cpu" / "int8.json"
    old = json.loads(path.read_text())
    del old["answers"]
    path.write_text(json.dumps(old))
    assert artifact.build("cpu", "int8").answers == ()
    in_process.clear()
    assert len(run(artifact).answers) == 2
    assert [step[2] for step in in_process] == EACH


def test_a_backend_that_computes_something_else_is_no_alternative(
    artifact: Artifact, recorded: Callable[..., None], in_process: list[tuple[str, ...]]
) -> None:
    recorded(mix=66.0, single=62.0, agreement=0.9)  # int8 is wrong
    record = run(artifact)
    floats = {"vision_encoder": "openvino-fp32", "embed_tokens": "onnxruntime-fp32", "decoder": "onnxruntime-fp32"}
    assert [answer.engines for answer in record.answers] == [floats, floats | {"vision_encoder": "onnxruntime-fp32"}]


def test_a_model_that_matches_answers_nothing(
    artifact: Artifact, recorded: Callable[..., None], in_process: list[tuple[str, ...]]
) -> None:
    recorded(mix=66.0, single=62.0)
    artifact.manifest = replace(artifact.manifest, matching=MatchSpec(1.0, 8, (), (), 0))
    record = run(artifact)
    assert (kept(record), record.answers) == (MIX, ())
    assert trial.WHOLE not in [step[2] for step in in_process]
