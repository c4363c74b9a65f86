"""The TensorRT runtime's own part: buffers, profiles, the step that stays on the GPU, what it appends, and refusals.

Engine and GPU are those of fake_tensorrt.py. What only a GPU shows is in benchmarks/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from vlmc.artifact import Artifact
from vlmc.engines.builders import tensorrt as builder
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.runtime import kernels, tensorrt_engine
from vlmc.runtime.backends import tensorrt as backend
from vlmc.runtime.backends.tensorrt import TensorrtRunner
from vlmc.runtime.tensorrt_engine import Engine

from .fake_tensorrt import Made, spec


@pytest.fixture(autouse=True)
def an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "architecture", lambda: 90)


@pytest.fixture
def make(planned: Artifact, tmp_path: Path) -> Callable[[str, str], Made]:
    return lambda component, recipe: Made(planned, component, recipe, tmp_path)


def test_pictures_run_in_parts_that_fit_the_profiles(make: Callable[..., Made], planned: Artifact) -> None:
    arrays = golden.read(planned)[1]
    pixels, wanted = arrays["0.pixel_values"], arrays["0.image_features"]
    runner = TensorrtRunner(make("vision_encoder", "fp16").engine(), planned.manifest.components["vision_encoder"])
    many = np.concatenate([pixels] * 3)[:19]
    assert len(many) > builder.MOST
    features = runner.run({"pixel_values": many})["image_features"]
    for index, row in enumerate(features):
        np.testing.assert_allclose(row, wanted[index % len(pixels)], rtol=1e-3, atol=1e-4)


def test_of_profiles_that_hold_as_many_the_first_is_taken(
    make: Callable[..., Made], planned: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, taken = golden.read(planned)[1]["0.pixel_values"], list[int]()
    runner = TensorrtRunner(make("vision_encoder", "fp16").engine(), planned.manifest.components["vision_encoder"])
    monkeypatch.setattr(runner, "_run", lambda arrays, profile, alone=False: taken.append(profile))
    runner.run({"pixel_values": pixels[:1]})
    runner.run({"pixel_values": pixels[:2]})
    assert taken == [0, 1]


def test_shapes_that_come_again_run_as_a_graph_until_others_come(
    make: Callable[..., Made], planned: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, captured = golden.read(planned)[1], list[object]()
    pixels, wanted = arrays["0.pixel_values"], arrays["0.image_features"]
    engine, spec = make("vision_encoder", "fp16").engine(), planned.manifest.components["vision_encoder"]

    def capture(enqueue: Callable[[], None]) -> Callable[[], None]:
        captured.append(enqueue)
        return enqueue

    monkeypatch.setattr(engine.gpu, "capture", capture)

    def captures(runner: TensorrtRunner, *counts: int) -> int:
        captured.clear()
        for count in counts:
            found = runner.run({"pixel_values": np.concatenate([pixels] * 4)[:count]})["image_features"]
            np.testing.assert_allclose(found[-1], wanted[(count - 1) % len(pixels)], rtol=1e-3, atol=1e-4)
        return len(captured)

    runner = TensorrtRunner(engine, spec)
    assert captures(runner, 1) == 0
    assert captures(runner, 1, 1, 1) == 1
    assert captures(runner, 2, 1, 2) == 0
    assert captures(runner, 2, 1, 1) == 2
    assert captures(runner, 2 * builder.MOST, 2 * builder.MOST) == 0  # parts: others may follow
    assert captures(TensorrtRunner(engine, spec, graphs=False), 1, 1, 1) == 0


@pytest.mark.parametrize("recipe", ["fp16", "int8"])
def test_tokens_are_those_of_pytorch(make: Callable[..., Made], planned: Artifact, recipe: str) -> None:
    decoder = make("decoder", recipe).decoder()
    cases, arrays = golden.read(planned)
    for index, case in enumerate(cases[:2]):  # those whose inputs are kept
        first = decoder.prefill(arrays[f"{index}.inputs_embeds"])
        logits = arrays[f"{index}.prefill_logits"]
        assert float(np.corrcoef(decoder.logits(), logits)[0, 1]) > 0.98
        if recipe == "fp16":
            count = len(case["tokens"]) - 1
            assert [first, *decoder.decode(count)] == list(case["tokens"])
            assert [decoder.prefill(arrays[f"{index}.inputs_embeds"]), *decoder.decode(1)] == list(case["tokens"][:2])


def test_one_profile_serves_steps_and_prompts(planned: Artifact, tmp_path: Path) -> None:
    decoder = Made(planned, "decoder", "fp16", tmp_path, profiles=1).decoder()
    cases, arrays = golden.read(planned)
    first = decoder.prefill(arrays["0.inputs_embeds"])
    assert [first, *decoder.decode(len(cases[0]["tokens"]) - 1)] == cases[0]["tokens"]


@pytest.mark.parametrize("count", [2, 7])
def test_a_decoder_in_pieces_says_the_same(count: int, planned: Artifact, tmp_path: Path) -> None:
    made = Made(planned, "decoder", "fp16", tmp_path, count=count)
    assert len(made.pieces) > 1
    decoder, (cases, arrays) = made.decoder(), golden.read(planned)
    for index, case in enumerate(cases[:2]):
        embeds, more = arrays[f"{index}.inputs_embeds"], len(case["tokens"]) - 1
        assert [decoder.prefill(embeds), *decoder.decode(more)] == list(case["tokens"])


def test_feeding_a_token_replaces_the_chosen_one(make: Callable[..., Made], planned: Artifact) -> None:
    decoder = make("decoder", "fp16").decoder()
    arrays = golden.read(planned)[1]
    decoder.prefill(arrays["0.inputs_embeds"])
    for token, logits in zip(arrays["0.step_tokens"], arrays["0.step_logits"], strict=True):
        decoder.feed(int(token))
        np.testing.assert_allclose(decoder.logits(), logits, rtol=0.02, atol=0.02)


def test_the_cache_can_be_filled_to_its_end_and_no_further(make: Callable[..., Made]) -> None:
    made = make("decoder", "fp16")
    decoder, capacity = made.decoder(), made.kv.capacity
    embeds = np.random.default_rng(1).standard_normal((1, capacity - 3, 64)).astype(np.float32)
    decoder.prefill(embeds)
    assert len(decoder.decode(3)) == 3
    with pytest.raises(VlmcError, match="KV cache is full"):
        decoder.decode(1)


def test_decoding_in_any_portions_gives_the_same_tokens(make: Callable[..., Made], planned: Artifact) -> None:
    decoder, embeds = make("decoder", "fp16").decoder(), golden.read(planned)[1]["0.inputs_embeds"]
    decoder.prefill(embeds)
    at_once = decoder.decode(9)
    decoder.prefill(embeds)
    assert [token for count in (2, 3, 4) for token in decoder.decode(count)] == at_once
    assert len(set(at_once)) > 1


def test_a_prompt_may_be_as_long_as_its_profile(make: Callable[..., Made]) -> None:
    decoder = make("decoder", "fp16").decoder()
    embeds = np.random.default_rng(1).standard_normal((1, decoder.capacity, 64)).astype(np.float32)
    assert isinstance(decoder.prefill(embeds), int)


def test_a_step_is_captured_at_the_caches_start_and_not_where_the_last_answer_ended(make: Callable[..., Made]) -> None:
    decoder = make("decoder", "fp16").decoder()
    decoder.prefill(np.zeros((1, 5, 64), np.float32))
    decoder.decode(decoder.capacity - 5)
    decoder._capture_step()
    position = np.zeros(1, np.int32)
    decoder._gpu.download(position, decoder._state)
    assert position == [1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"version": "10.3.0"}, r"another version of TensorRT\. Found: 10\.3\.0\. Expected: 8\.6\.0.*--device h100"),
        ({"sm": 87}, r"another GPU architecture \(SM\)\. Found: 87\. Expected: 90"),
    ],
)
def test_an_engine_of_another_machine_is_refused_by_name(
    settings: dict[str, Any], says: str, make: Callable[..., Made]
) -> None:
    made = make("vision_encoder", "fp16")
    with pytest.raises(VlmcError, match=says):
        Engine(made.trt, made.gpu, spec(**settings), made.path)  # type: ignore[arg-type]


def test_a_file_that_is_no_engine_says_what_tensorrt_said(make: Callable[..., Made], tmp_path: Path) -> None:
    made = make("vision_encoder", "fp16")
    (tmp_path / "engine.trt").write_bytes(b"")
    with pytest.raises(VlmcError, match="Magic tag does not match"):
        Engine(made.trt, made.gpu, spec(), tmp_path / "engine.trt")  # type: ignore[arg-type]


def test_without_tensorrt_the_reason_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "a Jetson has JetPack's" in backend.unavailable()
    monkeypatch.setattr(backend, "architecture", lambda: 90)
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    assert backend.unavailable() == ""
    monkeypatch.setattr(backend, "architecture", lambda: "no NVIDIA driver is installed")
    assert backend.unavailable() == "no NVIDIA driver is installed"


def test_the_shipped_kernels_are_compiled_from_their_source() -> None:
    assert kernels.PTX.read_text().splitlines()[0].endswith(kernels.source_hash())
    assert f".version {kernels.PTX_VERSION}" in kernels.PTX.read_text()
