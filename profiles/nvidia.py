"""Which of the machine's NVIDIA GPUs vlmc runs on: CUDA's first, which CUDA_VISIBLE_DEVICES may make another one.

NVML and nvidia-smi know nothing of that variable and would otherwise answer for a neighbour.
"""

from __future__ import annotations

import os
from typing import Any


def name() -> str:
    """Its index, or its UUID where the variable holds one; both as nvidia-smi's --id takes them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def handle(nvml: Any) -> Any:
    """NVML's handle of it; `nvml` is the module pynvml, started."""
    found = name()
    return nvml.nvmlDeviceGetHandleByIndex(int(found)) if found.isdigit() else nvml.nvmlDeviceGetHandleByUUID(found)
