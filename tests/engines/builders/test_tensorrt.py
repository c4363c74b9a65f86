"""What the builder for TensorRT decides before TensorRT is there: dialect, shapes, pieces.

The rest is seen on a GPU (benchmarks/gpu_host.py).
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tensorrt_rtx
from vlmc.artifact import Artifact, KvSpec
from vlmc.calibration.plan import read_plan
from vlmc.engines import builders, child, tensorrt_network
from vlmc.engines.builders import tensorrt as builder
from vlmc.engines.passes import quantize
from vlmc.engines.tensorrt_piece import Made
from vlmc.engines.tensorrt_profiles import Range
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.files import read_json
from vlmc.profiles.device import load_device
from vlmc.records import SCHEMA, write_record

ORIN = load_device("orin")
KV = KvSpec(layers=2, kv_heads=2, head_dim=16, capacity=128)


def lowered(
    artifact: Artifact, component: str, tensorrt: str, folder: Path, recipe: str = "int8"
) -> tuple[ir.Model, str]:
    model = ir.load(artifact.graph(component))
    quantize.apply(model, read_plan(artifact, recipe), component)
    device = replace(ORIN, tensorrt=tensorrt)
    embed = ir.load(artifact.graph("embed_tokens"))
    job = builders.Job(
        component, "int8", device, artifact.manifest.kv, folder, lambda: embed, {}, folder / "timing.cache"
    )
    return model, builder.lower(model, job)


@pytest.mark.parametrize(
    ("version", "opset", "form", "half"),
    [
        ("8.6", 17, "append", False),
        ("10.3", 17, "append", False),
        ("10.13", 17, "append", True),
        ("10.16", 24, "shared", True),
    ],
)
def test_the_graph_speaks_the_devices_tensorrt(
    version: str, opset: int, form: str, half: bool, planned: Artifact, tmp_path: Path
) -> None:
    model, found = lowered(planned, "decoder", version, tmp_path)
    assert (dict(model.opset_imports)[""], found) == (opset, form)
    floats = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT  # else the builder types them
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"} == {floats}
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    assert list(past.shape or ()) == [1, 2, planned.manifest.kv.capacity, 16]
    assert past.dtype == floats
    assert {"input_ids", "inputs_embeds"} <= {str(value.name) for value in model.graph.inputs}


def test_the_tables_that_a_decoder_looks_up_in_are_no_larger_than_tensorrt_takes(
    planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(builder.large_tables, "apply", lambda model: seen.extend(model.graph.initializers))
    lowered(planned, "decoder", "8.6", tmp_path)
    assert any(name.startswith("embed_tokens.") for name in seen)


@pytest.mark.parametrize("version", ["8.6", "10.13"])
def test_a_decoder_looks_embeddings_up_in_float16(
    version: str, planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder.half_tables.apply, "__defaults__", (1,))
    model, _ = lowered(planned, "decoder", version, tmp_path)
    tables = [value for name, value in model.graph.initializers.items() if name.startswith("embed_tokens.")]
    assert ir.DataType.FLOAT16 in {table.dtype for table in tables if len(table.shape or ()) == 2}


def test_a_decoder_has_a_profile_for_the_step_and_prompts_by_length(planned: Artifact, tmp_path: Path) -> None:
    model, _ = lowered(planned, "decoder", "8.6", tmp_path)
    step, prompt = builder.profiles(model, job("decoder", 128))
    assert step["inputs_embeds"] == ((1, 1, 64),) * 3
    assert prompt["position_ids"] == ((1, 1), (1, 128), (1, 128))
    for capacity, lengths in ((2048, [1, 256, 2048]), (256, [1, 256])):
        assert [p["input_ids"][2][1] for p in builder.profiles(model, job("decoder", capacity))] == lengths


def test_vision_has_a_profile_for_one_tile_and_one_for_more(planned: Artifact, tmp_path: Path) -> None:
    model, form = lowered(planned, "vision_encoder", "8.6", tmp_path)
    assert form == ""
    vision = job("vision_encoder", 128, tiles=Range(1, 5, 17))
    found = [tuple(shape[0] for shape in shapes["pixel_values"]) for shapes in builder.profiles(model, vision)]
    assert found == [(1, 1, 1), (2, 5, builder.MOST)]


def job(component: str, capacity: int, **sizes: Range) -> builders.Job:
    kv, folder = replace(KV, capacity=capacity), Path()
    return builders.Job(component, "int8", ORIN, kv, folder, lambda: pytest.fail("not needed"), sizes, folder)


def test_what_a_version_cannot_do_is_said_before_anything_is_built() -> None:
    assert builder.refuses("decoder", "int8", ORIN) == ""
    assert builder.refuses("embed_tokens", "fp16", ORIN)
    assert "need TensorRT 10.15" in builder.refuses("decoder", "w8", ORIN)
    assert builder.refuses("decoder", "w8", replace(ORIN, tensorrt="10.16")) == ""
    assert builder.refuses("decoder", "w4", ORIN) == ""
    assert "need TensorRT 10.0, and H100" in builder.refuses("decoder", "w4", load_device("h100"))


def test_tensorrt_10_gets_blocks_of_int4_and_what_it_lacks_as_floats(planned: Artifact, tmp_path: Path) -> None:
    model, form = lowered(planned, "decoder", "10.3", tmp_path, "w4")
    assert (dict(model.opset_imports)[""], form) == (21, "append")
    blocks = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert {node.inputs[0].dtype for node in blocks if node.inputs[0] is not None} == {ir.DataType.INT4}
    assert len(blocks) == 14  # the head's blocks of int8 became floats
    ir.save(model, tmp_path / "w4.onnx", external_data="w4.onnx.data")
    parsed = tensorrt_network.parse(tensorrt_rtx, tmp_path / "w4.onnx", "decoder")  # the parser of TensorRT's family
    assert tensorrt_network.products(parsed)["w4"] == 14


def test_blocks_of_int4_compute_what_the_canonical_graph_does(planned: Artifact, tmp_path: Path) -> None:
    model, _ = lowered(planned, "decoder", "10.3", tmp_path, "w4")
    canonical = ir.load(planned.graph("decoder"))
    quantize.apply(canonical, read_plan(planned, "w4"), "decoder")
    arrays, kv = golden.read(planned)[1], planned.manifest.kv
    embeds = arrays["0.inputs_embeds"]
    length = embeds.shape[1]
    feeds: dict[str, Any] = {
        "inputs_embeds": embeds,
        "position_ids": np.arange(length)[None],
        "write_index": np.zeros(1, np.int64),
        "logits_index": np.array([length - 1]),
    }
    for index in range(kv.layers):
        for part in ("key", "value"):
            state = np.zeros((1, kv.kv_heads, kv.capacity, kv.head_dim), np.float32)
            feeds[f"past_key_values.{index}.{part}"] = state
    wanted = logits(canonical, feeds, tmp_path / "canonical")
    narrow = {name: a.astype(np.int32) if a.dtype == np.int64 else a for name, a in feeds.items()}
    found = logits(model, narrow | {"input_ids": np.full((1, length), -1, np.int32)}, tmp_path / "lowered")
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def logits(model: ir.Model, feeds: dict[str, Any], folder: Path) -> Any:
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused kernels round activations
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize(("version", "convolutions", "level"), [("8.6", 8, 0), ("8.6", 7, None), ("10.3", 8, None)])
def test_a_convolutional_network_is_built_quickly_by_tensorrt_8(
    version: str, convolutions: int, level: int | None
) -> None:
    image = ir.Value(name="image")
    nodes = [ir.node("Conv", [image, image]) for _ in range(convolutions)]
    model = ir.Model(ir.Graph([image], [], nodes=[*nodes, ir.node("MatMul", [image, image])]), ir_version=10)
    assert builder.optimization_level(model, replace(ORIN, tensorrt=version)) == level


@pytest.mark.parametrize(
    ("version", "precision", "operator"),
    [("8.6", "fp16", "Max"), ("8.6", "int8", "Clip"), ("10.13", "fp16", "Clip")],
)
def test_a_bound_from_below_is_a_maximum_where_floats_are_typed_weakly(
    version: str, precision: str, operator: str, tmp_path: Path
) -> None:
    x, y = (ir.val(name, ir.DataType.FLOAT, [2, 3]) for name in "xy")
    low = ir.val("low", const_value=ir.tensor(np.float32(0), name="low"))
    graph = ir.Graph([x], [y], nodes=[ir.Node("", "Clip", [x, low], outputs=[y])], initializers=[low])
    graph.opset_imports[""] = 17
    model, device = ir.Model(graph, ir_version=8), replace(ORIN, tensorrt=version)
    builder.lower(
        model, builders.Job("vision_encoder", precision, device, KV, tmp_path, lambda: model, {}, tmp_path / "cache")
    )
    assert operator in [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("precision", "free", "expected"),
    [
        ("fp16", None, 10e9),  # nobody tells
        ("fp16", 35.5e9, 10e9),
        ("fp16", 35.4e9, 29.9e9 / 3),
        ("int8", 75.5e9, 10e9),
        ("int8", 19.5e9, 2e9),
        ("int8", 4e9, builder.LEAST),
    ],
)
def test_a_piece_is_as_large_as_memory_allows(
    precision: str, free: float | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "available_bytes", lambda: free)
    assert builder.piece_bytes(int(10e9), precision) == pytest.approx(expected)


@pytest.fixture
def built_in_pieces(
    planned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[builders.Built, list[int]]]:
    """built_in_pieces(at_once=1, failures=(), key="", count=4): the decoder built by a TensorRT that is not there in
    about so many pieces, and these in the order in which they were tried; those in `failures` fail, one after
    another."""

    def build(
        at_once: int = 1, failures: Sequence[int] = (), key: str = "", count: int = 4
    ) -> tuple[builders.Built, list[int]]:
        tried, left = list[int](), list(failures)

        def make(module: str, what: str, place: str, component: str, level: str, timings: str) -> str:
            folder, index = Path(place), int(what.split()[1]) - 1
            tried.append(index)
            assert (module, component, level) == ("tensorrt_piece", "decoder", "")
            shapes, graph = read_json(folder / "profiles.json"), ir.load(folder / "lowered.onnx")
            free = {v.name for v in graph.graph.inputs if not all(isinstance(d, int) for d in v.shape or ())}
            assert [set(profile) for profile in shapes] == [free] * 2 * bool(free)  # a step's, and those of prompts
            if index in left:
                left.remove(index)
                raise VlmcError("killed")
            (folder / "engine.trt").write_text(f"<{index}>")
            write_record(folder / "made.json", Made(SCHEMA, {"int8": 1}, 10 * index, 2, 0, 100 + index))
            return ""

        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.0"))
        monkeypatch.setattr(builder.cuda, "architecture", lambda: 90)
        monkeypatch.setattr(builder, "piece_bytes", lambda size, precision: size / count)
        monkeypatch.setattr(builder, "AT_ONCE", at_once)
        monkeypatch.setattr(child, "run", make)
        model, kv, embed = ir.load(planned.graph("decoder")), planned.manifest.kv, planned.graph("embed_tokens")
        job = builders.Job("decoder", "fp16", ORIN, kv, tmp_path, lambda: ir.load(embed), {}, tmp_path / "cache", key)
        return builder.build(model, job), tried

    return build


def test_pieces_become_one_file_and_one_record(built_in_pieces: Any, tmp_path: Path) -> None:
    built, tried = built_in_pieces()
    count = len(tried)
    assert tried == list(range(count)) and count > 2
    assert built.settings["pieces"] == [3] * count
    assert (tmp_path / built.file).read_text() == "".join(f"<{index}>" for index in range(count))
    assert built.settings["products"] == {"int8": count}
    assert (built.settings["scratch_bytes"], built.settings["layers"]) == (10 * (count - 1), 2 * count)
    assert built.others_bytes == 100 + count - 1  # one at a time
    assert built.kv is not None and built.kv.form == "append"
    assert sorted(path.name for path in tmp_path.iterdir()) == [built.file]


def test_who_waits_is_told_which_piece_is_being_built(built_in_pieces: Any, capfd: pytest.CaptureFixture[str]) -> None:
    _, tried = built_in_pieces()
    said = [f"{child.SAYS}piece {index + 1} of {len(tried)}" for index in tried]
    assert capfd.readouterr().err.splitlines() == said


def test_several_pieces_at_once_take_their_memory_together(built_in_pieces: Any) -> None:
    built, tried = built_in_pieces(at_once=2)
    assert built.others_bytes == sum(sorted(100 + index for index in tried)[-2:])


def test_a_piece_that_fails_is_built_once_more_when_the_others_are_done(built_in_pieces: Any) -> None:
    built, tried = built_in_pieces(failures=[1])
    assert tried == [*range(len(tried) - 1), 1]
    assert len(built.settings["pieces"]) == len(tried) - 1
    with pytest.raises(VlmcError, match="killed"):
        built_in_pieces(failures=[1, 1])


def test_a_build_that_ended_early_goes_on_with_the_pieces_that_it_had(built_in_pieces: Any, tmp_path: Path) -> None:
    whole, every = built_in_pieces()
    content = (tmp_path / whole.file).read_text()
    with pytest.raises(VlmcError, match="killed"):
        built_in_pieces(failures=[1, 1])
    again, tried = built_in_pieces()
    assert tried == [1]
    assert again == whole
    assert (tmp_path / again.file).read_text() == content
    assert built_in_pieces()[1] == every  # and nothing is left of it


@pytest.mark.parametrize(("changed", "same"), [({"key": "other weights"}, 0), ({"count": 3}, 2)])
def test_pieces_of_another_engine_are_not_taken(changed: Any, same: int, built_in_pieces: Any, tmp_path: Path) -> None:
    """Of another cut those that are the same in both are: the embeddings and the head."""
    with pytest.raises(VlmcError, match="killed"):
        built_in_pieces(failures=[1, 1])
    built, tried = built_in_pieces(**changed)
    assert len(tried) == len(built.settings["pieces"]) - same
    assert sorted(path.name for path in tmp_path.iterdir()) == [built.file]


@pytest.mark.parametrize("damage", ["made.json", "engine.trt"])
def test_a_piece_that_is_not_whole_is_built_again(damage: str, built_in_pieces: Any, tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="killed"):
        built_in_pieces(failures=[1, 1])
    kept = sorted(tmp_path.glob(f"pieces-decoder-fp16/*/{damage}"))
    if damage == "engine.trt":
        kept[0].unlink()
    else:
        kept[0].write_text(kept[0].read_text()[:-9])
    assert len(built_in_pieces()[1]) == 2


def test_a_disk_without_room_for_the_engine_costs_no_piece(
    built_in_pieces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(builder.os, "posix_fallocate", full)
        with pytest.raises(VlmcError, match="No space is left"):
            built_in_pieces()
    assert built_in_pieces()[1] == []


def test_a_link_where_pieces_are_kept_is_not_followed(built_in_pieces: Any, tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    (tmp_path / "pieces-decoder-fp16").symlink_to(elsewhere)
    built_in_pieces()
    assert [path.name for path in elsewhere.iterdir()] == ["thesis.txt"]
