"""`report.json` as checked records: what `vlmc profile` measured and everything here draws.

Whatever could not be had is a string, "unavailable: reason", in the place of its number. It is kept as that string
all the way to the reader; nothing turns it into 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..artifact import FLOATS
from ..errors import VlmcError, mended_by
from ..files import read_json
from ..profiles import verdict
from ..records import SCHEMA, from_json

ABSENT = "unavailable: not in the report"

Number = float | str  # str: "unavailable: reason"
T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    mean: float
    std: float
    min: float
    max: float
    median: float
    p90: float
    p99: float
    count: int


@dataclass(frozen=True)
class Roofline:
    """One phase against the machine's limit; `share` is limit_ms / measured_ms; `bound` is memory or compute."""

    limit_ms: Number
    measured_ms: Number
    share: Number
    bound: str
    in_cache: bool = False
    flops: Number = ABSENT
    bytes: Number = ABSENT


@dataclass(frozen=True)
class Score:
    """`value` = score / total, with its 95 % interval."""

    score: float
    total: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Accuracy:
    tasks: dict[str, Score]
    overall: Score


@dataclass(frozen=True)
class Agreement:
    """Greedy tokens against the golden ones; `first_divergence` per case, None where equal."""

    cases: int
    equal: int
    first_divergence: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Answer:
    image: str
    task: str
    prompt: str
    gold: str
    answer: str
    right: bool
    image_data: str = ""
    score: float | None = None  # a caption's share of facts; None: right or wrong is all there is


@dataclass(frozen=True)
class Variant:
    """One thing that was measured. `kind`: engine or baseline."""

    name: str
    kind: str
    recipe: str = ""
    engines: dict[str, str] = field(default_factory=dict)
    latency_ms: dict[str, Statistics | str] | str = ABSENT
    tokens_per_s: Statistics | str = ABSENT
    pairs_per_s: Statistics | str = ABSENT  # of a model that matches
    memory: dict[str, Number] | str = ABSENT
    energy: dict[str, Number] | str = ABSENT
    roofline: dict[str, Roofline | str] | str = ABSENT
    products: dict[str, dict[str, int] | str] | str = ABSENT
    accuracy: Accuracy | str = ABSENT
    agreement: Agreement | str = ABSENT
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Model:
    name: str
    family: str = ""
    random_weights: bool = False
    matching: bool = False  # it matches pictures with texts and generates nothing
    parameters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    low: float
    high: float


@dataclass(frozen=True)
class Speedup:
    """How many times as fast `of` is as `over`; `ranges` are the ratios' ends over `turns` turns, part by part."""

    of: str
    over: str
    vision: Number = ABSENT
    text: Number = ABSENT  # of a model that matches
    prefill: Number = ABSENT
    decode: Number = ABSENT
    end_to_end: Number = ABSENT
    ranges: dict[str, Range] = field(default_factory=dict)
    turns: int = 0


@dataclass(frozen=True)
class Comparison:
    """`evaluation.accuracy.paired` of two variants."""

    of: str
    over: str
    total: int
    won: int
    lost: int
    p_value: float
    significant: bool


@dataclass(frozen=True)
class Choice:
    engine: str
    reason: str
    candidates: dict[str, dict[str, Number] | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    sentences: tuple[str, ...] = ()
    choices: dict[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """What a kind of model is measured by, each figure by its key with its title. `first`: the time that says most
    beside vision; `rate`: a Variant's attribute; `energies`: the first is for the headline; `parts`: of a Speedup;
    `bars`: the times that add up to the whole but for `rest`, which has none of its own."""

    times: Mapping[str, str]
    first: tuple[str, str]
    rate: tuple[str, str]
    energies: Mapping[str, str]
    parts: Mapping[str, str]
    bars: tuple[str, ...]
    rest: str = ""


_BEGIN = {"load": "loading", "preprocess": "preprocessing", "vision": "vision"}
GENERATING = Terms(
    times=_BEGIN
    | {
        "prefill": "prefill",
        "time_to_first_token": "first token",
        "decode_per_token": "each further token",
        "end_to_end": "end to end",
    },
    first=("time_to_first_token", "first token"),
    rate=("tokens_per_s", "tokens/s"),
    energies={"joules_per_image": "J/picture", "joules_per_token": "J/token", "watts": "W"},
    parts={"vision": "vision", "prefill": "prefill", "decode": "decode", "end_to_end": "end to end"},
    bars=("preprocess", "vision", "prefill"),
    rest="decode",
)
MATCHING = Terms(
    times=_BEGIN | {"text": "text", "end_to_end": "end to end"},
    first=("text", "text"),
    rate=("pairs_per_s", "pairs/s"),
    energies={"joules_per_pair": "J/pair", "watts": "W"},
    parts={"vision": "vision", "text": "text", "end_to_end": "end to end"},
    bars=("preprocess", "vision", "text"),
)


@dataclass(frozen=True)
class Report:
    schema: int
    artifact: Model
    variants: tuple[Variant, ...]
    device: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] | str = ABSENT
    power: dict[str, Any] | str = ABSENT
    settings: dict[str, Any] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    speedups: tuple[Speedup, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    verdict: Verdict = Verdict()

    @property
    def kept(self) -> Variant | None:
        """The variant that runs just the engines that the verdict chose."""
        chosen = {component: choice.engine for component, choice in self.verdict.choices.items()}
        return next((v for v in self.variants if chosen and chosen.items() <= v.engines.items()), None)

    @property
    def terms(self) -> Terms:
        return MATCHING if self.artifact.matching else GENERATING

    def rate(self, variant: Variant) -> Statistics | str:
        """The variant's tokens/s or pairs/s."""
        found: Statistics | str = getattr(variant, self.terms.rate[0])
        return found

    @property
    def reference(self) -> Variant:
        """What headline speed-ups are over: plain PyTorch, or what comes first without it."""
        return self.variants[0]

    @property
    def scarce(self) -> tuple[str, str, str]:
        """See `verdict.scarce`."""
        return verdict.scarce(variant.memory for variant in self.variants)

    def speedups_of(self, variant: Variant) -> list[Speedup]:
        """Those over the variants of this report, in their order."""
        found = {speedup.over: speedup for speedup in self.speedups if speedup.of == variant.name}
        return [found[other.name] for other in self.variants if other.name in found]

    @property
    def device_name(self) -> str:
        return str(self.device.get("name", "this device"))


def look(group: Mapping[str, T] | str, key: str) -> T | str:
    """The group's entry, or the reason why there is none."""
    return group if isinstance(group, str) else group.get(key, ABSENT)


def read(folder: Path) -> Report:
    """The checked `report.json` of a profile's folder; PyTorch comes first, then float, int8 and other engines."""
    with mended_by(_AGAIN):
        return parse(read_json(folder / "report.json"), str(folder / "report.json"))


def parse(data: Any, where: str = "report.json") -> Report:
    """The report in `data`; raises a VlmcError that names the field that does not fit."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise VlmcError(
            f"{where} has a schema that this version of vlmc does not read",
            found=str(schema)[:80],
            expected=str(SCHEMA),
            fix=_AGAIN,
        )
    report = from_json(Report, _clean(data, where), where)
    names = [variant.name for variant in report.variants]
    if not names:
        raise VlmcError(f"{where} holds no variant", fix=_AGAIN)
    if len(set(names)) < len(names):
        raise VlmcError(f"{where} holds two variants of one name", found=", ".join(names), fix=_AGAIN)
    ordered = tuple(sorted(report.variants, key=_order))
    return Report(**{**vars(report), "variants": ordered})


_AGAIN = "measure again with `vlmc profile DIR`"
_LARGEST = 1e100  # of a number: sums and axes of far larger ones overflow
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # also no escape codes for the terminal


def precision(variant: Variant) -> str:
    """What colour and place a variant gets: baseline, float, int8 or other."""
    if variant.kind == "baseline":
        return "baseline"
    if variant.recipe in FLOATS:
        return "float"
    return "int8" if variant.recipe == "int8" else "other"


def _order(variant: Variant) -> tuple[int, bool]:
    """Baselines first, the plain one before those with a recipe's scales."""
    kind = precision(variant)
    return ("baseline", "float", "int8", "other").index(kind), kind == "baseline" and variant.recipe not in FLOATS


def _clean(value: Any, where: str) -> Any:
    """Plain values with printable text; a number that is not finite, or that nothing measures, is refused."""
    if isinstance(value, dict):
        return {_clean(key, where): _clean(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:  # so it is for NaN
        raise VlmcError(f"{where} is no finite number that could be measured", found=str(value)[:40], fix=_AGAIN)
    return value
