"""Engines for GB10 and RTX cards with TensorRT-RTX, ahead of time on any machine: no GPU takes part.

The canonical graph goes in almost as it is: in float16, with a KV cache of fixed length that the engine updates in
place, and with the look-up and the choice of tokens in the decoder. What is written is for one compute capability; its
kernels' last compilation happens on the device, when the engine is first loaded.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from ...artifact import KvContract
from ...errors import VlmcError, reason
from ...profiles.device import Device
from ...runtime.tensorrt_engine import ENGINE
from .. import tensorrt_network
from ..passes import float_outputs, forget, half_precision, token_loop
from ..tensorrt_profiles import Profile, Range, profile
from . import MODEL, Built, Job

PACKAGES = ("tensorrt-rtx-cu13",)
FLOAT = "fp16"


def unavailable() -> str:
    try:
        import tensorrt_rtx  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return f"tensorrt_rtx cannot be imported ({reason(error)}); `pip install vlm-compile[rtx]`"
    return ""


def refuses(component: str, precision: str, device: Device) -> str:
    import tensorrt_rtx as trt

    known = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if str(device.sm) in known:
        return ""
    has = f"is SM {device.sm}" if device.sm else "has no GPU"
    return f"TensorRT-RTX builds for SM {', '.join(sorted(known, key=int))}, and {device.title} {has}"


def build(model: ir.Model, job: Job) -> Built:
    import tensorrt_rtx as trt

    if refusal := refuses(job.component, job.precision, job.device):
        raise VlmcError(refusal, fix="`vlmc devices` says which backends a device has")
    lower(model, job)
    with TemporaryDirectory(dir=job.folder) as folder:  # on the disk that has room for the engine
        path = Path(folder) / MODEL
        ir.save(model, path, external_data=f"{MODEL}.data")
        forget(model)
        parsed = tensorrt_network.parse(trt, path, job.component)

    def configure(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job.device.sm}"), 0)
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # what allocates while it runs may not be captured

    engine = tensorrt_network.serialise(parsed, profiles(model, job), configure)
    (job.folder / ENGINE).write_bytes(engine)
    products = tensorrt_network.products(parsed)
    settings = {"version": str(trt.__version__), "sm": job.device.sm, "products": products}
    kv, cached = job.kv, job.component == "decoder"
    contract = KvContract("shared", kv.layers, kv.kv_heads, kv.head_dim, kv.capacity, "float16") if cached else None
    return Built(ENGINE, settings, contract)


def lower(model: ir.Model, job: Job) -> None:
    """The graph as TensorRT-RTX takes it, changed in place."""
    float_outputs.apply(model)  # attention is fused in float16
    if job.component == "decoder":
        token_loop.apply(model, job.embed())
    half_precision.apply(model)
    tensorrt_network.fix_dimension(model, "capacity", job.kv.capacity)


def profiles(model: ir.Model, job: Job) -> list[Profile]:
    """The shapes that the lowered graph is compiled for, in one profile: another one would pack the weights once more
    (docs/experiments.md). Of a decoder steps and prompts, best for steps."""
    steps = {"length": Range(1, 1, job.kv.capacity)} if job.component == "decoder" else {}
    return [profile(model, {**job.sizes, **steps})]


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """As counted in the strongly typed network when it was built: without its GPU no engine can be inspected."""
    counts: dict[str, int] = settings["products"]
    return counts
