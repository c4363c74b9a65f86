"""NVML: the energy counter of NVIDIA GPUs (Volta on), in millijoules since the driver was loaded.

Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption. The counter is refreshed every 20 to 100 ms, so one
short run is uncertain by that much and the mean of many is not. On a Jetson NVML starts and then answers NOT_SUPPORTED.
"""

from __future__ import annotations

from typing import Any

from .. import nvidia
from . import Where

COUNTS = "the GPU"


def probe(where: Where) -> str:
    """ "" where the GPU has the counter."""
    try:
        Counter(where).close()
    except ImportError:
        return "pynvml is not installed (`pip install nvidia-ml-py`)"
    except OSError as error:
        return str(error)
    return ""


def open_meter(where: Where) -> Counter:
    return Counter(where)


class Counter:
    """Energy of the GPU that vlmc runs on."""

    def __init__(self, where: Where) -> None:
        del where
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = nvidia.handle(pynvml)
        except pynvml.NVMLError as error:
            raise OSError(f"NVML does not start: {error}") from None
        self._start = self._read()

    def joules(self) -> float:
        return (self._read() - self._start) / 1e3

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _read(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu))
        except self._nvml.NVMLError_NotSupported:
            raise OSError("NVML has no energy counter for this GPU (on a Jetson the source is hwmon)") from None
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML does not answer: {error}") from None
