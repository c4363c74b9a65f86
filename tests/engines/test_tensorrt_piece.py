"""From TensorRT's network to its engine: types, flags, the timing cache, and what is said of an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vlmc.engines import tensorrt_piece
from vlmc.engines.tensorrt_piece import Made
from vlmc.files import write_json
from vlmc.records import SCHEMA, read_record


def test_norms_stay_float32_and_the_cache_becomes_float16() -> None:
    class Layer:
        def __init__(self, name: str) -> None:
            self.name, self.precision, self.output = name, "", ""

        def set_output_type(self, index: int, kind: str) -> None:
            self.output = kind

    names = ("layers.0.norm.square", "layers.0.mlp.up_proj", "layers.0.norm.normal", "pow_8.spelt.mean_9.total")
    layers = [Layer(name) for name in names]
    inputs = [SimpleNamespace(name=name, dtype="f32") for name in ("inputs_embeds", "past_key_values.0.key")]
    outputs = [SimpleNamespace(name=name, dtype="f32") for name in ("logits", "present.0.key")]
    network = SimpleNamespace(
        num_layers=len(layers),
        get_layer=layers.__getitem__,
        num_inputs=2,
        get_input=inputs.__getitem__,
        num_outputs=2,
        get_output=outputs.__getitem__,
    )
    parsed: Any = SimpleNamespace(network=network)
    spelt = tensorrt_piece._type_weakly(SimpleNamespace(float32="f32", float16="f16"), parsed)
    assert [layer.precision for layer in layers] == ["f32", "", "f32", "f32"]
    assert spelt == layers[3:]
    assert [tensor.dtype for tensor in inputs + outputs] == ["f32", "f16", "f32", "f16"]


@pytest.mark.parametrize(
    ("kinds", "quantised"), [(["MATRIX_MULTIPLY", "QUANTIZE"], True), (["GATHER"], False), ([], False)]
)
def test_a_network_is_quantised_where_it_has_scales(kinds: list[str], quantised: bool) -> None:
    layers = [SimpleNamespace(type=SimpleNamespace(name=kind)) for kind in kinds]
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    parsed: Any = SimpleNamespace(network=network)
    assert tensorrt_piece._quantised(parsed) is quantised


@pytest.mark.parametrize(("level", "wanted"), [("", None), ("0", 0)])
def test_a_process_makes_the_engine_of_its_folder(
    level: str, wanted: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [{"x": ((1, 1), (1, 7), (1, 9))}, {}]
    write_json(tmp_path / "profiles.json", shapes)
    given: list[Any] = []

    made = Made(SCHEMA, {"int8": 3}, scratch_bytes=5, layers=2, half_norms=0, peak_bytes=7)

    def make(*arguments: Any) -> Made:
        given.extend(arguments)
        return made

    monkeypatch.setattr(tensorrt_piece, "make", make)
    assert tensorrt_piece.main(str(tmp_path), "decoder", level, "times") == ""
    assert given == [tmp_path, shapes, "decoder", wanted, Path("times")]
    assert read_record(Made, tmp_path / "made.json") == made


def test_pieces_are_summed_up_as_one_engine() -> None:
    found = [
        Made(SCHEMA, {"int8": 3, "float16": 1}, scratch_bytes=5, layers=2, half_norms=0, peak_bytes=1),
        Made(SCHEMA, {"int8": 2}, scratch_bytes=9, layers=1, half_norms=6, peak_bytes=1),
    ]
    summed = {"products": {"int8": 5, "float16": 1}, "scratch_bytes": 9, "layers": 3, "half_norms": 6}
    assert tensorrt_piece.summed(found) == summed


def test_products_are_the_inspectors_where_it_shows_layers() -> None:
    layers = [
        {"LayerType": "CaskGemm", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]},
        {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
        {"LayerType": "PointWise", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]},
    ]
    assert tensorrt_piece.executed(layers, {"int8": 9}, True) == {"int8": 1, "float16": 1}


def test_a_fused_region_shows_none_and_the_report_says_so() -> None:
    region, asked = [{"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin"}], {"int8": 9, "float32 attention": 2}
    assert tensorrt_piece.executed(region, asked, weak=False) == {"int8 (asked)": 9, "float32 attention (asked)": 2}
    weakly = {"int8 (asked)": 9, "float16 or float32 attention (asked)": 2}
    assert tensorrt_piece.executed(region, asked, weak=True) == weakly
    beside = {"LayerType": "CaskGemm", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]}
    assert tensorrt_piece.executed([beside, *region], asked, weak=True) == weakly


@pytest.mark.parametrize(
    ("kept", "fits", "taken"), [(b"ours", True, b"ours"), (b"another GPU's", False, b""), (b"", True, b"")]
)
def test_a_timing_cache_of_another_gpu_is_begun_anew(kept: bytes, fits: bool, taken: bytes, tmp_path: Path) -> None:
    if kept:
        (tmp_path / "timing.cache").write_bytes(kept)
    used: list[Any] = []

    def take(cache: Any, ignore_mismatch: bool) -> bool:
        used.append(cache)
        return not ignore_mismatch and (fits or cache.content == b"")

    made = SimpleNamespace(
        create_timing_cache=lambda content: SimpleNamespace(content=content, serialize=lambda: content + b" and more"),
        set_timing_cache=take,
    )
    cache = tensorrt_piece._TimingCache(None, tmp_path / "timing.cache")
    cache.use(made)
    cache.keep()
    assert used[-1].content == taken
    assert (tmp_path / "timing.cache").read_bytes() == taken + b" and more"
