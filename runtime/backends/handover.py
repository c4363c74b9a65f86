"""A quantised graph that waits to be built on its device: recorded like an engine, and run by none."""

from __future__ import annotations

from pathlib import Path

from ...artifact import EngineSpec
from ..runner import Decoder, Runner

TITLE = "Graph to build"


def unavailable() -> str:
    return "it is a graph that has to be built on its device first: `vlmc build` there"


def load_runner(spec: EngineSpec, path: Path, threads: int) -> Runner:
    raise AssertionError(unavailable())


def load_decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> Decoder:
    raise AssertionError(unavailable())
