"""Which candidate is kept, and why, in words that a person can check against the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..artifact import FLOATS, BuildReport, Choice
from ..errors import VlmcError
from .trial import ANSWER

GAIN = 1.02  # below it a difference is noise, and float is kept
NEAR = 0.95  # cosine with the golden outputs below which an engine computes something else


def cost(report: BuildReport) -> float:
    """Milliseconds that the candidate is judged by: a run, or a prompt and an answer of ANSWER tokens."""
    times = report.latency_ms
    return times["run"] if "run" in times else times["prefill"] + ANSWER * times["decode"]


def choose(component: str, reports: Mapping[str, BuildReport], random_weights: bool) -> Choice:
    """The fastest engine that agrees with the golden outputs; float unless something is faster by GAIN.

    With random weights agreement says nothing about the trained model, so it is reported and does not decide.
    """
    candidates = {
        engine: {**report.latency_ms, "judged_by": round(cost(report), 4), "agreement": report.agreement or 0.0}
        for engine, report in reports.items()
    }
    right = {e for e, r in reports.items() if random_weights or (r.agreement or 0.0) >= NEAR}
    costs = {engine: cost(report) for engine, report in reports.items() if engine in right}
    wrong = "".join(f"; {e} was left out: cosine {reports[e].agreement or 0:.3f}" for e in reports if e not in right)
    floats = [engine for engine in costs if engine.endswith(FLOATS)]
    if not floats:
        raise VlmcError(
            f"No float engine of {component} computes what PyTorch does",
            found=wrong.removeprefix("; "),
            expected=f"cosine ≥ {NEAR}",
            fix="report it with the model's name and the versions that `vlmc doctor` shows",
        )
    baseline, best = min(floats, key=costs.__getitem__), min(costs, key=costs.__getitem__)
    kept = baseline if costs[baseline] < costs[best] * GAIN else best
    what = f"{costs[kept]:.2f} ms" + (f" for prompt and {ANSWER} tokens" if component == "decoder" else "")
    others = ", ".join(f"{e} {ms:.2f}" for e, ms in sorted(costs.items(), key=lambda item: item[1]) if e != kept)
    if not others:
        why = f"the only one that computes what PyTorch does: {what}{wrong}"
    elif kept == baseline:
        why = f"float is as fast or faster: {what} against {others}{wrong}"
    else:
        why = f"fastest here: {what}, {costs[baseline] / costs[kept]:.2f}× {baseline} ({others}){wrong}"
    return Choice(kept, why, candidates)


def unmeasured(engine: str, why: str, engines: Sequence[str]) -> Choice:
    """The recipe's own engine of those that were built, for a device that is not this machine."""
    return Choice(engine, f"not measured here: {why}", {name: {} for name in engines})
