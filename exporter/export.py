"""`vlmc export`: a checkpoint becomes an artefact with canonical graphs, goldens and a passed parity ladder."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..artifact import (
    GRAPH_FILES,
    SCHEMA,
    Artifact,
    ComponentSpec,
    Manifest,
    ParityLevel,
    describe_files,
    write_record,
)
from ..errors import VlmcError
from ..files import staged_folder
from ..runtime.session import Session
from . import checkpoint, golden, graph, parity, processor
from .family import Components
from .torch_runner import TorchDecoder, TorchRunner

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
    family = model.family
    report("loading the weights", 0, 1)
    torch_model = checkpoint.load_model(model)
    components = family.split(torch_model)
    kv = family.kv(torch_model, options.capacity)
    vocabulary, hidden = next(components.embed_tokens.parameters()).shape
    with staged_folder(target) as stage:
        specs = {}
        for index, (name, component) in enumerate(components.items()):
            report(f"exporting {name}", index, len(components.items()))
            example = graph.example_inputs(name, hidden, family.image_size(torch_model), kv)
            exported = graph.export_component(name, component, example, kv)
            graph.save(exported, stage / GRAPH_FILES[name])
            specs[name] = ComponentSpec(
                file=GRAPH_FILES[name],
                inputs=graph.tensor_specs(list(exported.graph.inputs)),
                outputs=graph.tensor_specs(list(exported.graph.outputs)),
                parameters=graph.count_parameters(component),
            )
        processor.save_tokenizer(model.folder, stage / "tokenizer.json")
        preprocessing, prompt = processor.describe(model.folder)
        if model.preset:
            preprocessing = preprocessing | model.preset["preprocessing"]
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
            versions=_versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        write_record(stage / "manifest.json", manifest)
        _write_goldens(stage, components, options, report)
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
    same = found.manifest.source.sha256 == model.source.sha256 and found.manifest.kv.capacity == options.capacity
    if same and found.manifest.versions == _versions():
        return found
    raise VlmcError(
        f"{target} already holds an export of {found.manifest.name!r}, made from other weights, options or versions",
        fix="choose another folder with -o, or replace it, engines and all, with --force",
    )


def torch_session(artifact: Artifact, components: Components) -> Session:
    """The PyTorch components as a session: the reference of everything."""
    embed = TorchRunner(components.embed_tokens, "inputs_embeds")
    return Session(
        artifact,
        vision=TorchRunner(components.vision_encoder, "image_features"),
        embed=embed,
        decoder=TorchDecoder(components.decoder, artifact.manifest.kv, embed),
    )


def _write_goldens(stage: Path, components: Components, options: Options, report: Report) -> None:
    cases = golden.write_pictures(stage, options.cases, options.picture_set)
    session = torch_session(Artifact(stage), components)
    report("goldens from PyTorch", 0, len(cases))
    for done in golden.record(session, stage, cases, options.max_new_tokens):
        report("goldens from PyTorch", done, len(cases))


def _climb(artifact: Artifact, report: Report) -> list[ParityLevel]:
    levels = []
    report("parity ladder", 0, 1)
    for level in parity.climb(artifact):
        parity.require(level)
        levels.append(level)
    return levels


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
    return {"vlmc": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
