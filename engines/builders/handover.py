"""For devices whose TensorRT is not on this machine: the graph lowered and quantised for it, to be built on the device.

`vlmc build` there starts from the artefact's own graphs and plan and needs none of this; it is for who builds with
trtexec, and shows here already whether everything can be lowered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...profiles.device import Device
from . import MODEL, Built, Job, tensorrt

PACKAGES = ()
FLOAT = tensorrt.FLOAT


def unavailable() -> str:
    return ""


def refuses(component: str, precision: str, device: Device) -> str:
    return tensorrt.refuses(component, precision, device)


def build(model: ir.Model, job: Job) -> Built:
    tensorrt.lower(model, job)
    ir.save(model, job.folder / MODEL, external_data=f"{MODEL}.data")
    return Built(MODEL)


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Nothing runs here, so nothing is counted."""
    return {}
