"""OpenVINO on x86 and Arm CPUs; wins INT8 vision on some of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...artifact import EngineSpec
from ...errors import VlmcError
from ..runner import Array, Decoder, Runner
from . import processors

TITLE = "OpenVINO"


def unavailable() -> str:
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        return f"openvino is not installed ({error}); pip install openvino"
    return ""


def load_runner(spec: EngineSpec, path: Path, threads: int) -> OpenvinoRunner:
    return OpenvinoRunner(compile_model(path, threads))


def load_decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> Decoder:
    raise VlmcError("The OpenVINO backend has no decoder", fix="build the decoder for onnxruntime")


def compile_model(path: Path, threads: int = 0) -> Any:
    """The model compiled for this CPU. Float32 stays float32: what is measured is what was asked for. Nothing is taken
    from the engine's record, where a setting could name a folder to write to."""
    import openvino

    config = {
        "INFERENCE_NUM_THREADS": threads or processors(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        # Without pinning medians were 3-7 % lower in two runs and within the noise since (docs/experiments.md).
        "ENABLE_CPU_PINNING": False,
    }
    try:
        return openvino.Core().compile_model(str(path), "CPU", config)
    except RuntimeError as error:
        raise VlmcError(
            f"OpenVINO {openvino.__version__} cannot compile {path}",
            found=str(error).strip().splitlines()[-1][:300],
            fix="build the engine again with this version of OpenVINO",
        ) from None


class OpenvinoRunner:
    """A component without state."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._outputs = [output.get_any_name() for output in compiled.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = self._request.infer(dict(inputs))
        return {name: results[index] for index, name in enumerate(self._outputs)}
