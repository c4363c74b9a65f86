"""One file a builder, found by its name: it lowers a canonical graph for one backend and writes the engine.

Each module has
- `PACKAGES`: distributions whose versions an engine depends on, those of them that are installed;
- `FLOAT`: the name of its float precision, `fp32` or `fp16`, which a recipe leaves what it does not quantise;
- `unavailable() -> str`: why it cannot build here, empty where it can;
- `refuses(component, precision, device) -> str`: why it does not offer that, empty where it does;
- `build(model, job) -> Built`: lowers the canonical graph, which has the recipe's Q/DQ, and writes the engine;
- `products(path, settings) -> dict`: the matrix products by precision as the backend really runs them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...artifact import FLOATS, KvContract, KvSpec
from ...calibration import recipes
from ...profiles.device import Device
from ..tensorrt_profiles import Range

MODEL = "model.onnx"  # an engine that is a graph has this name in its folder


@dataclass(frozen=True)
class Calibration:
    """What a builder that finds INT8 scales itself finds them from: `observer` is `entropy` or `minmax`, a batch the
    component's inputs by name, all batches of one shape; `cache` is the file where the scales are kept."""

    observer: str
    batches: Sequence[Mapping[str, NDArray[np.float32]]]
    cache: Path


@dataclass(frozen=True)
class Job:
    """What is to be built, beside the graph: `folder` is where the engine goes; `embed()` gives the canonical graph of
    embed_tokens, for decoders that look up the next token themselves; `sizes` has the range of each of its free sizes;
    `cache` is a file that all engines of the device share, for what a builder finds out by timing, and `key` the hash
    of what goes into this one, for what is kept beside it until the engine is whole; `calibration` where the recipe
    leaves the scales to the builder."""

    component: str
    precision: str
    device: Device
    kv: KvSpec
    folder: Path
    embed: Callable[[], ir.Model]
    sizes: Mapping[str, Range]
    cache: Path
    key: str = ""
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Built:
    """What a builder wrote: the engine's file in the folder, what there is to know of it (`EngineSpec.settings`), how
    it wants its KV cache, and the memory that processes of the builder's own took, at most."""

    file: str
    settings: dict[str, Any] = field(default_factory=dict)
    kv: KvContract | None = None
    others_bytes: int = 0


def block_bits(precision: str) -> frozenset[int]:
    """Bits of the weights that it keeps in blocks; of a float precision there are none."""
    return frozenset() if precision in FLOATS else recipes.load(precision).block_bits


def names() -> list[str]:
    """Every builder there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The builder's module."""
    return importlib.import_module(f"{__name__}.{name}")
