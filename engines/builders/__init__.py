"""One file a builder, found by its name: it lowers a canonical graph for one backend and writes the engine.

Each module has `PACKAGES` (distributions whose versions an engine depends on), `unavailable() -> str` (empty where it
can build here), `refuses(component) -> str` (empty where it offers the component), `build(model, kv, folder) -> Built`,
and `products(path, settings) -> dict`, the matrix products by precision as the backend really runs them.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ...artifact import KvContract

MODEL = "model.onnx"  # an engine that is a graph has this name in its folder


@dataclass(frozen=True)
class Built:
    """What a builder wrote: the engine's file in the folder, how to start it, and how it wants its KV cache."""

    file: str
    settings: dict[str, Any] = field(default_factory=dict)
    kv: KvContract | None = None


def names() -> list[str]:
    """Every builder there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The builder's module."""
    return importlib.import_module(f"{__name__}.{name}")
