"""Optimisation profiles: the shapes that an engine of TensorRT or TensorRT-RTX is made for.

An engine takes inputs that lie within one of its profiles, and is fastest at the usual shapes. A graph's free sizes
have names (manifest.json), and a name is one size wherever it stands, so a profile follows from a range for each name.
How far a size can go follows from the artefact: its golden inputs, KV cache and preprocessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir

from ..artifact import Artifact
from ..evaluation import goldens
from ..runtime import preprocessing
from ..runtime.matching import TEXTS
from ..runtime.tensorrt_engine import batch_dimension

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # the smallest, usual and largest shape of inputs that vary


class Range(NamedTuple):
    """Of one free size."""

    smallest: int
    usual: int
    largest: int


def ranges(artifact: Artifact, component: str) -> dict[str, Range]:
    """The range of every free size of the component, by name: from 1 over the largest of the golden inputs (1 where
    these do not show it) to what one picture and the KV cache allow. A size that nothing is known of ends where the
    golden inputs do."""
    usual: dict[str, int] = {}
    shapes = {name.partition(".")[::2]: array.shape for name, array in goldens.arrays(artifact).items()}
    cases = sorted({case for case, name in shapes if name})
    for tensor in artifact.manifest.components[component].inputs:
        found = [shapes[case, tensor.name] for case in cases if (case, tensor.name) in shapes]
        for shape in found or [(1,) * len(tensor.shape)]:
            whole = (1,) * (len(tensor.shape) - len(shape)) + shape  # input_ids lie there without their first axis
            for size, length in zip(tensor.shape, whole, strict=True):
                if isinstance(size, str):
                    usual[size] = max(usual.get(size, 1), length)
    limits = _limits(artifact)
    return {name: Range(1, size, max(size, limits.get(name, size))) for name, size in usual.items()}


def _limits(artifact: Artifact) -> dict[str, int]:
    """The largest that each size can be, by its name in the families' graphs."""
    manifest = artifact.manifest
    capacity = manifest.kv.capacity
    limits = preprocessing.load(manifest.preprocessing).largest(capacity)
    limits |= dict.fromkeys(("length", "text_length", "question_length", "image_tokens", "capacity"), capacity)
    if manifest.matching is not None:
        limits |= {"length": manifest.matching.text_length, "texts": TEXTS}
    return limits


def profile(model: ir.Model, sizes: Mapping[str, Range]) -> Profile:
    """The smallest, usual and largest shape of every input of the graph that has free sizes, for these by name."""

    def shapes(value: ir.Value) -> tuple[Shape, Shape, Shape]:
        axes = [Range(d, d, d) if isinstance(d, int) else sizes[str(d.value)] for d in value.shape or ()]
        smallest, usual, largest = (tuple(axis[i] for axis in axes) for i in range(3))
        return smallest, usual, largest

    free = [value for value in model.graph.inputs if any(not isinstance(d, int) for d in value.shape or ())]
    return {str(value.name): shapes(value) for value in free}


def one_and_more(model: ir.Model, sizes: Mapping[str, Range], most: int) -> list[Profile]:
    """The profiles of a component without state whose kernels are chosen by timing: where a run can be parted, one for
    a single part, which is what most runs are, and one for up to `most`; otherwise one for all sizes."""
    name = batch_dimension([_names(value) for value in (*model.graph.inputs, *model.graph.outputs)])
    if not name:
        return [profile(model, sizes)]
    single, size = [profile(model, {**sizes, name: Range(1, 1, 1)})], sizes[name]
    if size.largest == 1:
        return single
    largest = min(size.largest, most)
    return [*single, profile(model, {**sizes, name: Range(2, min(max(size.usual, 2), largest), largest)})]


def _names(value: ir.Value) -> list[int | str]:
    return [d if isinstance(d, int) else str(d.value) for d in value.shape or ()]
