"""The tiny model in PyTorch, as transformers has it and in parts, and a way to export it again in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.exporter import graph
from vlmc.exporter.checkpoint import load_components
from vlmc.exporter.family import Components


@pytest.fixture(scope="session")
def components(tiny: Artifact) -> Components:
    """The PyTorch components that `tiny` was exported from."""
    return load_components(tiny)


@pytest.fixture
def traced_before(tiny: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds and gives for the tiny checkpoint what it gave before: the graphs of `tiny`."""
    monkeypatch.setattr(graph, "export_component", lambda name, *_: ir.load(tiny.graph(name)))


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Any:
    """transformers' own whole model, with its own attention."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
