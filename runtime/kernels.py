"""The two GPU kernels of the decode loop (kernels.cu), shipped as PTX.

`python -m vlmc.runtime.kernels` makes kernels.ptx again after a change; it needs `pip install nvidia-cuda-nvrtc-cu12`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("kernels.cu")
PTX = Path(__file__).with_name("kernels.ptx")
PTX_VERSION = "7.0"  # CUDA 11.0: every driver since takes it, JetPack 5's too
ARCHITECTURE = "compute_70"  # the oldest GPU of a device file is Xavier NX's, 7.2


def source_hash() -> str:
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def compile_source() -> str:
    """kernels.cu as PTX, which opens with its source's sha256."""
    from cuda.bindings import nvrtc

    def checked(result: tuple[Any, ...]) -> Any:
        assert int(result[0]) == 0, result[0]
        return result[1] if len(result) > 1 else None

    program = checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"kernels.cu", 0, [], []))
    checked(nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={ARCHITECTURE}".encode()]))
    text = b" " * checked(nvrtc.nvrtcGetPTXSize(program))
    checked(nvrtc.nvrtcGetPTX(program, text))
    lines = text.rstrip(b"\0").decode()
    return f"// sha256 of kernels.cu: {source_hash()}\n" + re.sub(
        r"^\.version .*$", f".version {PTX_VERSION}", lines, flags=re.MULTILINE
    )


if __name__ == "__main__":
    PTX.write_text(compile_source(), encoding="utf-8")
