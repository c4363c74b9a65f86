"""Engines for TensorRT 8.6 to 11, built on the GPU that will run them.

One canonical graph, lowered as far as the device's TensorRT needs it:
- before 10.15 attention, norms and rotary are spelt out in opset 17 (21 where INT4 blocks are taken, from 10.0 on), and
  the decoder attends over two segments;
- up to 10.11 the graph stays float32 and builder flags allow FP16 and INT8 (weak typing); from 10.12 on precision is in
  the graph (strong typing).
INT8 is explicit Q/DQ in both; with weak typing TensorRT can also find the scales itself (`tensorrt_calibrator.py`). The
timing cache lies in the device's folder of the artefact, for all its engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from ...artifact import ASKED, FLOATS, KvContract
from ...calibration import recipes
from ...errors import VlmcError
from ...files import write_bytes
from ...profiles.device import Device
from ...runtime import cuda
from ...runtime.backends import tensorrt as backend
from ...runtime.tensorrt_engine import ENGINE, logger, new_context, scratch_bytes
from .. import tensorrt_calibrator, tensorrt_network
from ..passes import (
    float_outputs,
    float_weights,
    forget,
    half_precision,
    lower_bounds,
    norm_weights,
    norms,
    opset17,
    patches_as_matmul,
    rotary_tables,
    token_loop,
    two_segment_attention,
)
from ..passes.half_precision import STATES
from ..tensorrt_network import Parsed
from ..tensorrt_profiles import Profile, Range, one_and_more, profile
from . import Built, Job, block_bits

PACKAGES = ("tensorrt",)
FLOAT = "fp16"
NATIVE = (10, 15)  # RotaryEmbedding, RMSNormalization and TensorScatter; Attention came with 10.14
STRONG = (10, 12)
INTEGER_WEIGHTS = INT4 = (10, 0)  # weights as int8 constants, and blocks of int4
LEVELS = (8, 6)  # optimisation levels
CONVOLUTIONS = 8  # from so many on a network is convolutional
PROMPTS = (256,)  # prompt lengths that get an optimisation profile, beside the whole capacity
MOST = 8  # tiles or texts at once; more run in parts
PRODUCTS = (
    "CaskConvolution",
    "Convolution",
    "CaskGemm",
    "MatrixMultiply",
    "gemm",
    "FullyConnected",
    "CaskGemmConvolution",
)
DATATYPES = {"int8": "int8", "fp16": "float16", "half": "float16"}


def unavailable() -> str:
    return backend.unavailable()


def refuses(component: str, precision: str, device: Device) -> str:
    if component == "embed_tokens":
        return "a look-up needs no engine; NumPy does it"
    bits = block_bits(precision)
    need = INT4 if 4 in bits else NATIVE  # blocks of int8 beside those of int4 become floats where they have to
    if bits and version(device) < need:
        return f"its weights in blocks need TensorRT {need[0]}.{need[1]}, and {device.title} has {device.tensorrt}"
    implicit = () if precision in FLOATS else recipes.load(precision).implicit
    if implicit and component not in implicit:
        return "TensorRT's own calibration would need caches that earlier steps have filled"
    if implicit and version(device) >= STRONG:
        return f"TensorRT's own calibration needs weak typing, up to 10.11, and {device.title} has {device.tensorrt}"
    return ""


def version(device: Device) -> tuple[int, int]:
    """Major and minor of the device's TensorRT."""
    major, minor = (device.tensorrt or "0.0").split(".")[:2]
    return int(major), int(minor)


def lower(model: ir.Model, job: Job) -> str:
    """The graph as the device's TensorRT takes it, changed in place; returns the form of its KV contract."""
    float_outputs.apply(model)  # attention is fused in float16
    if job.component == "decoder":
        form = "shared"
        if version(job.device) < NATIVE:
            two_segment_attention.apply(model, job.kv)
            form = "append"
        token_loop.apply(model, job.embed())
    else:
        form = ""
        patches_as_matmul.apply(model)
    if version(job.device) < NATIVE:
        float_weights.without_blocks(model)
        opset17.apply(model, int4=version(job.device) >= INT4)
    if version(job.device) < INTEGER_WEIGHTS:
        float_weights.apply(model)
    if version(job.device) >= STRONG:
        half_precision.apply(model)
    else:
        norms.apply(model)
        if job.precision in FLOATS:
            lower_bounds.apply(model)
        else:
            norm_weights.apply(model)
        if job.component == "decoder":
            rotary_tables.apply(model, job.kv.capacity)
    tensorrt_network.fix_dimension(model, "capacity", job.kv.capacity)
    return form


def profiles(model: ir.Model, job: Job) -> list[Profile]:
    """The shapes that an engine is made for: of a decoder a step, then prompts by length; of another component one of
    a batch, then several."""
    if job.component != "decoder":
        return one_and_more(model, job.sizes, MOST)
    capacity = job.kv.capacity
    lengths = [length for length in PROMPTS if length < capacity] + [capacity]
    ranges = [Range(1, 1, 1), *(Range(1, length, length) for length in lengths)]
    return [profile(model, {**job.sizes, "length": sizes}) for sizes in ranges]


def quick(model: ir.Model, device: Device) -> bool:
    """Whether TensorRT shall take the first kernels that work and not look for the fastest: 8.6 writes, compiles and
    times up to 68 for every pointwise layer between two convolutions, and is not through with Gemma 3n's tower within
    ten minutes on an H100, where it takes five this way (docs/experiments.md). A transformer's lie in one region."""
    convolutions = sum(node.op_type == "Conv" for node in model.graph)
    return convolutions >= CONVOLUTIONS and LEVELS <= version(device) < (10, 0)


def build(model: ir.Model, job: Job) -> Built:
    import tensorrt as trt

    job = replace(job, device=replace(job.device, tensorrt=str(trt.__version__)))  # the installed one decides
    form, weak = lower(model, job), version(job.device) < STRONG
    shapes, level = profiles(model, job), 0 if quick(model, job.device) else None
    cache = _TimingCache(trt, job.cache)
    with TemporaryDirectory(dir=job.folder) as folder:  # on the disk that has room for the engine
        path = Path(folder) / "lowered.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        forget(model)
        flags = ("EXPLICIT_BATCH",) if weak else ("EXPLICIT_BATCH", "STRONGLY_TYPED")
        parsed = tensorrt_network.parse(trt, path, job.component, flags)
    if weak:
        _type_weakly(trt, parsed)

    def configure(config: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then names precisions
        if level is not None:
            config.builder_optimization_level = level
        if weak:
            flags = ["FP16", "PREFER_PRECISION_CONSTRAINTS"] + ["INT8"] * (job.precision not in FLOATS)
            for flag in flags:
                config.set_flag(getattr(trt.BuilderFlag, flag))
        if job.calibration is not None:
            tensorrt_calibrator.use(trt, parsed.builder, config, job.calibration, cuda.Gpu())
        cache.use(config)

    engine = tensorrt_network.serialise(parsed, shapes, configure)
    try:
        inspected = _inspected(trt, parsed, engine, weak)
    except VlmcError:  # of six engines of CLIP's text encoder by 8.6 three could not run; those built next could
        engine = tensorrt_network.serialise(parsed, shapes, configure)
        inspected = _inspected(trt, parsed, engine, weak)
    (job.folder / ENGINE).write_bytes(engine)
    cache.keep()
    settings = {"version": str(trt.__version__), "sm": cuda.architecture(), "optimization_level": level} | inspected
    kv = job.kv
    contract = KvContract(form, kv.layers, kv.kv_heads, kv.head_dim, kv.capacity, "float16") if form else None
    return Built(ENGINE, settings, contract)


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """As the builder read them when it had the engine in hand."""
    counts: dict[str, int] = settings["products"]
    return counts


def _type_weakly(trt: Any, parsed: Parsed) -> None:
    """What FP16 must not touch, and what it must: norms stay float32, for squares leave FP16's range; the KV cache is
    FP16, which halves what a step reads."""
    network = parsed.network
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name.endswith(norms.PARTS):
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:
        if tensor.name.startswith(STATES):
            tensor.dtype = trt.float16


class _TimingCache:
    """What kernels were timed before, kept in the artefact for every engine of the device."""

    def __init__(self, trt: Any, path: Path) -> None:
        self._trt, self._path = trt, path
        self._cache: Any = None

    def use(self, config: Any) -> None:
        known = self._path.read_bytes() if self._path.is_file() else b""
        self._cache = config.create_timing_cache(known)
        if self._cache is None or not config.set_timing_cache(self._cache, ignore_mismatch=False):
            self._cache = config.create_timing_cache(b"")  # another GPU's, or another version's
            config.set_timing_cache(self._cache, ignore_mismatch=False)

    def keep(self) -> None:
        assert self._cache is not None
        write_bytes(self._path, bytes(self._cache.serialize()))


def _inspected(trt: Any, parsed: Parsed, engine: Any, weak: bool) -> dict[str, Any]:
    """`products`, from the inspector where it shows layers; a region that Myelin fused shows none, so there what was
    asked for is counted and the key says so. `scratch_bytes`: device memory that the engine needs while it runs."""
    loaded = trt.Runtime(logger(trt)).deserialize_cuda_engine(engine)
    new_context(trt, loaded)  # an engine that cannot run is no engine
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text, strict=False).get("Layers", [])  # its strings may hold raw control characters
    return {
        "products": executed(layers, tensorrt_network.products(parsed), weak),
        "scratch_bytes": scratch_bytes(loaded),
        "layers": len(layers),
    }


def executed(layers: Sequence[Any], asked: Mapping[str, int], weak: bool) -> dict[str, int]:
    """Matrix products by precision from the inspector's layers, one dictionary each, and from what was asked for;
    a `weak` network's floats may be either width."""
    if any("ForeignNode" in str(layer) for layer in layers):
        floats = "float16 or float32" if weak else "float32"
        return {kind.replace("float32", floats) + ASKED: count for kind, count in asked.items()}
    counts: dict[str, int] = {}
    for layer in layers:
        if isinstance(layer, dict) and layer.get("LayerType") in PRODUCTS:
            datatype = str([tensor.get("Format/Datatype") for tensor in layer.get("Inputs", [])][:1])
            kind = next((name for word, name in DATATYPES.items() if word in datatype.lower()), "float32")
            counts[kind] = counts.get(kind, 0) + 1
    return counts
