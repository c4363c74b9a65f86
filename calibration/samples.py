"""Inputs of a component that are kept in the artefact beside the plan, for a calibration that happens elsewhere.

TensorRT's own calibration (implicit INT8, up to 10.x) goes on while it builds, on the device, where there is no PyTorch
and no calibration set.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact import Artifact
from ..errors import VlmcError
from ..files import read_arrays, write_bytes
from ..records import FileSpec, check_file
from ..runtime.images import open_image
from ..runtime.matching import Matcher
from ..runtime.runner import require_fit
from ..runtime.session import Session
from .plan import Plan, samples_path
from .sets import CalibrationSet

MOST = 16  # questions that are sampled, which bounds the file: 16 tiles of 512×512 pixels are 25 MB
OBSERVERS = ("entropy", "minmax")  # what TensorRT has a calibrator for

Sample = dict[str, NDArray[np.float32]]  # a component's inputs by name, each with a first axis of 1


def keep(session: Session | Matcher, recipe: str, component: str, data: CalibrationSet) -> FileSpec:
    """Writes what the component gets of the set's first pictures; `Plan.samples` is to name it.

    One tile a picture, another place in each, so that all samples have one shape, which TensorRT asks for, and crops
    and the whole picture take turns. A component with another kind of inputs is a VlmcError.
    """
    inputs = session.artifact.manifest.components[component].inputs
    if len(inputs) != 1 or any(isinstance(size, str) for size in inputs[0].shape[1:]):
        raise VlmcError(
            f"The inputs of {component} are no tiles of one size, which TensorRT's own calibration asks for",
            found=", ".join(f"{tensor.name} {tensor.shape}" for tensor in inputs),
            fix="calibrate the recipe int8, whose scales are found here",
        )
    name = inputs[0].name
    pictures = (session.preprocess([open_image(row.image)]).vision[name] for row in data.rows[:MOST])
    tiles = [tiles[index % len(tiles)] for index, tiles in enumerate(pictures)]
    arrays: dict[str, Any] = {name: np.stack(tiles).astype(np.float16)}
    content = BytesIO()
    np.savez(content, **arrays)
    written = content.getvalue()
    spec = FileSpec(hashlib.sha256(written).hexdigest(), len(written))
    write_bytes(samples_path(session.artifact, recipe, component, spec), written)
    return spec


def read(artifact: Artifact, plan: Plan, component: str) -> list[Sample]:
    """The component's samples, checked against the plan."""
    spec = plan.samples[component]
    path = samples_path(artifact, plan.recipe.name, component, spec)
    check_file(path, spec)
    arrays, inputs = read_arrays(path), artifact.manifest.components[component].inputs
    for tensor in inputs:
        require_fit(replace(tensor, dtype="float16"), arrays.get(tensor.name), f"The array {tensor.name} in {path}")
    samples = {tensor.name: arrays[tensor.name].astype(np.float32) for tensor in inputs}
    count = min(len(array) for array in samples.values())
    return [{name: array[row : row + 1] for name, array in samples.items()} for row in range(count)]
