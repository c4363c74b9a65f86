"""`vlmc export`: a checkpoint becomes an artefact with canonical graphs, goldens and a passed parity ladder."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import json
import platform
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from .. import __version__
from ..artifact import GRAPH_FILES, Artifact, ComponentSpec, KvSpec, Manifest, ParityLevel
from ..console import Report
from ..errors import VlmcError
from ..files import alone, inside, read_json, sha256_of, staged_folder
from ..profiles import memory
from ..records import SCHEMA, FileSpec, check_file, read_record, to_json, write_record
from ..runtime import preprocessing
from ..runtime.images import open_image, picture_hash
from ..runtime.prompt import Tokenizer, render
from . import checkpoint, golden, graph, inspection, parity, processor
from .family import Components
from .torch_runner import torch_session


@dataclass(frozen=True)
class Options:
    """capacity: positions of the KV cache. cases: golden pictures. picture_set: JSONL to take them from, or None for
    the demo's. max_new_tokens: of each golden answer."""

    capacity: int = 1024
    cases: int = 16
    picture_set: Path | None = None
    max_new_tokens: int = 32
    force: bool = False


@dataclass(frozen=True)
class Finished:
    """A part's graph that is written, with the files that it is: kept in the stage until the export is whole, for one
    that is killed to go on from."""

    schema: int
    spec: ComponentSpec
    files: dict[str, FileSpec]


_FINISHED = "finished"  # the folder of these records


class Kind(ABC):
    """What models that generate (`Generating`) and models that match (`matching.Matching`) export differently. `parts`
    is what the family's `split` gives: modules by name, in the order in which their graphs are written."""

    files: ClassVar[Mapping[str, str]]  # of each part's graph

    @abstractmethod
    def describe(self, model: checkpoint.Checkpoint, stage: Path) -> dict[str, Any]:
        """Writes the tokenizer; gives those fields of the manifest that need no weights."""

    @abstractmethod
    def signature(self, name: str, parts: Any, specs: Mapping[str, ComponentSpec], kv: KvSpec) -> graph.Signature:
        """Of any part but the vision encoder; `specs` are those of the parts before it."""

    @abstractmethod
    def complete(self, described: dict[str, Any], parts: Any, specs: Mapping[str, ComponentSpec]) -> dict[str, Any]:
        """What was described and the fields `hidden_size`, `vocab_size` and whatever else needs the weights."""

    @abstractmethod
    def record(
        self, artifact: Artifact, parts: Any, cases: Sequence[golden.Case], options: dict[str, Any]
    ) -> Iterator[int]:
        """Writes PyTorch's goldens; yields the number of cases done."""

    @abstractmethod
    def climb(self, artifact: Artifact) -> Iterator[ParityLevel]:
        """The parity ladder, level by level."""


class Generating(Kind):
    files = GRAPH_FILES

    def describe(self, model: checkpoint.Checkpoint, stage: Path) -> dict[str, Any]:
        processor.save_tokenizer(model.folder, stage / "tokenizer.json")
        preprocessing, prompt = processor.describe(model.folder)
        return {
            "preprocessing": preprocessing | (model.preset["preprocessing"] if model.preset else {}),
            "prompt": prompt,
        }

    def signature(
        self, name: str, parts: Components, specs: Mapping[str, ComponentSpec], kv: KvSpec
    ) -> graph.Signature:
        if name == "embed_tokens":
            return graph.embed_signature(parts.embed_tokens)
        if name == "fusion":
            assert parts.fusion is not None
            hidden = int(specs["embed_tokens"].outputs[0].shape[-1])
            return graph.fusion_signature(parts.fusion, specs["vision_encoder"], hidden)
        crossed = specs.get("fusion", specs["vision_encoder"])
        return graph.decoder_signature(parts.decoder, specs["embed_tokens"], kv, crossed)

    def complete(
        self, described: dict[str, Any], parts: Components, specs: Mapping[str, ComponentSpec]
    ) -> dict[str, Any]:
        vocabulary, hidden = next(parts.embed_tokens.parameters()).shape
        return described | {"hidden_size": hidden, "vocab_size": vocabulary}

    def record(
        self, artifact: Artifact, parts: Components, cases: Sequence[golden.Case], options: dict[str, Any]
    ) -> Iterator[int]:
        return golden.record(torch_session(artifact, parts), artifact.root, cases, options)

    def climb(self, artifact: Artifact) -> Iterator[ParityLevel]:
        return parity.climb(artifact)


def export(model: checkpoint.Checkpoint, target: Path, options: Options, report: Report) -> Artifact:
    """Writes the artefact `target`, whole or not at all. One that holds the same export already is left as it is."""
    return export_as(Generating(), model, target, options, report)


def export_as(kind: Kind, model: checkpoint.Checkpoint, target: Path, options: Options, report: Report) -> Artifact:
    """`export` of a model of any kind. One that is killed or interrupted goes on, when it is run again, from the graphs
    and goldens that were finished."""
    if (found := existing(model, target, options)) is not None:
        return found
    replaced = alone(target) if target.is_dir() else contextlib.nullcontext()  # not while it is measured
    with replaced, staged_folder(target, _key(model, options)) as stage:
        artifact = _lacking_its_ladder(stage) or _make(kind, model, stage, options, report)
        graph.forget()  # the ladder maps the weights from the files
        levels: list[ParityLevel] = []
        total = parity.height(artifact, options.cases)
        report("parity ladder", 0, total)
        for level in kind.climb(artifact):
            parity.require(level)
            levels.append(level)
            report("parity ladder", len(levels), total)
        peak = memory.peak_rss_bytes()
        manifest = replace(artifact.manifest, parity=tuple(levels), peak_memory_bytes=peak)
        write_record(stage / "manifest.json", manifest)
        shutil.rmtree(stage / _FINISHED, ignore_errors=True)
    return Artifact(target)


def _make(kind: Kind, model: checkpoint.Checkpoint, stage: Path, options: Options, report: Report) -> Artifact:
    """All but the parity ladder. PyTorch's model does not outlive this function."""
    finished = _take_up(stage, report)
    # What is quick to refuse comes first; graphs take a minute.
    kv = model.family.kv(inspection.sketch(model), options.capacity)
    inspection.require_memory(
        f"A KV cache of {kv.capacity:,} positions",
        4 * 2 * kv.layers * kv.kv_heads * kv.capacity * kv.head_dim,  # float32 keys and values
        "export with a smaller --capacity",
    )
    described = kind.describe(model, stage)
    cases = golden.write_pictures(stage, options.cases, options.picture_set)
    if kv.capacity:  # models that match have no cache
        _require_room(described, cases, stage, kv.capacity)
    report("loading the weights", 0, 0)
    with checkpoint.watched(lambda done, total: report("loading the weights", done, total)):
        torch_model = checkpoint.load_model(model)
    with inspection.making("config.json", model.folder):  # which may name sizes that do not go together
        parts = model.family.split(torch_model)
    modules = parts.items()
    specs: dict[str, ComponentSpec] = {}
    for index, (name, component) in enumerate(modules):
        if name not in finished:
            where = f"graph {index + 1} of {len(modules)}, {name}"
            if name == "vision_encoder":
                signature = graph.vision_signature(model.family.vision_inputs(torch_model))
            else:
                signature = kind.signature(name, parts, specs, kv)
            finished[name] = _write_graph(stage, kind.files[name], name, component, signature, where, report)
            write_record(stage / _FINISHED / f"{name}.json", finished[name])
        specs[name] = finished[name].spec
    manifest = Manifest(
        schema=SCHEMA,
        name=model.name,
        family=str(model.config["model_type"]),
        source=model.source,
        components=specs,
        kv=kv,
        parity=(),
        files=_files(stage, finished),
        versions=_versions(model),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **kind.complete(described, parts, specs),
    )
    write_record(stage / "manifest.json", manifest)
    report("goldens from PyTorch", 0, len(cases))
    for done in kind.record(Artifact(stage), parts, cases, golden_options(options)):
        report("goldens from PyTorch", done, len(cases))
    write_record(stage / "manifest.json", replace(manifest, files=_files(stage, finished)))
    return Artifact(stage)


def _require_room(described: dict[str, Any], cases: Sequence[golden.Case], stage: Path, capacity: int) -> None:
    """Raises where a golden case surely fills more than the KV cache."""
    prompt, prepare = described["prompt"], preprocessing.load(described["preprocessing"])
    tokenizer = Tokenizer(stage / "tokenizer.json")
    for case in cases:
        texts = prepare([open_image(stage / case.image)]).image_texts
        length = len(tokenizer.encode(render(prompt, case.prompt, texts)))
        if length - 1 > capacity:  # the decoder may not read the last token; `Session.check_length` is exact
            raise VlmcError(
                "A golden picture with its question is longer than the KV cache",
                found=f"{length} tokens",
                expected=f"at most {capacity}",
                fix="export with a larger --capacity, or with smaller --pictures",
            )


def _write_graph(
    stage: Path, file: str, name: str, component: nn.Module, signature: graph.Signature, where: str, report: Report
) -> Finished:
    report(f"{where}: tracing", 0, 0)
    exported = graph.export_component(name, component, signature)
    graph.save(exported, stage / file, lambda done, n: report(f"{where}: writing MB", done // 10**6, n // 10**6))
    spec = ComponentSpec(
        file=file,
        inputs=graph.tensor_specs(list(exported.graph.inputs)),
        outputs=graph.tensor_specs(list(exported.graph.outputs)),
        parameters=graph.count_parameters(component),
    )
    written = [path for path in (file, f"{file}.data") if (stage / path).exists()]
    return Finished(SCHEMA, spec, {path: _describe(stage / path) for path in written})


def _describe(path: Path) -> FileSpec:
    return FileSpec(sha256_of(path), path.stat().st_size)


def _files(stage: Path, finished: Mapping[str, Finished]) -> dict[str, FileSpec]:
    """Every file of the artefact; those of the graphs, which may be gigabytes, are not read again."""
    known = {name: spec for part in finished.values() for name, spec in part.files.items()}
    paths = [path for path in sorted(stage.rglob("*")) if path.is_file() and path.parent != stage / _FINISHED]
    names = {path.relative_to(stage).as_posix(): path for path in paths if path != stage / "manifest.json"}
    return {name: known.get(name) or _describe(path) for name, path in names.items()}


def _key(model: checkpoint.Checkpoint, options: Options) -> str:
    """Stands for all that decides what an export comes to."""
    decides = [to_json(model.source), options.capacity, golden_options(options), _versions(model)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _lacking_its_ladder(stage: Path) -> Artifact | None:
    """What a killed run left, where that is all but the parity ladder, every file checked."""
    with contextlib.suppress(VlmcError):
        artifact = Artifact(stage)
        for name in artifact.manifest.files:
            artifact.path_of(name)
        if "golden/golden.json" in artifact.manifest.files:
            return artifact
    return None


def _take_up(stage: Path, report: Report) -> dict[str, Finished]:
    """The graphs that a killed run had finished, every file of them checked; what else it left is removed."""
    finished: dict[str, Finished] = {}
    for record in sorted((stage / _FINISHED).glob("*.json")):
        report(f"checking the graph of {record.stem}, which is there", 0, 0)
        with contextlib.suppress(VlmcError):
            part = read_record(Finished, record)
            for name, known in part.files.items():
                check_file(inside(stage, name), known)
            finished[record.stem] = part
    whole = {stage / name for part in finished.values() for name in part.files}
    whole |= {stage / _FINISHED / f"{name}.json" for name in finished}
    for path in list(stage.rglob("*")):
        if path.is_file() and path not in whole:
            path.unlink()
    return finished


def existing(model: checkpoint.Checkpoint, target: Path, options: Options) -> Artifact | None:
    """The artefact at `target` where it holds this very export; anything else there is refused unless forced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not _is_artefact(target):
        raise VlmcError(f"{target} exists and is no artefact", fix="choose another folder with -o")
    if options.force:
        return None
    found = Artifact(target)
    try:
        for name in found.manifest.files:
            found.path_of(name)
    except VlmcError as error:
        fix = "replace it, engines and all, with --force"
        raise VlmcError(error.what, found=error.found, expected=error.expected, fix=fix) from None
    same = found.manifest.source.sha256 == model.source.sha256 and found.manifest.kv.capacity == options.capacity
    same = same and golden.made_from(found) == golden_options(options)
    if same and found.manifest.versions == _versions(model):
        return found
    raise VlmcError(
        f"{target} already holds an export of {found.manifest.name!r}, made from other weights, options or versions",
        fix="choose another folder with -o, or replace it, engines and all, with --force",
    )


def _is_artefact(folder: Path) -> bool:
    """Whether its manifest is one of vlmc's, of whatever schema."""
    with contextlib.suppress(VlmcError):
        manifest = read_json(folder / "manifest.json")
        return isinstance(manifest, dict) and manifest.keys() >= {"schema", "family", "components"}
    return False


def golden_options(options: Options) -> dict[str, Any]:
    """What the goldens are made with; `pictures` stands for the rows that are taken from a set and for their pixels,
    wherever the files lie."""
    pictures = "demo"
    if options.picture_set is not None:
        digest = hashlib.sha256()
        for image, prompt, task in golden.pictures(options.cases, options.picture_set):
            digest.update(f"{json.dumps([prompt, task])}\n{picture_hash(image)}\n".encode())
        pictures = digest.hexdigest()
    return {"pictures": pictures, "cases": options.cases, "max_new_tokens": options.max_new_tokens}


def _versions(model: checkpoint.Checkpoint) -> dict[str, str]:
    """Of all that makes the artefact, the family's own module included: its author changes nothing else."""
    return tool_versions() | {"family": sha256_of(Path(inspect.getfile(type(model.family))))[:12]}


def tool_versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
    return {"vlmc": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
