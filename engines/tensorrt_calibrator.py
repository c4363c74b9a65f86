"""TensorRT's own INT8 calibration (implicit quantisation, up to 10.x and gone in 11), fed from the plan's samples.

TensorRT asks for one batch after the other, on the GPU and all in one shape, which a profile of its own names. This is
not Polygraphy's calibrator: the GPU's memory has a home here already (`runtime/cuda.py`), and that one goes on without
the batch where something fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..files import write_bytes
from ..runtime.cuda import Gpu
from .builders import Calibration

BASES = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}


def use(trt: Any, builder: Any, config: Any, calibration: Calibration, gpu: Gpu) -> None:
    """Has the builder find the INT8 scales by this calibration, or take those that its cache holds."""
    profile = builder.create_optimization_profile()
    for name, array in calibration.batches[0].items():
        profile.set_shape(name, array.shape, array.shape, array.shape)
    config.set_calibration_profile(profile)
    config.int8_calibrator = calibrator(trt, calibration, gpu)


def calibrator(trt: Any, calibration: Calibration, gpu: Gpu) -> Any:
    """The object that TensorRT calls while it calibrates."""
    base = getattr(trt, BASES[calibration.observer])

    class Calibrator(base):  # type: ignore[misc, valid-type]  # chosen at run time
        def __init__(self) -> None:
            base.__init__(self)
            self._left = iter(calibration.batches)
            self._addresses = {name: gpu.allocate(array.nbytes) for name, array in calibration.batches[0].items()}

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            batch = next(self._left, None)
            if batch is None:
                return None
            arrays = {name: np.ascontiguousarray(batch[name], np.float32) for name in names}
            for name, array in arrays.items():
                gpu.upload(self._addresses[name], array)
            gpu.wait()
            return [self._addresses[name] for name in names]

        def read_calibration_cache(self) -> bytes | None:
            return calibration.cache.read_bytes() if calibration.cache.is_file() else None

        def write_calibration_cache(self, cache: Any) -> None:
            write_bytes(calibration.cache, bytes(cache))

    return Calibrator()
