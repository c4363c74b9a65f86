"""TensorRT-RTX engines on GeForce and RTX cards and on GB10, built ahead of time; the last compilation is at loading.

Its API is TensorRT's, and so is the runtime.
"""

from __future__ import annotations

from pathlib import Path

from ...artifact import EngineSpec
from ..cuda import architecture
from ..runner import Decoder, Runner
from . import tensorrt

TITLE = "TensorRT-RTX"


def unavailable() -> str:
    try:
        import tensorrt_rtx  # noqa: F401
    except (ImportError, OSError) as error:
        return f"tensorrt_rtx is not installed ({error}); pip install 'vlm-compile[rtx]'"
    found = architecture()
    return found if isinstance(found, str) else ""


def load_runner(spec: EngineSpec, path: Path, threads: int) -> Runner:
    import tensorrt_rtx

    # Its kernels for a shape are compiled behind the first runs (its documentation, "dynamic shapes"): a graph captured
    # then would keep the general ones.
    return tensorrt.runner(tensorrt_rtx, spec, path, graphs=False)


def load_decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> Decoder:
    import tensorrt_rtx

    return tensorrt.decoder(tensorrt_rtx, spec, path)
