"""The goldens of an artefact, read and checked: real pictures and questions with what PyTorch made of them
(`exporter/golden.py` and `exporter/matching.py` write them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact import Artifact, TensorSpec
from ..errors import VlmcError, mended_by
from ..files import read_arrays, read_json
from ..records import REMAKE, from_json
from ..runtime.runner import require_fit

Array = NDArray[Any]


@dataclass(frozen=True)
class _Matched:
    image: str
    prompt: str


@dataclass(frozen=True)
class _Answered(_Matched):
    tokens: tuple[int, ...]


def cases(artifact: Artifact) -> list[dict[str, Any]]:
    """The cases of golden.json, at least one, each with its picture and prompt and, where the model answers, tokens."""
    path = artifact.path_of("golden/golden.json")
    with mended_by(REMAKE):
        found = read_json(path)
        rows: Any = found.get("cases") if isinstance(found, dict) else None
        if not isinstance(rows, list) or not rows:
            raise VlmcError(f"{path} holds no golden cases")
        for index, case in enumerate(rows):
            from_json(_Matched if artifact.manifest.matching else _Answered, case, f"{path.name}.cases[{index}]")
    return rows


class Arrays(dict[str, Array]):
    """The arrays of golden.npz by their names; to ask for one that is not there is a VlmcError."""

    def __missing__(self, name: str) -> Array:
        raise VlmcError(f"golden/golden.npz lacks the array {name!r}", fix=REMAKE)


def arrays(artifact: Artifact) -> Arrays:
    """The arrays of golden.npz, finite, and what a component takes or gives of the type and shape that it has there."""
    with mended_by(REMAKE):
        found = Arrays(read_arrays(artifact.path_of("golden/golden.npz")))
        specs = artifact.manifest.components.values()
        tensors = {tensor.name: tensor for spec in specs for tensor in (*spec.inputs, *spec.outputs)}
        vocabulary = tensors["logits"].shape[-1] if "logits" in tensors else 0
        tensors["prefill_logits"] = TensorSpec("prefill_logits", "float32", (vocabulary,))
        tensors["step_logits"] = TensorSpec("step_logits", "float32", ("steps", vocabulary))
        tensors["step_tokens"] = TensorSpec("step_tokens", "int64", ("steps",))
        tensors["cosines"] = TensorSpec("cosines", "float32", ("pictures", "texts"))
        for name, array in found.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise VlmcError(f"The golden array {name} holds NaN or infinity")
            ended = "step_" in name and not array.size  # with the first token
            if (tensor := tensors.get(name.partition(".")[2] or name)) and not ended:
                alone = tensor.name == "input_ids" and array.ndim == 1  # kept without their first axis
                require_fit(tensor, array[None] if alone else array, f"The golden array {name}")
    return found
