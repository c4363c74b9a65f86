"""`vlmc export`: a checkpoint becomes an artefact with canonical graphs, goldens and a passed parity ladder."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact import (
    GRAPH_FILES,
    SCHEMA,
    Artifact,
    ComponentSpec,
    KvSpec,
    Manifest,
    ParityLevel,
    PromptSpec,
    describe_files,
    write_record,
)
from ..errors import VlmcError
from ..files import sha256_of, staged_folder
from ..runtime.session import Session
from . import checkpoint, golden, graph, parity, processor
from .family import Components, VisionInput
from .torch_runner import torch_session

Report = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Options:
    """capacity: positions of the KV cache. cases: golden pictures. picture_set: JSONL to take them from, or None for
    the demo's. max_new_tokens: of each golden answer."""

    capacity: int = 1024
    cases: int = 16
    picture_set: Path | None = None
    max_new_tokens: int = 32
    force: bool = False


def export(model: checkpoint.Checkpoint, target: Path, options: Options, report: Report) -> Artifact:
    """Writes the artefact `target`, whole or not at all. One that holds the same export already is left as it is."""
    if (found := existing(model, target, options)) is not None:
        return found
    with staged_folder(target) as stage:
        # What is quick to refuse comes first; graphs take a minute.
        preprocessing, prompt = _describe_inputs(model, stage)
        cases = golden.write_pictures(stage, options.cases, options.picture_set)
        report("loading the weights", 0, 1)
        torch_model = checkpoint.load_model(model)
        components = model.family.split(torch_model)
        kv = model.family.kv(torch_model, options.capacity)
        vocabulary, hidden = next(components.embed_tokens.parameters()).shape
        specs = _write_graphs(stage, components, model.family.vision_inputs(torch_model), kv, report)
        manifest = Manifest(
            schema=SCHEMA,
            name=model.name,
            family=str(model.config["model_type"]),
            source=model.source,
            components=specs,
            kv=kv,
            hidden_size=hidden,
            vocab_size=vocabulary,
            preprocessing=preprocessing,
            prompt=prompt,
            parity=(),
            files=describe_files(stage),
            versions=tool_versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        write_record(stage / "manifest.json", manifest)
        _write_goldens(stage, torch_session(Artifact(stage), components), cases, options, report)
        manifest = replace(manifest, files=describe_files(stage))
        write_record(stage / "manifest.json", manifest)
        levels = _climb(Artifact(stage), report)
        write_record(stage / "manifest.json", replace(manifest, parity=tuple(levels)))
    return Artifact(target)


def existing(model: checkpoint.Checkpoint, target: Path, options: Options) -> Artifact | None:
    """The artefact at `target` where it holds this very export; anything else there is refused unless forced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / "manifest.json").is_file():
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
    if same and found.manifest.versions == tool_versions():
        return found
    raise VlmcError(
        f"{target} already holds an export of {found.manifest.name!r}, made from other weights, options or versions",
        fix="choose another folder with -o, or replace it, engines and all, with --force",
    )


def _describe_inputs(model: checkpoint.Checkpoint, stage: Path) -> tuple[dict[str, Any], PromptSpec]:
    """Writes the tokenizer; returns the manifest's `preprocessing` and `prompt`."""
    processor.save_tokenizer(model.folder, stage / "tokenizer.json")
    preprocessing, prompt = processor.describe(model.folder)
    return preprocessing | (model.preset["preprocessing"] if model.preset else {}), prompt


def _write_graphs(
    stage: Path, components: Components, vision_inputs: dict[str, VisionInput], kv: KvSpec, report: Report
) -> dict[str, ComponentSpec]:
    specs: dict[str, ComponentSpec] = {}
    for index, (name, component) in enumerate(components.items()):
        report(f"exporting {name}", index, len(components.items()))
        if name == "vision_encoder":
            signature = graph.vision_signature(vision_inputs)
        elif name == "embed_tokens":
            signature = graph.embed_signature(component)
        elif name == "fusion":
            signature = graph.fusion_signature(specs["vision_encoder"], int(specs["embed_tokens"].outputs[0].shape[-1]))
        else:
            signature = graph.decoder_signature(component, specs["embed_tokens"], kv, specs["vision_encoder"])
        exported = graph.export_component(name, component, signature)
        graph.save(exported, stage / GRAPH_FILES[name])
        specs[name] = ComponentSpec(
            file=GRAPH_FILES[name],
            inputs=graph.tensor_specs(list(exported.graph.inputs)),
            outputs=graph.tensor_specs(list(exported.graph.outputs)),
            parameters=graph.count_parameters(component),
        )
    return specs


def golden_options(options: Options) -> dict[str, Any]:
    pictures = sha256_of(options.picture_set) if options.picture_set else "demo"
    return {"pictures": pictures, "cases": options.cases, "max_new_tokens": options.max_new_tokens}


def _write_goldens(stage: Path, session: Session, cases: list[golden.Case], options: Options, report: Report) -> None:
    report("goldens from PyTorch", 0, len(cases))
    for done in golden.record(session, stage, cases, golden_options(options)):
        report("goldens from PyTorch", done, len(cases))


def _climb(artifact: Artifact, report: Report) -> list[ParityLevel]:
    levels = []
    report("parity ladder", 0, 1)
    for level in parity.climb(artifact):
        parity.require(level)
        levels.append(level)
    return levels


def tool_versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
    return {"vlmc": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
