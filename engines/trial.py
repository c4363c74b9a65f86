"""Candidates tried on this machine: their time on the golden inputs, and how near their outputs are to the golden.

One process a component. Rounds go over the candidates, each loaded alone, so that a slow minute of the machine falls
on all of them and idle threads of one do not disturb another.

What a component gains by itself can be lost in an answer, where another backend runs before and behind it. So whole
answers are tried too, as if they were a component: WHOLE, whose engines are mixes, all components' joined by `+`, each
in turns of a process of its own (build.py).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..artifact import Artifact
from ..evaluation import goldens
from ..evaluation.agreement import cosine
from ..runtime import backends
from ..runtime.images import open_image
from ..runtime.runner import Runner
from ..runtime.session import open_session
from . import child

ROUNDS = 3
SECONDS = 0.3  # of each candidate in a round, after one warm-up; at least MINIMUM runs
MINIMUM = 2
ANSWER = 32  # tokens of the answer that a decoder is judged by: prefill and that many steps
WHOLE = "answer"

Arrays = Mapping[str, NDArray[Any]]


def try_component(artifact: Artifact, device: str, component: str, engines: list[str], embed: str) -> dict[str, Any]:
    """For each engine {"latency_ms": medians, "agreement": cosine with the golden outputs}."""
    golden = goldens.arrays(artifact)
    samples: dict[str, dict[str, list[float]]] = {engine: {} for engine in engines}
    agreement = dict.fromkeys(engines, 0.0)
    for _ in range(1 if component == WHOLE else ROUNDS):  # a mix has its turns instead
        for engine in engines:
            trial = {"decoder": _decoder_trial, WHOLE: _answer_trial}.get(component, _runner_trial)
            agreement[engine], timings = trial(artifact, device, component, engine, embed, golden)
            for name, values in timings.items():
                samples[engine].setdefault(name, []).extend(values)
    return {
        engine: {
            "latency_ms": {name: round(statistics.median(values), 4) for name, values in samples[engine].items()},
            "agreement": round(agreement[engine], 6),
        }
        for engine in engines
    }


Outcome = tuple[float, dict[str, list[float]]]


def _runner_trial(a: Artifact, device: str, component: str, engine: str, embed: str, golden: Arrays) -> Outcome:
    runner, spec = backends.load_runner(a, device, component, engine, threads=0), a.manifest.components[component]
    cases = [name.split(".")[0] for name in golden if name.endswith(".image_features")] or ["0"]
    inputs = {case: {tensor.name: golden[f"{case}.{tensor.name}"] for tensor in spec.inputs} for case in cases}
    near = 1.0
    for case in cases:
        found = runner.run(inputs[case])
        near = min(near, *(cosine(golden[f"{case}.{tensor.name}"], found[tensor.name]) for tensor in spec.outputs))
    return near, {"run": timed(lambda: runner.run(inputs[cases[0]]))}


def _decoder_trial(a: Artifact, device: str, component: str, engine: str, embed: str, golden: Arrays) -> Outcome:
    tokens: Runner = backends.load_runner(a, device, "embed_tokens", embed, threads=0)
    decoder = backends.load_decoder(a, device, engine, tokens, threads=0)
    near = 1.0
    for name in golden:
        if name.endswith(".prefill_logits"):
            case = name.split(".")[0]
            decoder.prefill(golden[f"{case}.inputs_embeds"], **further_of(a, golden, case, decoder.capacity))
            near = min(near, cosine(golden[name], decoder.logits()))
            for token, logits in zip(golden[f"{case}.step_tokens"], golden[f"{case}.step_logits"], strict=True):
                decoder.feed(int(token))
                near = min(near, cosine(logits, decoder.logits()))
    prompt = golden["0.inputs_embeds"][:, : decoder.capacity - 1]  # a prompt may fill the cache, and leaves a step here
    further = further_of(a, golden, "0", prompt.shape[1])
    prefill = timed(lambda: decoder.prefill(prompt, **further))
    room = min(ANSWER, decoder.capacity - prompt.shape[1])

    def answer() -> None:
        decoder.prefill(prompt, **further)
        start = time.perf_counter()
        decoder.decode(room)
        steps.append((time.perf_counter() - start) * 1000 / room)

    steps: list[float] = []
    timed(answer)
    return near, {"prefill": prefill, "decode": steps[1:]}


def _answer_trial(a: Artifact, device: str, component: str, mix: str, embed: str, golden: Arrays) -> Outcome:
    """Golden case 0 from the picture to ANSWER tokens, or to a full cache; the end of text is ignored, so that every
    mix does the same work."""
    session = open_session(a, device, dict(zip(a.components, mix.split("+"), strict=True)))
    case = goldens.cases(a)[0]
    image = open_image(a.path_of(case["image"]))
    image.load()  # decoding the file is not what is timed

    def answer(tokens: int = ANSWER) -> None:
        for _ in session.generate(session.prepare([image], case["prompt"]), tokens, ignore_eos=True):
            pass

    answer(1)
    near = cosine(golden["0.prefill_logits"], session.decoder.logits())
    return near, {"run": timed(answer)}


def further_of(a: Artifact, golden: Arrays, case: str, most: int) -> dict[str, NDArray[Any]]:
    """What the decoder takes of the case's first `most` positions beside their embeddings."""
    spec, found = a.manifest.components["decoder"], {}
    for tensor in spec.inputs:
        if tensor.name in spec.further_inputs():
            axes = [slice(most) if size == "length" else slice(None) for size in tensor.shape]
            found[tensor.name] = golden[f"{case}.{tensor.name}"][tuple(axes)]
    return found


def timed(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each run, after one that is not counted."""
    run()
    samples: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(samples) < MINIMUM or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1000)
    return samples


def main(root: str, device: str, component: str, embed: str, *engines: str) -> str:
    """`child.run("trial", …, ARTEFACT, DEVICE, COMPONENT, EMBED, ENGINE…)`: the outcome as JSON."""
    return json.dumps(try_component(Artifact(Path(root)), device, component, list(engines), embed))


if __name__ == "__main__":
    child.main(main)
