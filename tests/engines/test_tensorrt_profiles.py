"""What sizes an engine is made for: those of the golden inputs, and up to what a picture and the KV cache allow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlmc.artifact import Artifact, TensorSpec
from vlmc.engines.tensorrt_profiles import Range, _limits, one_and_more, profile, ranges
from vlmc.runtime import preprocessing
from vlmc.runtime.matching import TEXTS

LOOKS = {"rescale_factor": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3, "image_token": "<i>"}
TILES = {
    "idefics3": {"longest_edge": 30, "tile": 8, "split": True, "resample": 1, "image_seq_len": 1}
    | {"around_token": "<a>", "global_token": "<g>"},
    "internvl": {"tile": 8, "min_tiles": 1, "max_tiles": 6, "thumbnail": True, "resample": 2, "image_seq_len": 1}
    | {"start_token": "<s>", "end_token": "<e>"},
    "phi3_v": {"tile": 8, "max_tiles": 4, "side": 2, "end_token": "<e>"},
    "clip": {"shortest_edge": 8, "tile": 8, "pad": False, "resample": 3, "image_seq_len": 1, "after_image": ""},
}
QWEN = {"min_pixels": 16, "max_pixels": 40 * 16, "patch": 2, "frames": 1, "merge": 2, "window": 8, "resample": 3}


def artifact(folder: Path, inputs: dict[str, tuple[int | str, ...]], matching: Any = None, **shapes: Any) -> Artifact:
    """One whose component `part` takes these inputs, with golden arrays of these shapes, two cases of each."""
    folder.mkdir(exist_ok=True)
    arrays = {
        f"{case}.{name}": np.zeros(shape, np.float32)
        for name, both in shapes.items()
        for case, shape in enumerate(both)
    }
    np.savez(folder / "golden.npz", cosines=np.zeros((2, 2), np.float32), **arrays)
    taken = tuple(TensorSpec(name, "float32", shape) for name, shape in inputs.items())
    part = SimpleNamespace(inputs=taken, outputs=())
    manifest = SimpleNamespace(
        components={"part": part},
        kv=SimpleNamespace(capacity=64),
        preprocessing={"kind": "internvl"} | LOOKS | TILES["internvl"],
        matching=matching,
    )
    made: Any = SimpleNamespace(manifest=manifest, path_of=lambda name: folder / "golden.npz")
    return made


def limits(config: dict[str, Any], capacity: int = 1 << 20) -> dict[str, int]:
    known = SimpleNamespace(preprocessing=config, kv=SimpleNamespace(capacity=capacity), matching=None)
    made: Any = SimpleNamespace(manifest=known)
    return _limits(made)


def model(inputs: dict[str, tuple[int | str, ...]], output: tuple[int | str, ...]) -> ir.Model:
    values = [ir.Value(name=name, shape=ir.Shape(shape)) for name, shape in inputs.items()]
    made = ir.Value(name="y", shape=ir.Shape(output))
    return ir.Model(ir.Graph(values, [made], nodes=[], opset_imports={"": 24}), ir_version=10)


def test_sizes_of_an_artefact_are_the_golden_ones_and_what_follows_from_it(planned: Artifact) -> None:
    (tiles,) = ranges(planned, "vision_encoder").items()
    assert tiles == ("tiles", Range(1, 9, 17))  # pictures of 128 pixels in tiles of 32, and the whole
    length = ranges(planned, "embed_tokens")["length"]
    assert 1 == length.smallest < length.usual < length.largest == planned.manifest.kv.capacity
    assert ranges(planned, "decoder")["length"] == length


def test_a_name_is_one_size_and_the_largest_golden_one_is_the_usual(tmp_path: Path) -> None:
    inputs = {"a": ("tiles", 3), "b": (2, "tiles"), "c": (1, "text_length", 8), "input_ids": (1, "length")}
    made = artifact(
        tmp_path, inputs, a=[(2, 3), (4, 3)], b=[(2, 2), (2, 4)], c=[(1, 9, 8), (1, 5, 8)], input_ids=[(7,)]
    )
    expected = {"tiles": Range(1, 4, 7), "text_length": Range(1, 9, 64), "length": Range(1, 7, 64)}
    assert ranges(made, "part") == expected


def test_a_size_that_nothing_is_known_of_ends_with_the_golden_inputs(tmp_path: Path) -> None:
    made = artifact(tmp_path, {"a": ("things", "tiles"), "b": ("parts",)}, a=[(3, 9), (5, 8)])
    assert ranges(made, "part") == {"things": Range(1, 5, 5), "tiles": Range(1, 9, 9), "parts": Range(1, 1, 1)}


def test_texts_that_are_matched_are_as_long_and_as_many_as_the_runtime_makes_them(tmp_path: Path) -> None:
    made = artifact(
        tmp_path, {"input_ids": ("texts", "length")}, SimpleNamespace(text_length=77), input_ids=[(1, 9), (1, 4)]
    )
    assert ranges(made, "part") == {"texts": Range(1, 1, TEXTS), "length": Range(1, 9, 77)}


@pytest.mark.parametrize("kind", TILES)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90))
def test_no_picture_makes_more_tiles(kind: str, width: int, height: int) -> None:
    config = {"kind": kind} | LOOKS | TILES[kind]
    if kind == "phi3_v" and max(width, height) > 8 * min(width, height):
        return  # which it refuses
    pixels = preprocessing.load(config)([Image.new("RGB", (width, height))]).vision["pixel_values"]
    assert len(pixels) <= limits(config)["tiles"]


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 120), height=st.integers(1, 120), window=st.sampled_from([4, 8, 12]))
def test_no_picture_makes_more_tokens_and_windows(width: int, height: int, window: int) -> None:
    config = {"kind": "qwen2_5_vl"} | LOOKS | QWEN | {"window": window}
    vision = preprocessing.load(config)([Image.new("RGB", (width, height))]).vision
    found = limits(config)
    assert (found["tokens"], len(vision["pixel_values"]) <= found["tokens"]) == (40, True)
    assert len(vision["window_index"]) <= found["windows"]


def test_tokens_have_to_fit_the_cache() -> None:
    found = limits({"kind": "qwen2_5_vl"} | LOOKS | QWEN, capacity=21)
    assert (found["tokens"], found["windows"]) == (21, 11)


def test_a_profile_has_every_input_that_varies() -> None:
    graph = model({"a": (1, "length", 8), "b": ("tiles", "length"), "c": (3,)}, ("tiles",))
    assert profile(graph, {"length": (1, 4, 9), "tiles": (2, 2, 5)}) == {
        "a": ((1, 1, 8), (1, 4, 8), (1, 9, 8)),
        "b": ((2, 1), (2, 4), (5, 9)),
    }


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Range(1, 1, 1), [(1, 1, 1)]),
        (Range(1, 5, 17), [(1, 1, 1), (2, 5, 8)]),
        (Range(1, 1, 32), [(1, 1, 1), (2, 2, 8)]),
        (Range(1, 17, 17), [(1, 1, 1), (2, 8, 8)]),
        (Range(1, 3, 5), [(1, 1, 1), (2, 3, 5)]),
    ],
)
def test_what_can_be_parted_has_a_profile_for_one_and_one_for_more(
    size: Range, expected: list[tuple[int, ...]]
) -> None:
    made = one_and_more(model({"a": ("texts", "length")}, ("texts", 8)), {"texts": size, "length": Range(1, 6, 9)}, 8)
    assert [tuple(shape[0] for shape in shapes["a"]) for shapes in made] == expected
    assert {tuple(shape[1] for shape in shapes["a"]) for shapes in made} == {(1, 6, 9)}


def test_what_cannot_be_parted_has_one_profile() -> None:
    """Phi-3.5's separators stand once behind all tiles; a second input of another size."""
    sizes = {"tiles": Range(1, 5, 17)}
    assert one_and_more(model({"a": ("tiles", 3)}, (1, "4*tiles + 2", 8)), sizes, 8) == [
        {"a": ((1, 3), (5, 3), (17, 3))}
    ]
    assert len(one_and_more(model({"a": ("tiles", 3), "b": (2, "tiles")}, ("tiles", 8)), sizes, 8)) == 1
