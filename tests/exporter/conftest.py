"""The tiny model in PyTorch, and a way to export it again in milliseconds."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.exporter import graph
from vlmc.exporter.family import Components


@pytest.fixture
def components(tiny_components: Components) -> Components:
    return tiny_components


@pytest.fixture
def traced_before(tiny: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds and gives for the tiny checkpoint what it gave before: the graphs of `tiny`."""
    monkeypatch.setattr(graph, "export_component", lambda name, *_: ir.load(tiny.graph(name)))
