"""The plan: a recipe with its numbers, keyed by COMPONENT/MODULE.PATH. `plans/RECIPE.json` in the artefact.

The fake-quant model and the ONNX graphs are both made from it, in this order:
1. smoothing, which leaves the float function as it is: the outputs of each module in `absorbers` (rows of a linear
   layer's weight and its bias, a norm's weight and bias) are divided, channel by channel; the input channels (columns
   of the weight) of each module with `smoothing` are multiplied;
2. weights are quantised by `weights.quantize_weight`;
3. inputs with an `activation_scale` are quantised: clip(round half to even(x / scale), -128, 127), zero point 0;
4. so are outputs with an `output_scale`, bias included. An engine whose backend gains nothing from it may leave this
   step out (`engines/passes/float_outputs.py`) and is then nearer to float than the fake-quant model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..artifact import Artifact
from ..errors import VlmcError, mended_by
from ..files import inside
from ..records import FileSpec, read_record, write_record
from .recipes import Recipe
from .weights import LIMITS

MAX_BLOCK = 4096  # input channels that share a scale; of the recipes' blocks the largest is 32


@dataclass(frozen=True)
class SetRecord:
    """What was calibrated on. `pictures`: the hashes that an evaluation set must not share; `own`: the set's file as
    devices name it whose own it is, empty for any other set."""

    name: str
    sha256: str
    rows: int
    pictures: tuple[str, ...]
    own: str = ""


@dataclass(frozen=True)
class ModulePlan:
    """One linear layer or convolution.

    Of its input, per tensor and after smoothing, for each phase (see `observation`): `peaks`, the largest
    magnitude seen, and `ranges`, what the observer kept of it. `activation_scale` is the largest range / 127, since
    one engine serves all phases. `smoothing` multiplies the weight's input channels, and the module `absorbed_by` is
    divided to match (see `Plan.absorbers`). With 0 weight bits the layer is only here for its smoothing.
    `output_scale` is, of its output, the largest phase's range / 127, chosen in the same way.
    """

    weight_bits: int
    block: int
    activation_scale: float | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    smoothing: tuple[float, ...] | None = None
    absorbed_by: str | None = None
    output_scale: float | None = None


@dataclass(frozen=True)
class Plan:
    """`source_sha256` is the manifest's, of the weights that the numbers belong to. `absorbers`: what each output
    channel of a module is divided by. `samples`: of components that TensorRT calibrates itself, the file of inputs."""

    schema: int
    recipe: Recipe
    source_sha256: str
    calibrated_on: SetRecord | None
    modules: dict[str, ModulePlan]
    absorbers: dict[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()
    samples: dict[str, FileSpec] = field(default_factory=dict)


def samples_path(artifact: Artifact, recipe: str, component: str, spec: FileSpec) -> Path:
    """Named by its content, so that until a new plan is there the old one has its own."""
    return inside(artifact.root, f"plans/{recipe}.{component}.{spec.sha256[:12]}.npz")


def write_plan(artifact: Artifact, plan: Plan) -> Path:
    """Replaces the recipe's plan in one step and returns its path; samples of the plan before go."""
    name = plan.recipe.name
    path = artifact.plan_path(name)
    write_record(path, plan)
    kept = [samples_path(artifact, name, component, spec) for component, spec in plan.samples.items()]
    for old in set(path.parent.glob(f"{name}.*.npz")).difference(kept):
        old.unlink()
    return path


def _impossible(plan: Plan) -> Iterator[str]:
    """What a layer cannot be quantised or smoothed by."""
    smoothed = {module.absorbed_by for module in plan.modules.values() if module.smoothing is not None}
    if smoothed != plan.absorbers.keys():
        yield "layers that are smoothed without the module that absorbs it, or the other way round"
    for path, module in plan.modules.items():
        if module.weight_bits not in (0, *LIMITS) or not 0 <= module.block <= MAX_BLOCK:
            yield f"{path} in {module.weight_bits} bits and blocks of {module.block}"
        scales = [scale for scale in (module.activation_scale, module.output_scale) if scale is not None]
        if not _positive(scales) or not _positive(module.smoothing or ()):
            yield f"a scale or factor of {path} that is no positive number"
    for path, divisors in plan.absorbers.items():
        if not _positive(divisors):
            yield f"a divisor of {path} that is no positive number"


def _positive(numbers: Iterable[float]) -> bool:
    """Whether each is above 0 and finite, as float32 too."""
    return all(2.0**-149 <= number < 2.0**128 for number in numbers)


def read_plan(artifact: Artifact, recipe: str) -> Plan:
    """The recipe's plan. A missing one, or one for other weights than the artefact's, is a VlmcError."""
    path = artifact.plan_path(recipe)
    again = f"run `vlmc calibrate {artifact.root} --recipe {recipe}`"
    if not path.is_file():
        raise VlmcError(f"{artifact.root} has no plan for the recipe {recipe!r}", fix=again)
    with mended_by(again):
        plan = read_record(Plan, path)
        if plan.recipe.name != recipe:
            raise VlmcError(f"The plan {path} is another recipe's", found=plan.recipe.name)
        if wrong := next(_impossible(plan), ""):
            raise VlmcError(f"The plan {path} holds what no calibration finds", found=wrong)
    source = artifact.manifest.source.sha256
    if plan.source_sha256 != source:
        raise VlmcError(
            f"The plan {path} was made for other weights",
            found=f"sha256 {plan.source_sha256[:12]}…",
            expected=f"{source[:12]}…",
            fix=again,
        )
    return plan
