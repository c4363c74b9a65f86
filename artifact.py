"""The artefact: one folder that each stage adds to and the next one reads, described by `manifest.json`.

    manifest.json            written by `vlmc export`: source, components, KV cache, prompt, preprocessing, checksums
    onnx/*.onnx (+ .data)    the canonical float graphs, named as in transformers.js
    tokenizer.json           the tokenizer, as `tokenizers` reads it
    golden/                  pictures, golden.json (prompts and greedy tokens) and golden.npz (component outputs)
    plans/RECIPE.json        written by `vlmc calibrate`: a recipe with its scales
    engines/DEVICE/…         written by `vlmc build`: engine.json beside each engine, RECIPE.json with the verdict
    profile/DEVICE/…         written by `vlmc profile`: raw samples, report.json and what is drawn from it

Nothing here knows torch, ONNX or a backend: this module is read on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import VlmcError, mended_by
from .files import inside, refuse_links_out
from .records import REMAKE, FileSpec, check_file, read_record

COMPONENTS = ("vision_encoder", "embed_tokens", "decoder")  # of a model that generates; see Artifact.components
FLOATS = ("fp32", "fp16")  # the precisions that need no plan; every other one is the name of a recipe
GRAPH_FILES = {  # transformers.js' names, so that other tools find what they look for
    "vision_encoder": "onnx/vision_encoder.onnx",
    "embed_tokens": "onnx/embed_tokens.onnx",
    "fusion": "onnx/fusion.onnx",  # in few models: what pictures and text make of one another before the decoder
    "decoder": "onnx/decoder_model_merged.onnx",
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: ONNX name, numpy dtype name, shape with numbers or the names of free dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ComponentSpec:
    """One canonical float graph. `file` is relative to the artefact; `parameters` counts its distinct weights."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int

    def further_inputs(self) -> tuple[str, ...]:
        """Of a decoder, what it takes that not every decoder does, `position_ids` among them where a token has several
        positions."""
        return tuple(
            tensor.name
            for tensor in self.inputs
            if not tensor.name.startswith("past_key_values.")
            and (tensor.name not in DECODER_INPUTS or (tensor.name == "position_ids" and len(tensor.shape) != 2))
        )


# What every decoder takes beside its cache; what another one takes further is in its ComponentSpec.
DECODER_INPUTS = ("inputs_embeds", "position_ids", "write_index", "logits_index")
# What a decoder with cross-attention looks at at every step: the picture, or what a fusion made of it and the question.
CROSSED = ("image_features", "fused_image_features")


@dataclass(frozen=True)
class KvSpec:
    """The KV cache of the decoder: each layer keeps keys and values of shape (1, kv_heads, capacity, head_dim)."""

    layers: int
    kv_heads: int
    head_dim: int
    capacity: int


@dataclass(frozen=True)
class PromptSpec:
    """The chat template, rendered for one question: `{image}` (of all pictures) and `{text}` are replaced. `trim`: the
    question without the white space around it, as templates with Jinja's filter of that name write it."""

    with_image: str
    text_only: str
    image_token: str
    eos_token_ids: tuple[int, ...]
    trim: bool = False


@dataclass(frozen=True)
class MatchSpec:
    """What a model that matches does around its two encoders.

    `logit_scale` multiplies cosines before the softmax. `text_length`: most tokens of a text, special ones included.
    `begin_token_ids` and `end_token_ids` stand around every text; `pad_token_id` fills up a batch's shorter ones."""

    logit_scale: float
    text_length: int
    begin_token_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    pad_token_id: int

    def is_sound(self, vocabulary: int) -> bool:
        """Whether it is one that a model of that many tokens can have: nearer is likelier, and a text has room."""
        around = (*self.begin_token_ids, *self.end_token_ids)
        known = all(0 <= id < vocabulary for id in (*around, self.pad_token_id))
        return known and len(around) < self.text_length and 0 < self.logit_scale < float("inf")


@dataclass(frozen=True)
class Source:
    """Where the weights came from. `kind`: demo, folder, hub or random; `sha256` covers config and weights."""

    kind: str
    location: str
    sha256: str
    revision: str = ""
    seed: int = 0

    @property
    def random_weights(self) -> bool:
        return self.kind == "random"


@dataclass(frozen=True)
class ParityLevel:
    """One rung of the ladder that compares a graph with PyTorch float32; `passed` decides whether export goes on. Of
    greedy tokens `cosine` is the share of equal answers, and `tolerance` the margin of logits that counts as a tie."""

    level: str
    component: str
    max_abs: float
    cosine: float
    tolerance: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Manifest:
    schema: int
    name: str
    family: str
    source: Source
    components: dict[str, ComponentSpec]
    kv: KvSpec
    hidden_size: int
    vocab_size: int
    preprocessing: dict[str, Any]  # "kind" names the module in runtime/preprocessing that reads the rest
    prompt: PromptSpec
    parity: tuple[ParityLevel, ...]
    files: dict[str, FileSpec]
    versions: dict[str, str]
    created: str
    matching: MatchSpec | None = None  # where the model matches pictures with texts and generates nothing
    peak_memory_bytes: int | None = None  # resident set of the process that finished the export; None where not told


@dataclass(frozen=True)
class KvContract:
    """How an engine wants its cache. `form`: `scatter` (canonical: past in, present out, written at write_index),
    `shared` (past and present are one buffer that the engine updates in place) or `append` (the engine returns the
    new keys and values and the runtime writes them). Layout is (batch, kv_heads, capacity, head_dim)."""

    form: str
    layers: int
    kv_heads: int
    head_dim: int
    capacity: int
    dtype: str = "float32"


ASKED = " (asked)"
ASKED_MEANS = "what the graph asks for, in a region that TensorRT fused and shows no kernels of"


@dataclass(frozen=True)
class BuildReport:
    """What building and trying an engine showed. `products`: matrix products by the precision they really run in,
    read from the optimised graph; where that shows none, the kind ends in ASKED. `latency_ms`: measured median on the
    golden inputs, empty where the device is not this machine. `agreement`: cosine with the golden outputs. `work`:
    operations and bytes of one golden run. `timed_on`: the machine of `latency_ms`, which is of the device's kind and
    may not be the very device."""

    seconds: float
    peak_memory_bytes: int
    size_bytes: int
    products: dict[str, int]
    latency_ms: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    work: dict[str, float] = field(default_factory=dict)
    timed_on: str = ""


@dataclass(frozen=True)
class EngineSpec:
    """One component built for one backend and precision. `file` is relative to the engine's folder; `key` is the
    hash of all that went in, so that a second build is a cache hit; `source_sha256` is of the checkpoint alone."""

    schema: int
    component: str
    backend: str
    precision: str
    device: str
    file: str
    key: str
    source_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, FileSpec]
    report: BuildReport
    versions: dict[str, str]
    kv: KvContract | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of TensorRT: its version, the SM, products and the like

    def is_of(self, manifest: Manifest, component: str) -> bool:
        """Whether it is of this checkpoint, takes and gives what that component does, and a decoder has the artefact's
        KV cache."""
        known, kv = manifest.components.get(component), self.kv
        if known is None or self.source_sha256 != manifest.source.sha256:
            return False
        if (self.component, self.inputs, self.outputs) != (component, known.inputs, known.outputs):
            return False
        if kv is None:  # so is a decoder's graph that waits to be built
            return component != "decoder" or self.backend == "handover"
        sized = vars(manifest.kv).items() <= vars(kv).items()
        return sized and kv.form in ("scatter", "shared", "append") and kv.dtype in ("float32", "float16")


def parts_of(engine: str) -> tuple[str, str]:
    """Backend and precision of an engine's name, BACKEND-PRECISION."""
    backend, _, precision = engine.partition("-")
    return backend, precision


@dataclass(frozen=True)
class Choice:
    """The verdict on one component: `engine` (BACKEND-PRECISION) was kept, for `reason`, from `candidates`, each
    with its measured milliseconds (empty: not measured here) and whether its outputs agree with the golden ones."""

    engine: str
    reason: str
    candidates: dict[str, dict[str, float]]


@dataclass(frozen=True)
class AnswerTrial:
    """Whole answers with these engines (by component): median `milliseconds` of its `turns`, and the cosine of the
    first token's logits with the golden ones. `key` is the hash of the engines' keys."""

    engines: dict[str, str]
    milliseconds: float
    agreement: float
    key: str
    turns: tuple[float, ...] = ()


@dataclass(frozen=True)
class BuildSpec:
    """`engines/DEVICE/RECIPE.json`: what `vlmc build` kept. `remaining` says what is left to do on the device.
    `answers`: of the mix, where the best engines come from several backends, and then of each backend alone."""

    schema: int
    device: str
    recipe: str
    choices: dict[str, Choice]
    seconds: float
    created: str
    remaining: str = ""
    answers: tuple[AnswerTrial, ...] = ()


class Artifact:
    """An opened artefact. Opening reads and checks the manifest and refuses links that leave the folder; a file's
    sha256 is checked on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / "manifest.json").is_file():
            fix = f"run `vlmc export MODEL -o {root}` first"
            raise VlmcError(f"{root} is no artefact", found="no manifest.json in it", fix=fix)
        refuse_links_out(root, "manifest.json", "plans", "engines", "profile")
        with mended_by(REMAKE):
            self.manifest = read_record(Manifest, root / "manifest.json")
            kind = COMPONENTS if self.manifest.matching is None else ("vision_encoder", "text_encoder")
            if missing := [name for name in kind if name not in self.manifest.components]:
                raise VlmcError(f"{root / 'manifest.json'} names no graph of the {', '.join(missing)}")
            if min(vars(self.manifest.kv).values()) < 0:
                raise VlmcError(f"{root / 'manifest.json'} gives the KV cache a negative size")
            matching = self.manifest.matching
            if matching is not None and not matching.is_sound(self.manifest.vocab_size):
                raise VlmcError(f"{root / 'manifest.json'} has numbers under `matching` that no model can have")
        self._checked: set[tuple[Path, str]] = set()

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the artefact's components, in the order in which a question passes them."""
        found = self.manifest.components
        return tuple(name for name in GRAPH_FILES if name in found) + tuple(n for n in found if n not in GRAPH_FILES)

    def path_of(self, relative: str) -> Path:
        """The file's path, once its size and sha256 agree with the manifest."""
        path = inside(self.root, relative)
        if (known := self.manifest.files.get(relative)) is None:
            raise VlmcError(f"{relative} is not listed in {self.root / 'manifest.json'}", fix=REMAKE)
        self._check(path, known)
        return path

    def _check(self, path: Path, known: FileSpec) -> None:
        if (path, known.sha256) not in self._checked:  # hashing gigabytes again would take longer than a trial
            check_file(path, known)
            self._checked.add((path, known.sha256))

    def graph(self, component: str) -> Path:
        """The component's canonical ONNX file, checked together with its external data."""
        if (spec := self.manifest.components.get(component)) is None:
            have = ", ".join(self.manifest.components)
            raise VlmcError(f"{self.root} has no component {component!r}", found=have, fix=REMAKE)
        if spec.file + ".data" in self.manifest.files:
            self.path_of(spec.file + ".data")
        return self.path_of(spec.file)

    def plan_path(self, recipe: str) -> Path:
        """Where `vlmc calibrate` keeps the recipe's plan."""
        return inside(self.root, f"plans/{recipe}.json")

    def engine_folder(self, device: str, component: str, engine: str) -> Path:
        """Where `vlmc build` keeps the engine BACKEND-PRECISION of a component."""
        return inside(self.root, f"engines/{device}/{component}/{engine}")

    def engine(self, device: str, component: str, engine: str) -> tuple[EngineSpec, Path]:
        """The engine's record and the path of its file, every file of it checked against its sha256."""
        folder, recipe = self.engine_folder(device, component, engine), parts_of(engine)[1]
        if recipe in FLOATS:  # every recipe's build has float engines
            recipe = next((path.stem for path in folder.parents[1].glob("*.json")), "fp32")
        again = self._build_again(device, recipe)
        if not (folder / "engine.json").is_file():
            what = f"There is no engine {engine} of {component} for device {device!r} in {self.root}"
            raise VlmcError(what, fix=again)
        with mended_by(again):
            spec = read_record(EngineSpec, folder / "engine.json")
        if spec.device != device:
            what, fix = f"The engine in {folder} was built for another device", f"{again} on that device"
            raise VlmcError(what, found=spec.device, expected=device, fix=fix)
        if not spec.is_of(self.manifest, component):
            raise VlmcError(f"The engine in {folder} is another model's or was altered", fix=again)
        with mended_by(again):
            for name, known in spec.files.items():
                self._check(inside(folder, name), known)
            if spec.file not in spec.files:
                raise VlmcError(f"{spec.file} is not listed in {folder / 'engine.json'}")
            return spec, inside(folder, spec.file)

    def builds(self) -> list[BuildSpec]:
        """Every build in the artefact, the newest first."""
        found = []
        for path in self.root.glob("engines/*/*.json"):
            with mended_by(self._build_again(path.parent.name, path.stem)):
                found.append(read_record(BuildSpec, path))
        return sorted(found, key=lambda build: build.created, reverse=True)

    def build(
        self, device: str = "", recipe: str = "", preferred: Callable[[BuildSpec], bool] = lambda build: True
    ) -> BuildSpec:
        """The newest build for the device and recipe, where given, that is `preferred`; where none is, the newest."""
        builds = self.builds()
        fitting = [build for build in builds if device in ("", build.device) and recipe in ("", build.recipe)]
        if fitting:
            return next(filter(preferred, fitting), fitting[0])
        wanted = " ".join(filter(None, [device and f"device {device}", recipe and f"recipe {recipe}"]))
        make = f"`vlmc build {self.root} --int8`; `vlmc devices` lists what its --device takes"
        raise VlmcError(
            f"{self.root} holds no build" + (f" for {wanted}" if wanted else ""),
            found=", ".join(f"{build.device}/{build.recipe}" for build in builds) or "none",
            fix=f"choose one of these, or make another as with {make}" if builds else f"run {make}",
        )

    def _build_again(self, device: str, recipe: str) -> str:
        return f"run `vlmc build {self.root} --device {device} --recipe {recipe}`"
