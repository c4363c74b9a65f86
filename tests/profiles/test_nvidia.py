"""The GPU that is measured is the one that CUDA shows first, whatever its number is for NVML."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vlmc.profiles import nvidia

NVML: Any = SimpleNamespace(
    nvmlDeviceGetHandleByIndex=lambda index: ("index", index),
    nvmlDeviceGetHandleByUUID=lambda uuid: ("uuid", uuid),
)


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        (None, ("index", 0)),
        ("", ("index", 0)),
        ("2", ("index", 2)),
        ("3,1", ("index", 3)),
        ("GPU-1f2e,0", ("uuid", "GPU-1f2e")),
    ],
)
def test_cudas_first_gpu_is_measured(visible: str | None, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia.handle(NVML) == wanted
