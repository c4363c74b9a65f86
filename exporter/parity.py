"""The parity ladder: each canonical graph in ONNX Runtime against PyTorch float32, then the greedy tokens.

Every level is reported; the first that fails stops the export, for nothing that is built on it could be believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact import Artifact, KvContract, ParityLevel
from ..errors import VlmcError
from ..evaluation.agreement import cosine, first_divergence
from ..runtime.backends import onnxruntime as backend
from ..runtime.images import open_image
from ..runtime.session import Session
from . import golden

COSINE = 0.99999
RELATIVE = 1e-3  # of the largest absolute value; float32 sums in another order differ by about 1e-5
TIE = 1e-3  # a greedy choice that won by less than this in PyTorch's logits may fall the other way

# Prepacking would copy every weight once more, and nothing is timed here.
SETTINGS = {"session_config": {"session.disable_prepacking": "1"}}


def canonical_session(artifact: Artifact) -> Session:
    """The artefact's own float graphs, run as they are."""
    kv = artifact.manifest.kv
    contract = KvContract("scatter", kv.layers, kv.kv_heads, kv.head_dim, kv.capacity)
    loaded = {name: backend.session(artifact.graph(name), SETTINGS) for name in artifact.components}
    decoder = loaded.pop("decoder")
    runners = {name: backend.OnnxRunner(session) for name, session in loaded.items()}
    return Session(
        artifact,
        vision=runners["vision_encoder"],
        embed=runners["embed_tokens"],
        decoder=backend.OnnxDecoder(decoder, contract, runners["embed_tokens"]),
        fusion=runners.get("fusion"),
    )


def compare(level: str, component: str, reference: NDArray[Any], found: NDArray[Any]) -> ParityLevel:
    """Largest absolute difference and cosine of two arrays of one shape, held to RELATIVE and COSINE."""
    if reference.shape != found.shape:
        detail = f"shape {found.shape} instead of {reference.shape}"
        return ParityLevel(level, component, 0.0, 0.0, RELATIVE, False, detail)
    left, right = reference.ravel().astype(np.float64), found.ravel().astype(np.float64)
    with np.errstate(invalid="ignore"):  # of two infinities the difference is NaN, which fails below
        largest = float(np.abs(left - right).max())
    scale = float(np.abs(left).max()) or 1.0
    near = cosine(left, right) if left.any() else 1.0  # zeros have no direction
    passed = bool(np.isfinite(largest)) and largest <= RELATIVE * scale and near >= COSINE
    return ParityLevel(level, component, largest, near, RELATIVE * scale, passed)


def height(artifact: Artifact, cases: int) -> int:
    """How many levels there are to climb, here or in `matching`, with so many golden cases: an answer that ends at once
    has one less."""
    specs = artifact.manifest.components.items()
    return min(golden.DETAILED, cases) * sum(2 if name == "decoder" else len(spec.outputs) for name, spec in specs) + 1


def climb(artifact: Artifact) -> Iterator[ParityLevel]:
    """Yields the levels in order: components on the detailed cases, then the tokens of every case."""
    cases, arrays = golden.read(artifact)
    session = canonical_session(artifact)
    parts = [(name, spec) for name, spec in artifact.manifest.components.items() if name != "decoder"]
    outputs = [(name, tensor.name) for name, spec in parts for tensor in spec.outputs]
    for index in range(min(golden.DETAILED, len(cases))):
        case = cases[index]
        found = golden.detail(session, artifact.root / case["image"], case["prompt"], case["tokens"])
        for component, name in (*outputs, ("decoder", "prefill_logits"), ("decoder", "step_logits")):
            if found[name].size:  # an answer may end before its first step
                yield compare(f"{name} of case {index}", component, arrays[f"{index}.{name}"], found[name])
    yield tokens_level(session, artifact, cases)


def tokens_level(session: Session, artifact: Artifact, cases: list[dict[str, Any]]) -> ParityLevel:
    """Greedy tokens of every case against the golden ones; ties in PyTorch's logits may fall either way."""
    equal, ties, failure = 0, 0, ""
    for index, case in enumerate(cases):
        expected, margins = case["tokens"], case["margins"]
        inputs = session.prepare([open_image(artifact.root / case["image"])], case["prompt"])
        found = list(session.generate(inputs, max(len(expected), 1)))
        where = first_divergence(expected, found)
        if where is None:
            equal += 1
        elif where < len(margins) and margins[where] < TIE:
            ties += 1
        elif not failure:
            instead = f"{found[where : where + 1]} instead of {expected[where : where + 1]}"
            failure = f"case {index} diverges at token {where}: {instead}"
    detail = f"{equal} of {len(cases)} cases equal, {ties} split at a tie" + (f"; {failure}" if failure else "")
    return ParityLevel("greedy tokens", "all", 0.0, equal / max(len(cases), 1), TIE, not failure, detail)


def require(level: ParityLevel) -> None:
    """Raises where the level failed, with what differed and by how much."""
    if not level.passed:
        near = f"max abs ≤ {level.tolerance:.3g} and cosine ≥ {COSINE}"
        raise VlmcError(
            f"The ONNX graph of {level.component} does not compute what PyTorch does ({level.level})",
            found=level.detail or f"max abs {level.max_abs:.3g}, cosine {level.cosine:.6f}",
            expected=f"PyTorch's tokens, but for ties below {TIE}" if level.component == "all" else near,
            fix="report it with the model's name; for a family of your own see docs/add-a-model.md; nothing was "
            "written, for engines built on it would be wrong",
        )
