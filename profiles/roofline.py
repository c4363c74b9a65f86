"""How far a component is from what the machine allows: its bytes over the bandwidth, its operations over the peak.

Source: Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785. No run can be faster than the longer of the
two times; the share says how much of that limit a measured run reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..artifact import parts_of


@dataclass(frozen=True)
class Phase:
    """What is timed as `part`: the component, and the names of its counts in BuildReport.work."""

    component: str
    flops: str
    bytes: tuple[str, ...]
    part: str


PHASES = {
    "vision_encoder": Phase("vision_encoder", "flops", ("weight_bytes", "io_bytes"), "vision"),
    "text_encoder": Phase("text_encoder", "flops", ("weight_bytes", "io_bytes"), "text"),
    "decoder_prefill": Phase("decoder", "prefill_flops", ("weight_bytes",), "prefill"),
    "decoder_step": Phase("decoder", "decode_flops", ("weight_bytes", "decode_kv_bytes"), "decode_per_token"),
}


def limit(work: Mapping[str, float], phase: Phase, precision: str, limits: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"limit_ms", "bound", "in_cache", "flops", "bytes"} of one phase, or None where its work was not counted.

    Operations (a multiply-add being two) of quantised engines may run at the integer rate: those counted as
    "int8_" + phase.flops, or all of them where that is not counted, for a limit must not be one that can be beaten.
    What the largest cache can keep from run to run is read from there, the rest from memory. An unknown rate bounds
    nothing.
    """
    if phase.flops not in work or any(name not in work for name in phase.bytes):
        return None
    flops, moved = work[phase.flops], sum(work[name] for name in phase.bytes)
    integer = 0.0 if precision in _FLOAT_RATE else work.get(f"int8_{phase.flops}", flops)
    compute = _milliseconds(integer, limits.get("int8_gop_per_s")) + _milliseconds(
        flops - integer, limits.get(_FLOAT_RATE.get(precision) or _narrowest_float(limits))
    )
    known = isinstance(limits.get("cached_read_gb_per_s"), float)
    kept = min(moved, limits.get("cache_bytes", 0)) if known else 0.0
    memory = _milliseconds(kept, limits.get("cached_read_gb_per_s"))
    memory += _milliseconds(moved - kept, limits.get("read_gb_per_s"))
    if not max(compute, memory):
        return None
    bound = "compute" if compute > memory else "memory"
    line = {"limit_ms": max(compute, memory), "bound": bound, "flops": flops, "bytes": moved}
    return line | {"in_cache": known and kept == moved}


def table(
    works: Mapping[str, Mapping[str, float]],
    engines: Mapping[str, str],
    limits: Mapping[str, Any],
    latency_ms: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, Any]]:
    """The roofline of each phase: `limit`, "measured_ms" (median) and "share" (limit over measured, 1 being the limit).

    works: BuildReport.work by component; engines: BACKEND-PRECISION by component; latency_ms: statistics by part.
    """
    found = {}
    for name, phase in PHASES.items():
        precision = parts_of(engines.get(phase.component, ""))[1]
        line = limit(works.get(phase.component, {}), phase, precision, limits)
        if line is not None and phase.part in latency_ms:
            measured = latency_ms[phase.part]["median"]
            found[name] = line | {"measured_ms": measured, "share": line["limit_ms"] / measured}
    return found


_FLOAT_RATE = {
    "fp32": "float32_gflop_per_s",
    "fp16": "float16_gflop_per_s",
}


def _narrowest_float(limits: Mapping[str, Any]) -> str:
    """What a recipe leaves float runs in the narrowest width that the machine has a rate for."""
    half = "float16_gflop_per_s"
    return half if isinstance(limits.get(half), int | float) else "float32_gflop_per_s"


def _milliseconds(amount: float, giga_per_second: Any) -> float:
    """The time that `amount` takes at the rate; 0 where the rate is not a number."""
    return amount / giga_per_second / 1e6 if isinstance(giga_per_second, int | float) else 0.0
