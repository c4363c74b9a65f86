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

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from ...artifact import FLOATS, KvContract
from ...calibration import recipes
from ...errors import VlmcError
from ...files import write_json, writing
from ...profiles.device import Device
from ...profiles.memory import available_bytes
from ...records import read_record
from ...runtime import cuda
from ...runtime.backends import tensorrt as backend
from ...runtime.tensorrt_engine import ENGINE
from .. import child, pieces, tensorrt_network, tensorrt_piece
from ..passes import (
    float_outputs,
    float_weights,
    forget,
    half_precision,
    half_tables,
    large_tables,
    lower_bounds,
    norm_weights,
    norms,
    opset17,
    patches_as_matmul,
    rotary_tables,
    token_loop,
    two_segment_attention,
)
from ..tensorrt_piece import STRONG, Made
from ..tensorrt_profiles import Profile, Range, one_and_more, profile
from . import Built, Job, block_bits

PACKAGES = ("tensorrt",)
FLOAT = "fp16"
NATIVE = (10, 15)  # RotaryEmbedding, RMSNormalization and TensorScatter; Attention came with 10.14
INTEGER_WEIGHTS = INT4 = (10, 0)  # weights as int8 constants, and blocks of int4
LEVELS = (8, 6)  # optimisation levels
CONVOLUTIONS = 8  # from so many on a network is convolutional
PROMPTS = (256,)  # prompt lengths that get an optimisation profile, beside the whole capacity
MOST = 8  # tiles or texts at once; more run in parts
BUILDER = 5.5e9  # bytes that a build takes at its peak beside those for its weights (docs/experiments.md), and how many
SPACE = {True: 3.0, False: 7.0}  # times the float32 weights it takes besides: of floats, and of what is quantised
AT_ONCE = 1  # pieces; each takes BUILDER too
LEAST = 1 << 28  # bytes of weights below which a piece is mostly what every build takes


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
    return tensorrt_piece.version(device.tensorrt or "0.0")


def lower(model: ir.Model, job: Job) -> str:
    """The graph as the device's TensorRT takes it, changed in place; returns the form of its KV contract."""
    float_outputs.apply(model)  # attention is fused in float16
    if job.component == "decoder":
        form = "shared"
        if version(job.device) < NATIVE:
            two_segment_attention.apply(model, job.kv)
            form = "append"
        token_loop.apply(model, job.embed())
        large_tables.apply(model)
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
            half_tables.apply(model)
            rotary_tables.apply(model, job.kv.capacity)
    tensorrt_network.fix_dimension(model, "capacity", job.kv.capacity)
    return form


def profiles(model: ir.Model, job: Job) -> list[Profile]:
    """The shapes that an engine is made for: of a decoder a step, then prompts by length, of a piece without free sizes
    none; of another component one of a batch, then several."""
    if job.component != "decoder":
        return one_and_more(model, job.sizes, MOST)
    capacity = job.kv.capacity
    lengths = [length for length in PROMPTS if length < capacity] + [capacity]
    ranges = [Range(1, 1, 1), *(Range(1, length, length) for length in lengths)]
    found = [profile(model, {**job.sizes, "length": sizes}) for sizes in ranges]
    return found if any(found) else []


def optimization_level(model: ir.Model, device: Device) -> int | None:
    """TensorRT's, None for the usual one. At 0 TensorRT takes the first kernels that work and does not look
    for the fastest: 8.6 writes, compiles and times up to 68 for every pointwise layer between two convolutions, and is
    not through with Gemma 3n's tower within ten minutes on an H100, where it takes five this way (docs/experiments.md).
    A transformer's lie in one region."""
    convolutions = sum(node.op_type == "Conv" for node in model.graph)
    return 0 if convolutions >= CONVOLUTIONS and LEVELS <= version(device) < (10, 0) else None


def piece_bytes(size: int, precision: str) -> float:
    """How many of a decoder's `size` bytes of constants a piece may have, so that the memory that is free now is enough
    to build it."""
    space, free = SPACE[precision in FLOATS], available_bytes()
    if free is None or BUILDER + space * size <= free:
        return size
    return max((free - BUILDER) / space, LEAST)


def build(model: ir.Model, job: Job) -> Built:
    import tensorrt as trt

    job = replace(job, device=replace(job.device, tensorrt=str(trt.__version__)))  # the installed one decides
    form, level = lower(model, job), optimization_level(model, job.device)
    most = piece_bytes(pieces.constant_bytes(model), job.precision)
    parts = pieces.cut(model, most) if job.component == "decoder" else [model]
    settings: dict[str, Any] = {
        "version": str(trt.__version__),
        "sm": cuda.architecture(),
        "optimization_level": level,
    }
    others = 0
    if len(parts) == 1:
        with TemporaryDirectory(dir=job.folder) as folder:  # on the disk that has room for the engine
            shapes, place = profiles(model, job), Path(folder)
            _save(model, place)
            forget(model)
            made = tensorrt_piece.make(place, shapes, job.component, level, job.cache, job.calibration)
            settings |= tensorrt_piece.summed([made])
            (place / ENGINE).rename(job.folder / ENGINE)
    else:
        found, others = _in_pieces(parts, job, level)
        settings |= found
    kv = job.kv
    contract = KvContract(form, kv.layers, kv.kv_heads, kv.head_dim, kv.capacity, "float16") if form else None
    return Built(ENGINE, settings, contract, others)


def _in_pieces(parts: Sequence[ir.Model], job: Job, level: int | None) -> tuple[dict[str, Any], int]:
    """The engines of all parts in the job's one file; what there is to know of them, and the memory that building them
    took. A piece that fails is built once more when the others are done: memory may have been short. What a build that
    ended early has made of the same parts is there still, beside the device's engines, and is not made again."""
    folder = job.cache.with_name(f"pieces-{job.component}-{job.precision}")
    places = [folder / _digest(part, job, level) for part in parts]
    if folder.is_symlink():  # not ours, and what it points to is not to be cleared away
        folder.unlink()
    for old in folder.iterdir() if folder.is_dir() else ():
        if old not in places:  # another cut's, or other weights'
            shutil.rmtree(old, ignore_errors=True)

    def make(index: int) -> Made:
        place = places[index]
        if (kept := _kept(place)) is not None:
            return kept
        place.mkdir(parents=True, exist_ok=True)
        _save(parts[index], place)
        write_json(place / tensorrt_piece.PROFILES, profiles(parts[index], job))
        which = f"piece {index + 1} of {len(parts)}"
        child.say(which)
        given = (str(place), job.component, "" if level is None else str(level), str(job.cache))
        child.run("tensorrt_piece", f"{which.capitalize()} of the {job.component}", *given)
        return read_record(Made, place / tensorrt_piece.MADE)

    def first(index: int) -> Made | None:
        try:
            return make(index)
        except VlmcError:
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        tried = list(pool.map(first, range(len(parts))))
    found = [make(index) if one is None else one for index, one in enumerate(tried)]
    sizes = [(place / ENGINE).stat().st_size for place in places]
    with writing(job.folder), (job.folder / ENGINE).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(sizes))  # a disk that is full says so before the first piece goes
        for place in places:
            with (place / ENGINE).open("rb") as engine:
                shutil.copyfileobj(engine, file)
            (place / ENGINE).unlink()
    shutil.rmtree(folder)
    largest = sorted(one.peak_bytes for one in found)[-AT_ONCE:]
    return tensorrt_piece.summed(found) | {"pieces": sizes}, sum(largest)


def _digest(part: ir.Model, job: Job, level: int | None) -> str:
    """Names the engine of this part: of all that goes into the decoder's, and of what lies in the part."""
    names = [str(one.name) for one in (*part.graph, *part.graph.inputs, *part.graph.outputs)]
    return hashlib.sha256(json.dumps([job.key, cuda.architecture(), level, names]).encode()).hexdigest()[:16]


def _kept(place: Path) -> Made | None:
    """What an earlier build says of the engine that it left there, where it is whole."""
    try:
        return read_record(Made, place / tensorrt_piece.MADE) if (place / ENGINE).is_file() else None
    except VlmcError:
        return None


def _save(model: ir.Model, folder: Path) -> None:
    network = tensorrt_piece.NETWORK
    ir.save(model, folder / network, external_data=f"{network}.data")


def products(path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """As the builder read them when it had the engine in hand."""
    counts: dict[str, int] = settings["products"]
    return counts
