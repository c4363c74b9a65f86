"""A trial times what it says, on the golden inputs, and holds outputs against the golden ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vlmc.artifact import Artifact, ComponentSpec, TensorSpec
from vlmc.engines import trial
from vlmc.engines.trial import try_component
from vlmc.files import read_json, sha256_of
from vlmc.records import FileSpec
from vlmc.runtime import backends
from vlmc.runtime.images import open_image
from vlmc.runtime.runner import HostDecoder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "ROUNDS", 2)
    monkeypatch.setattr(trial, "SECONDS", 0.0)


def golden_with(artifact: Artifact, folder: Path, **changes: Any) -> Artifact:
    """The artefact with other golden arrays."""
    made = Artifact(Path(shutil.copytree(artifact.root, folder / "changed")))
    with np.load(made.root / "golden" / "golden.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for name, array in changes.items():
        arrays[name.replace("_of_case_", ".")] = array
    path = made.root / "golden" / "golden.npz"
    np.savez(path, **arrays)
    made.manifest.files["golden/golden.npz"] = FileSpec(sha256_of(path), path.stat().st_size)
    return made


def test_every_engine_gets_medians_and_the_worst_agreement(built: Artifact) -> None:
    engines = ["onnxruntime-fp32", "onnxruntime-int8"]
    for component, parts in (("vision_encoder", {"run"}), ("decoder", {"prefill", "decode"})):
        found = try_component(built, "cpu", component, engines, "onnxruntime-fp32")
        assert list(found) == engines
        for one in found.values():
            assert one["latency_ms"].keys() == parts
            assert all(ms > 0 for ms in one["latency_ms"].values())
        assert found["onnxruntime-fp32"]["agreement"] > 0.99999 > found["onnxruntime-int8"]["agreement"] > 0.9
        json.dumps(found)


def test_rounds_are_joined_by_their_median(built: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([[1.0], [9.0], [2.0]])
    monkeypatch.setattr(trial, "ROUNDS", 3)
    monkeypatch.setattr(trial, "_runner_trial", lambda *_: (1.0, {"run": next(rounds)}))
    found = try_component(built, "cpu", "vision_encoder", ["onnxruntime-fp32"], "")
    assert found["onnxruntime-fp32"]["latency_ms"] == {"run": 2.0}


def test_one_wrong_picture_of_several_shows_in_the_agreement(built: Artifact, tmp_path: Path) -> None:
    with np.load(built.path_of("golden/golden.npz")) as file:
        features = file["1.image_features"]
    wrong = golden_with(built, tmp_path, **{"1.image_features": -features})
    found = try_component(wrong, "cpu", "vision_encoder", ["onnxruntime-fp32"], "")
    assert found["onnxruntime-fp32"]["agreement"] == pytest.approx(-1, abs=1e-4)


def test_one_wrong_step_of_one_case_shows_in_the_agreement(built: Artifact, tmp_path: Path) -> None:
    with np.load(built.path_of("golden/golden.npz")) as file:
        logits = file["1.step_logits"].copy()
    logits[2] = -logits[2]
    wrong = golden_with(built, tmp_path, **{"1.step_logits": logits})
    found = try_component(wrong, "cpu", "decoder", ["onnxruntime-fp32"], "onnxruntime-fp32")
    assert found["onnxruntime-fp32"]["agreement"] == pytest.approx(-1, abs=1e-4)


def test_an_answer_that_ended_at_once_and_a_prompt_that_fills_the_cache_are_tried_too(
    built: Artifact, tmp_path: Path
) -> None:
    full = np.random.default_rng(0).normal(size=(1, 128, 64)).astype(np.float32)
    made = golden_with(
        built,
        tmp_path,
        **{
            "0.inputs_embeds": full,
            "0.step_tokens": np.empty(0, np.int64),
            "0.step_logits": np.empty((0, 336), np.float32),
        },
    )
    found = try_component(made, "cpu", "decoder", ["onnxruntime-fp32"], "onnxruntime-fp32")
    assert found["onnxruntime-fp32"]["latency_ms"]["decode"] > 0


def test_a_whole_answer_is_tried_like_a_component_whose_engines_are_mixes(built: Artifact) -> None:
    mixes = [f"{vision}+onnxruntime-fp32+onnxruntime-int8" for vision in ("openvino-int8", "onnxruntime-fp32")]
    found = try_component(built, "cpu", trial.WHOLE, mixes, "")
    assert list(found) == mixes
    for one in found.values():
        assert one["latency_ms"]["run"] > 0
        assert one["agreement"] > 0.9
    exact = "onnxruntime-fp32+onnxruntime-fp32+onnxruntime-fp32"
    assert try_component(built, "cpu", trial.WHOLE, [exact], "")[exact]["agreement"] > 0.99999


@pytest.mark.parametrize(("room", "tokens"), [(50, trial.ANSWER), (3, 4), (0, 1)])
def test_an_answer_has_as_many_tokens_as_the_cache_has_room_for(
    room: int, tokens: int, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, given = trial.open_session, []

    def small(*arguments: Any) -> Any:
        session = load(*arguments)
        case = read_json(built.path_of("golden/golden.json"))["cases"][0]
        prompt = session.prepare([open_image(built.path_of(case["image"]))], case["prompt"])
        session.decoder.capacity = len(prompt.input_ids) + room
        generate = session.generate

        def counted(*a: Any, **k: Any) -> Iterator[int]:
            made = list(generate(*a, **k))
            given.append(len(made))
            return iter(made)

        session.generate = counted
        return session

    monkeypatch.setattr(trial, "open_session", small)
    try_component(built, "cpu", trial.WHOLE, ["onnxruntime-fp32+onnxruntime-fp32+onnxruntime-fp32"], "")
    assert set(given[1:3]) == {tokens}  # after the first token alone, whose logits are looked at


def test_the_end_of_text_ends_no_answer_that_is_timed(built: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    load, sessions = trial.open_session, list[Any]()
    monkeypatch.setattr(trial, "open_session", lambda *a: sessions.append(load(*a)) or sessions[-1])
    artifact = Artifact(built.root)
    every_token = tuple(range(artifact.manifest.vocab_size))
    prompt = replace(artifact.manifest.prompt, eos_token_ids=every_token)
    artifact.manifest = replace(artifact.manifest, prompt=prompt)
    try_component(artifact, "cpu", trial.WHOLE, ["onnxruntime-fp32+onnxruntime-fp32+onnxruntime-fp32"], "")
    assert [session.timings.tokens for session in sessions] == [trial.ANSWER]


def test_decoding_is_timed_by_the_step(built: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only prefill and steps move, by 100 and 2 seconds; the first answer's steps, by 50, warm up."""
    now = [0.0]
    monkeypatch.setattr(trial, "MINIMUM", 1)
    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])
    load = backends.load_decoder

    class Slow:
        def __init__(self, decoder: HostDecoder) -> None:
            self.decoder, self.capacity, self.seconds = decoder, decoder.capacity, 50

        def prefill(self, embeds: Any) -> int:
            now[0] += 100
            return self.decoder.prefill(embeds)

        def decode(self, count: int) -> list[int]:
            now[0] += self.seconds * count
            self.seconds = 2
            return self.decoder.decode(count)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.decoder, name)

    HostDecoder.register(Slow)
    monkeypatch.setattr(backends, "load_decoder", lambda *a, **k: Slow(load(*a, **k)))
    found = try_component(built, "cpu", "decoder", ["onnxruntime-fp32"], "onnxruntime-fp32")
    assert found["onnxruntime-fp32"]["latency_ms"] == {"prefill": 100_000.0, "decode": 2000.0}


def test_the_first_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = [0.0], iter([50, 2, 3])
    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(seconds)

    assert trial.timed(run) == [2000.0, 3000.0]


def test_what_a_decoder_takes_beside_a_shortened_prompt_is_shortened_too() -> None:
    """By the axis that is called so: Gemma 3n's per-layer inputs, and not what the picture made."""
    inputs = [TensorSpec(name, "float32", (1, "length", 3)) for name in ("inputs_embeds", "per_layer")]
    inputs += [TensorSpec("image_features", "float32", (1, "tokens", 3))]
    spec: Any = SimpleNamespace(components={"decoder": ComponentSpec("", tuple(inputs), (), 0)})
    golden = {f"2.{tensor.name}": np.zeros((1, 9, 3), np.float32) for tensor in inputs}
    found = trial.further_of(SimpleNamespace(manifest=spec), golden, "2", 4)  # type: ignore[arg-type]
    assert {name: array.shape for name, array in found.items()} == {"per_layer": (1, 4, 3), "image_features": (1, 9, 3)}
