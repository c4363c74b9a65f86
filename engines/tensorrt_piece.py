"""A network as TensorRT 8.6 to 11 take it → its engine. Where a decoder is built in pieces, each in its own process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import ASKED
from ..errors import VlmcError
from ..files import read_json, write_bytes
from ..profiles.memory import peak_rss_bytes
from ..records import SCHEMA, write_record
from ..runtime import cuda
from ..runtime.tensorrt_engine import ENGINE, logger, new_context, scratch_bytes
from . import builders, child, tensorrt_calibrator, tensorrt_network
from .passes import norms
from .passes.half_precision import STATES
from .tensorrt_network import Parsed
from .tensorrt_profiles import Profile

STRONG = (10, 12)  # from here on precision is in the graph
NO_KERNEL = "Could not find any implementation"  # how TensorRT refuses a region
NETWORK, PROFILES, MADE = "lowered.onnx", "profiles.json", "made.json"
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


@dataclass(frozen=True)
class Made:
    """What there is to know of an engine: its matrix products by precision, the device memory that it needs while it
    runs, its layers, how many layers of norms that the graph spells out were left to FP16, for TensorRT has no kernel
    with them in float32 (whether that is near enough shows when the engine is compared with the golden outputs), and
    the memory of the process that built it."""

    schema: int
    products: dict[str, int]
    scratch_bytes: int
    layers: int
    half_norms: int
    peak_bytes: int


def make(
    folder: Path,
    shapes: Sequence[Profile],
    component: str,
    level: int | None,
    timings: Path,
    calibration: builders.Calibration | None = None,
) -> Made:
    """Writes ENGINE into the folder, of the NETWORK there, which goes once it is read. `level` is TensorRT's
    optimisation level where it is not the usual one; `timings` the file of its timing cache."""
    import tensorrt as trt

    weak = version(str(trt.__version__)) < STRONG
    flags = ("EXPLICIT_BATCH",) if weak else ("EXPLICIT_BATCH", "STRONGLY_TYPED")
    path, cache = folder / NETWORK, _TimingCache(trt, timings)
    parsed = tensorrt_network.parse(trt, path, component, flags)
    for read in (path, path.with_name(f"{NETWORK}.data")):
        read.unlink(missing_ok=True)
    exact = _type_weakly(trt, parsed) if weak else []

    def configure(config: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then names precisions
        if level is not None:
            config.builder_optimization_level = level
        if weak:
            integers = calibration is not None or _quantised(parsed)  # 8.6 refuses INT8 where it finds no scale
            allowed = ["FP16", "PREFER_PRECISION_CONSTRAINTS"] + ["INT8"] * integers
            for flag in allowed:
                config.set_flag(getattr(trt.BuilderFlag, flag))
        if calibration is not None:
            tensorrt_calibrator.use(trt, parsed.builder, config, calibration, cuda.Gpu())
        cache.use(config)

    left = 0
    try:
        engine = tensorrt_network.serialise(parsed, shapes, configure)
    except VlmcError as refusal:
        if not exact or NO_KERNEL not in str(refusal):
            raise
        for layer in exact:
            layer.reset_precision()
            layer.reset_output_type(0)
        parsed.errors.clear()
        left = len(exact)
        engine = tensorrt_network.serialise(parsed, shapes, configure)
    try:
        inspected = _inspected(trt, parsed, engine, weak)
    except VlmcError:  # of six engines of CLIP's text encoder by 8.6 three could not run; those built next could
        engine = tensorrt_network.serialise(parsed, shapes, configure)
        inspected = _inspected(trt, parsed, engine, weak)
    write_bytes(folder / ENGINE, engine)  # in one step: a piece may be taken up by a later build
    cache.keep()
    return Made(SCHEMA, **inspected, half_norms=left, peak_bytes=peak_rss_bytes() or 0)


def version(text: str) -> tuple[int, int]:
    """Major and minor of a TensorRT."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def summed(found: Sequence[Made]) -> dict[str, Any]:
    """`products`, `scratch_bytes`, `layers` and `half_norms` of all pieces: scratch memory is one piece's at a time."""
    products: dict[str, int] = {}
    for one in found:
        for kind, count in one.products.items():
            products[kind] = products.get(kind, 0) + count
    return {
        "products": products,
        "scratch_bytes": max(one.scratch_bytes for one in found),
        "layers": sum(one.layers for one in found),
        "half_norms": sum(one.half_norms for one in found),
    }


def _quantised(parsed: Parsed) -> bool:
    network = parsed.network
    return any(network.get_layer(index).type.name == "QUANTIZE" for index in range(network.num_layers))


def _type_weakly(trt: Any, parsed: Parsed) -> list[Any]:
    """What FP16 must not touch, and what it must: norms stay float32, for squares leave FP16's range; the KV cache is
    FP16, which halves what a step reads. Returns the layers of norms that the graph spells out, which few models do."""
    network, spelt = parsed.network, []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name.endswith(norms.PARTS):
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)
            spelt += [layer] * (norms.SPELT in layer.name)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:
        if tensor.name.startswith(STATES):
            tensor.dtype = trt.float16
    return spelt


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


def main(folder: str, component: str, level: str, timings: str) -> str:
    """`child.run("tensorrt_piece", …)`: `make` of NETWORK and PROFILES in the folder, then MADE, which says that the
    engine is whole. An empty level is the usual one."""
    place = Path(folder)
    known = read_json(place / PROFILES)
    shapes: list[Profile] = [
        {name: (tuple(low), tuple(usual), tuple(high)) for name, (low, usual, high) in profile.items()}
        for profile in known
    ]
    write_record(place / MADE, make(place, shapes, component, int(level) if level else None, Path(timings)))
    return ""


if __name__ == "__main__":
    child.main(main)
