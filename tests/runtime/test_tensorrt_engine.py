"""What of an engine's inputs can be run in parts follows from the names of its sizes; which names bindings have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.runtime import tensorrt_engine
from vlmc.runtime.tensorrt_engine import Engine, batch_dimension, new_context

from .backends.fake_tensorrt import Bound, FakeEngine, Made, fake_trt, spec

CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext")
TODAY = {kind: set(dir(getattr(tensorrt_rtx, kind))) for kind in CLASSES}  # 1.7's; TensorRT 11.4 has what is used of it
OLD = {  # TensorRT 8.6, less what came later; seen in its wheel and in that of 10.0.1
    **TODAY,
    "ICudaEngine": TODAY["ICudaEngine"] - {"device_memory_size_v2", "create_execution_context"}
    | {"device_memory_size", "create_execution_context_without_device_memory"},
    "IExecutionContext": TODAY["IExecutionContext"] - {"set_device_memory"},
}


@pytest.mark.parametrize(("names", "strategies"), [(TODAY, True), (OLD, False)], ids=["RTX 1.7", "8.6"])
def test_of_tensorrts_api_only_names_that_the_bindings_have_are_used(
    names: dict[str, set[str]],
    strategies: bool,
    planned: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_engine, "architecture", lambda: 90)
    made = Made(planned, "decoder", "fp16", tmp_path)
    runtime = made.trt.Runtime
    made.trt.Runtime = lambda logger: Bound(runtime(logger), names, "Runtime")
    if strategies:
        made.trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    decoder = made.decoder()
    cases, arrays = golden.read(planned)
    assert [decoder.prefill(arrays["0.inputs_embeds"]), *decoder.decode(2)] == cases[0]["tokens"][:3]
    assert np.isfinite(decoder.logits()).all()


@pytest.mark.parametrize("order", [1, -1], ids=["the largest last", "the largest first"])
def test_a_buffer_is_as_large_as_the_largest_profile_needs(
    order: int, planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "architecture", lambda: 90)
    made = Made(planned, "vision_encoder", "fp16", tmp_path)
    profiles = made.shapes[::order]
    trt = fake_trt(lambda data: FakeEngine(made.gpu, tmp_path / "0.onnx", profiles))
    engine = Engine(trt, made.gpu, spec(), made.path)  # type: ignore[arg-type]
    monkeypatch.setattr(made.gpu, "allocate", lambda size: size)
    most = max(shapes["pixel_values"][2][0] for shapes in profiles)
    sizes = {"pixel_values": 4 * most * 3 * 32 * 32, "image_features": 4 * most * 4 * 64}
    assert engine.allocate(engine.context()) == sizes


def test_an_engine_in_pieces_takes_what_the_whole_does_and_the_largest_scratch_memory(
    planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "architecture", lambda: 90)
    (tmp_path / "whole").mkdir()
    whole = Made(planned, "decoder", "fp16", tmp_path / "whole").engine()
    made, sizes, taken = Made(planned, "decoder", "fp16", tmp_path, count=3), iter([10, 30, 20, 5, 5, 5]), list[int]()
    monkeypatch.setattr(tensorrt_engine, "scratch_bytes", lambda engine: next(sizes))
    monkeypatch.setattr(made.gpu, "allocate", taken.append)
    engine = made.engine()
    assert taken == [30]
    assert set(engine.inputs) == set(whole.inputs) and set(engine.outputs) > set(whole.outputs)
    assert engine.profiles == whole.profiles


@pytest.mark.parametrize("sizes", [[9], [9] * 99, [-9, 18], [9.0], [10**18, -(10**18)], ["9"]])
def test_a_file_without_the_pieces_that_its_record_names_is_refused(
    sizes: list[Any], planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "architecture", lambda: 90)
    made = Made(planned, "decoder", "fp16", tmp_path, count=3)
    with pytest.raises(VlmcError, match=r"engine\.trt does not hold the pieces.*run `vlmc build"):
        Engine(made.trt, made.gpu, spec(pieces=sizes), made.path)  # type: ignore[arg-type]


def test_an_engine_that_can_have_no_context_is_refused_in_a_sentence() -> None:
    """TensorRT 8.6 builds CLIP's text encoder so at times."""
    trt = fake_trt(lambda data: None)

    class NoContext:
        def create_execution_context_without_device_memory(self) -> None:
            tensorrt_engine.logger(trt).log(1, "Myelin internal error")

    with pytest.raises(VlmcError, match=r"cannot run an engine.*Found: Myelin internal error.*timing\.cache"):
        new_context(trt, NoContext())


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ([("tiles", 3, 32, 32), ("tiles", 4, 64)], "tiles"),
        ([("texts", "length"), ("texts", 64)], "texts"),
        ([("tiles", 3, 8, 8), (1, "4*tiles + 2", 64)], ""),  # Phi-3.5: separators behind all tiles
        ([("tiles", 3, 8, 8), (49, "tiles", 49), (1, 49, 64)], ""),  # Moondream2: tiles that are averaged
        ([("tokens", 4, 96), ("tokens",), ("tokens", 64)], ""),  # Qwen2.5-VL: tokens that see one another
        ([("tiles", 40, 32), (1, "text_length", 32), ("tiles", 4, 32)], ""),  # LLaVA-Mini's fusion
        ([(1, 3, 8, 8), (1, 4, 64)], ""),
        ([(), ("tiles", 3)], ""),
    ],
)
def test_a_batch_is_the_first_axis_of_everything_and_of_things_that_are_apart(
    shapes: list[tuple[int | str, ...]], name: str
) -> None:
    assert batch_dimension(shapes) == name
