"""How far a component is from what the machine allows: its bytes over the bandwidth, its operations over the peak.

Source: Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785. No run can be faster than the longer of the
two times; the share says how much of that limit a measured run reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The phases that are timed, with the component and the prefix of its counts in BuildReport.work.
PHASES = {
    "vision_encoder": ("vision_encoder", "", "vision"),
    "decoder_prefill": ("decoder", "prefill_", "prefill"),
    "decoder_step": ("decoder", "decode_", "decode_per_token"),
}


def limit(work: Mapping[str, float], prefix: str, precision: str, limits: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"limit_ms", "bound", "in_cache", "flops", "bytes"} of one phase, or None where its work was not counted.

    `flops` (a multiply-add being two) and `bytes` are `work[prefix + ...]`. Operations of quantised engines may run at
    the integer rate: those counted in `int8_flops`, or all of them where that is not counted, for a limit must not be
    one that can be beaten. Bytes that fit half of the largest cache are read from there, run after run. A rate that
    is not known bounds nothing.
    """
    flops, moved = work.get(f"{prefix}flops"), work.get(f"{prefix}bytes")
    if flops is None or moved is None:
        return None
    integer = 0.0 if precision in _FLOAT_RATE else work.get(f"{prefix}int8_flops", flops)
    compute = _milliseconds(integer, limits.get("int8_gop_per_s")) + _milliseconds(
        flops - integer, limits.get(_FLOAT_RATE.get(precision, "float32_gflop_per_s"))
    )
    cached = moved <= limits.get("cache_bytes", 0) / 2 and isinstance(limits.get("cached_read_gb_per_s"), float)
    memory = _milliseconds(moved, limits.get("cached_read_gb_per_s" if cached else "read_gb_per_s"))
    if not max(compute, memory):
        return None
    bound = "compute" if compute > memory else "memory"
    line = {"limit_ms": max(compute, memory), "bound": bound, "flops": flops, "bytes": moved}
    return line | {"in_cache": cached}


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
    for phase, (component, prefix, part) in PHASES.items():
        precision = engines.get(component, "").partition("-")[2]
        line = limit(works.get(component, {}), prefix, precision, limits)
        if line is not None and part in latency_ms:
            measured = latency_ms[part]["median"]
            found[phase] = line | {"measured_ms": measured, "share": line["limit_ms"] / measured}
    return found


_FLOAT_RATE = {
    "fp32": "float32_gflop_per_s",
    "fp16": "float16_gflop_per_s",
    "bf16": "float16_gflop_per_s",
}


def _milliseconds(amount: float, giga_per_second: Any) -> float:
    """The time that `amount` takes at the rate; 0 where the rate is not a number."""
    return amount / giga_per_second / 1e6 if isinstance(giga_per_second, int | float) else 0.0
