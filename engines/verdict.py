"""Which candidate is kept, and why, in words that a person can check against the numbers.

First each component by itself (`choose`). Where that ends in a mix of backends, whole answers decide between it and
every backend that can do all alone (`together`): what a component gains by itself can be lost in an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..artifact import FLOATS, AnswerTrial, BuildReport, Choice, parts_of
from ..errors import VlmcError
from ..runtime import backends
from .trial import ANSWER

GAIN = 1.02  # below it a difference is noise, and float is kept
MIX_GAIN = 1.05  # the same for whole answers: on a busy machine two trials of one mix differ by as much
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
    if not _floats(costs):
        raise VlmcError(
            f"No float engine of {component} computes what PyTorch does",
            found=wrong.removeprefix("; "),
            expected=f"cosine ≥ {NEAR}",
            fix="report it with the model's name and the versions that `vlmc doctor` shows",
        )
    kept, baseline = _fastest(costs), _fastest(_floats(costs))
    what = f"{costs[kept]:.2f} ms" + (f" for prompt and {ANSWER} tokens" if component == "decoder" else "")
    others = ", ".join(f"{e} {ms:.2f}" for e, ms in sorted(costs.items(), key=lambda item: item[1]) if e != kept)
    if len(reports) == 1:
        why = f"nothing else is offered for it: {what}"
    elif not others:
        why = f"the only one that computes what PyTorch does: {what}{wrong}"
    elif len(_floats(costs)) == len(costs):
        why = f"nothing of it is quantised: {what} against {others}{wrong}"
    elif kept == baseline:
        why = f"float is as fast or faster: {what} against {others}{wrong}"
    else:
        why = f"fastest here: {what}, {costs[baseline] / costs[kept]:.2f}× {baseline} ({others}){wrong}"
    timed = f"; timed on {reports[kept].timed_on}" if reports[kept].timed_on else ""
    return Choice(kept, why + timed, candidates)


def _floats(costs: Mapping[str, float]) -> dict[str, float]:
    return {engine: ms for engine, ms in costs.items() if parts_of(engine)[1] in FLOATS}


def _fastest(costs: Mapping[str, float]) -> str:
    """The fastest engine; the fastest float one unless something is faster by GAIN."""
    best, floats = min(costs, key=costs.__getitem__), _floats(costs)
    baseline = min(floats, key=floats.__getitem__, default=best)
    return baseline if costs[baseline] < costs[best] * GAIN else best


def mixes(choices: Mapping[str, Choice], random_weights: bool) -> list[dict[str, str]]:
    """Engines by component whose whole answers are to be compared: the chosen ones, and what each backend that can do
    every component would keep alone. Empty where one backend was chosen for all, or none can do all.

    The look-up of embeddings counts for nothing and stays as it was chosen.
    """
    chosen = {component: choice.engine for component, choice in choices.items()}
    parts = {component: choice for component, choice in choices.items() if component != "embed_tokens"}
    if len({parts_of(choice.engine)[0] for choice in parts.values()}) < 2:
        return []
    known = dict.fromkeys(parts_of(e)[0] for choice in parts.values() for e in (*choice.candidates, choice.engine))
    alone = [{part: _best_of(backend, choice, random_weights) for part, choice in parts.items()} for backend in known]
    singles = [chosen | engines for engines in alone if all(engines.values())]
    return [chosen, *singles] if singles else []


def _best_of(backend: str, choice: Choice, random_weights: bool) -> str:
    """What `choose` would have kept had there been this backend alone; empty where it has nothing that is right."""
    if choice.engine not in choice.candidates:  # nothing else could be tried
        return choice.engine if parts_of(choice.engine)[0] == backend else ""
    own = {engine: found for engine, found in choice.candidates.items() if found and parts_of(engine)[0] == backend}
    costs = {e: found["judged_by"] for e, found in own.items() if random_weights or found["agreement"] >= NEAR}
    return _fastest(costs) if costs else ""


def together(choices: Mapping[str, Choice], answers: Sequence[AnswerTrial]) -> dict[str, Choice]:
    """The choices once whole answers were timed, of `mixes` in that order: the mix stays where it is faster than every
    single backend by MIX_GAIN and in every turn, for one backend is simpler, and one package less on the device."""
    mix, best = answers[0], min(answers[1:], key=lambda answer: answer.milliseconds)
    alone, both = f"{best.milliseconds:.1f} ms", f"{mix.milliseconds:.1f}"
    apart = max(mix.turns, default=0.0) < min(best.turns, default=float("inf"))
    stays = mix.milliseconds * MIX_GAIN <= best.milliseconds and apart
    why = f"{title(best.engines)} for all parts answers in {alone}, the mix in {both}"
    if not stays and mix.milliseconds < best.milliseconds * MIX_GAIN:
        why += ": within noise, and one backend is simpler"

    def judged(choice: Choice, engine: str) -> Choice:
        if engine == choice.engine:
            return choice
        if stays:
            return replace(choice, reason=f"{choice.reason}; {why}")
        return replace(choice, engine=engine, reason=f"{why}; by itself {choice.engine}, {choice.reason}")

    return {component: judged(choice, best.engines[component]) for component, choice in choices.items()}


def title(engines: Mapping[str, str]) -> str:
    """The backends of these engines (by component), the look-up of embeddings aside, as a person calls them."""
    used = dict.fromkeys(parts_of(engine)[0] for part, engine in engines.items() if part != "embed_tokens")
    return " + ".join(backends.title(backend) for backend in used)


def unmeasured(engine: str, why: str, engines: Sequence[str]) -> Choice:
    """The recipe's own engine of those that were built, for a device that is not this machine."""
    return Choice(engine, f"not measured here: {why}", {name: {} for name in engines})
