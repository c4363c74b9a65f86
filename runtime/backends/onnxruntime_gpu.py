"""ONNX Runtime on an NVIDIA GPU, by its CUDA provider (the wheel onnxruntime-gpu).

The KV cache stays on the GPU, bound once; a step's embedding goes there and its logits come back, for the next token is
chosen on the host: that is what ONNX Runtime offers, and what `tensorrt` is compared with.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from ...artifact import EngineSpec
from ...errors import VlmcError
from ..runner import Decoder, Runner
from .onnxruntime import OnnxDecoder, OnnxRunner, session

TITLE = "ONNX Runtime CUDA"
PROVIDER = "CUDAExecutionProvider"
DRIVER = "libcuda.so.1"


def unavailable() -> str:
    try:
        import onnxruntime as ort
    except ImportError as error:
        return f"onnxruntime-gpu is not installed ({error}); pip install onnxruntime-gpu"
    if PROVIDER not in ort.get_available_providers():
        return f"this onnxruntime {ort.__version__} has no CUDA provider; install onnxruntime-gpu in its place"
    try:  # not through cuda-bindings: the interpreter that has onnxruntime-gpu need not have them
        return "" if ctypes.CDLL(DRIVER).cuInit(0) == 0 else "the NVIDIA driver shows no usable GPU"
    except OSError:
        return "no NVIDIA driver is installed"


def load_runner(spec: EngineSpec, path: Path, threads: int) -> Runner:
    return OnnxRunner(started(path, threads))


def load_decoder(spec: EngineSpec, path: Path, embed: Runner, threads: int) -> Decoder:
    assert spec.kv is not None
    return OnnxDecoder(started(path, threads), spec.kv, embed, "cuda")


def started(path: Path, threads: int, provider: str = PROVIDER) -> Any:
    """An InferenceSession on that provider. Where libraries of CUDA are missing, ONNX Runtime would go on with the
    CPU; here that is a VlmcError."""
    import onnxruntime as ort

    if provider == PROVIDER:
        ort.preload_dlls()  # CUDA's and cuDNN's from pip's packages, where they are installed beside it
    made = session(path, {"providers": [provider]}, threads)
    if (running := made.get_providers())[0] != provider:
        raise VlmcError(
            f"ONNX Runtime {ort.__version__} cannot run {path} on the GPU",
            found=", ".join(running),
            expected=provider,
            fix="put the libraries of CUDA and cuDNN that its version was built with on LD_LIBRARY_PATH",
        )
    return made
