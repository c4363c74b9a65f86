"""`vlmc export` for families of two encoders (CLIP): graphs, goldens and the parity ladder, as export.py has them for
those that generate.

golden/golden.json   the pictures with their prompts; every picture is matched with every prompt
golden/golden.npz    of the first cases what both encoders take and give; of all, the cosines
"""

from __future__ import annotations

import datetime
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    to_json,
)
from ..errors import VlmcError
from ..files import staged_folder, write_json
from ..runtime import preprocessing
from ..runtime.backends import onnxruntime as backend
from ..runtime.images import open_image
from ..runtime.matching import Matcher, MatchSpec
from ..runtime.runner import Array
from . import checkpoint, golden, graph, parity, processor
from .export import Options, Report, existing, golden_options, tool_versions
from .family import Family, VisionInput
from .torch_runner import TorchRunner

FILES = {"vision_encoder": GRAPH_FILES["vision_encoder"], "text_encoder": "onnx/text_model.onnx"}


@dataclass(frozen=True)
class Encoders:
    """A model's parts as float32 modules in evaluation mode, and what is done with their outputs.

    vision_encoder: pixel_values (tiles, 3, height, width) → image_features (tiles, dim), a tile a picture.
    text_encoder: input_ids (texts, length) → text_features (texts, dim), length at most `text_length`.
    Features are of length 1; `logit_scale` () times their product is what the softmax takes. `vocabulary`: its size.
    """

    vision_encoder: nn.Module
    text_encoder: nn.Module
    logit_scale: Tensor
    text_length: int
    vocabulary: int

    def __post_init__(self) -> None:
        for _, component in self.items():
            component.eval()  # the wrappers are new and would be in training mode

    def items(self) -> list[tuple[str, nn.Module]]:
        return [(name, getattr(self, name)) for name in FILES]


class MatchingFamily(Family):
    """A family that matches pictures with texts and writes nothing."""

    @abstractmethod
    def encoders(self, model: nn.Module) -> Encoders:
        """The model's parts, sharing its weights."""

    def split(self, model: nn.Module) -> Encoders:  # type: ignore[override]
        return self.encoders(model)

    def kv(self, model: nn.Module, capacity: int) -> KvSpec:
        """None: nothing is decoded."""
        return KvSpec(layers=0, kv_heads=0, head_dim=0, capacity=0)


def export(model: checkpoint.Checkpoint, target: Path, options: Options, report: Report) -> Artifact:
    """Writes the artefact `target`, whole or not at all. One that holds the same export already is left as it is.
    Of the options only cases, picture_set and force count; a golden picture is matched with every golden prompt."""
    family, options = model.family, replace(options, capacity=0, max_new_tokens=0)
    assert isinstance(family, MatchingFamily)
    if (found := existing(model, target, options)) is not None:
        return found
    with staged_folder(target) as stage:
        processor.save_tokenizer(model.folder, stage / "tokenizer.json")
        described = model.preset["preprocessing"] if model.preset else describe_pictures(model.folder)
        preprocessing.load(described)  # what the runtime would refuse is refused now
        around = describe_texts(model.folder)
        cases = golden.write_pictures(stage, options.cases, options.picture_set)
        report("loading the weights", 0, 1)
        torch_model = checkpoint.load_model(model)
        encoders = family.encoders(torch_model)
        specs = _write_graphs(stage, encoders, family.vision_inputs(torch_model), report)
        manifest = Manifest(
            schema=SCHEMA,
            name=model.name,
            family=str(model.config["model_type"]),
            source=model.source,
            components=specs,
            kv=family.kv(torch_model, 0),
            hidden_size=int(specs["vision_encoder"].outputs[0].shape[-1]),
            vocab_size=encoders.vocabulary,
            preprocessing=described,
            prompt=PromptSpec(with_image="", text_only="{text}", image_token="", eos_token_ids=()),
            parity=(),
            files=describe_files(stage),
            versions=tool_versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        matching = MatchSpec(logit_scale=float(encoders.logit_scale), text_length=encoders.text_length, **around)
        _write(stage, manifest, matching)
        _write_goldens(torch_matcher(Artifact(stage), encoders), cases, golden_options(options), report)
        manifest = replace(manifest, files=describe_files(stage))
        _write(stage, manifest, matching)
        report("parity ladder", 0, 1)
        levels = []
        for level in climb(Artifact(stage)):
            parity.require(level)
            levels.append(level)
        _write(stage, replace(manifest, parity=tuple(levels)), matching)
    return Artifact(target)


def _write(stage: Path, manifest: Manifest, matching: MatchSpec) -> None:
    write_json(stage / "manifest.json", to_json(manifest) | {"matching": to_json(matching)})


def describe_pictures(folder: Path) -> dict[str, Any]:
    """The manifest's `preprocessing` for the checkpoint in `folder`: a square a picture, and no text that stands for
    it. What is missing, broken or not supported is a VlmcError."""
    from transformers import AutoImageProcessor

    with processor.reading("picture processor", folder):
        pictures = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
        kind = type(pictures).__name__.removesuffix("Pil")
        if kind != "CLIPImageProcessor":
            raise VlmcError(
                f"vlmc cannot prepare pictures as {folder} wants it", found=kind, expected="CLIPImageProcessor"
            )
        values: dict[str, Any] = pictures.to_dict()
        crop = dict(values["crop_size"] or {})
        return processor.describe_clip(values, {"patch_size": crop.get("height", 1), "image_token": ""}, None)


def describe_texts(folder: Path) -> dict[str, Any]:
    """MatchSpec's token ids for the checkpoint's tokenizer: what it writes before, behind and after every text."""
    tokenizer = processor.read_tokenizer(folder)
    with processor.reading("tokenizer", folder):
        text = "a picture"
        plain, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        if tokenizer.pad_token_id is None:
            raise VlmcError(f"The tokenizer in {folder} names no pad_token", fix="set it in tokenizer_config.json")
        return {
            "begin_token_ids": tuple(whole[:start]),
            "end_token_ids": tuple(whole[start + len(plain) :]),
            "pad_token_id": int(tokenizer.pad_token_id),
        }


def _write_graphs(
    stage: Path, encoders: Encoders, vision_inputs: dict[str, VisionInput], report: Report
) -> dict[str, ComponentSpec]:
    signatures = {
        "vision_encoder": graph.vision_signature(vision_inputs),
        "text_encoder": text_signature(encoders.text_length),
    }
    specs = {}
    for index, (name, component) in enumerate(encoders.items()):
        report(f"exporting {name}", index, len(signatures))
        exported = graph.export_component(name, component, signatures[name])
        graph.save(exported, stage / FILES[name])
        specs[name] = ComponentSpec(
            file=FILES[name],
            inputs=graph.tensor_specs(list(exported.graph.inputs)),
            outputs=graph.tensor_specs(list(exported.graph.outputs)),
            parameters=graph.count_parameters(component),
        )
    return specs


def text_signature(longest: int) -> graph.Signature:
    """Of the text encoder."""
    free = {0: torch.export.Dim("texts"), 1: torch.export.Dim("length", max=longest)}
    return graph.Signature(["input_ids"], ["text_features"], (torch.zeros(3, 7, dtype=torch.long),), (free,))


def torch_matcher(artifact: Artifact, encoders: Encoders) -> Matcher:
    """A matcher that runs these encoders in eager PyTorch: the reference of everything."""
    specs = artifact.manifest.components
    vision, text = (TorchRunner(component, specs[name]) for name, component in encoders.items())
    return Matcher(artifact, vision, text)


def canonical_matcher(artifact: Artifact) -> Matcher:
    """The artefact's own float graphs, run as they are."""
    vision, text = (backend.OnnxRunner(backend.session(artifact.graph(n), parity.SETTINGS)) for n in FILES)
    return Matcher(artifact, vision, text)


def _write_goldens(matcher: Matcher, cases: Sequence[golden.Case], options: dict[str, Any], report: Report) -> None:
    folder, arrays, features = matcher.artifact.root, dict[str, Array](), []
    for index, case in enumerate(cases):
        report("goldens from PyTorch", index, len(cases))
        inputs = {**matcher.preprocess([open_image(folder / case.image)]).vision}
        found = matcher.vision.run(inputs)
        features.append(found["image_features"])
        if index < golden.DETAILED:
            inputs["input_ids"] = matcher.encode([case.prompt])
            found |= matcher.text.run({"input_ids": inputs["input_ids"]})
            arrays |= {f"{index}.{name}": array for name, array in (inputs | found).items()}
    arrays["cosines"] = np.concatenate(features) @ matcher.text_features([case.prompt for case in cases]).T
    if not np.isfinite(arrays["cosines"]).all():
        raise VlmcError("The model's features are not finite numbers", fix="check the checkpoint's weights")
    np.savez(folder / "golden" / "golden.npz", **arrays)  # type: ignore[arg-type]
    rows = [{"image": case.image, "prompt": case.prompt, "task": case.task} for case in cases]
    write_json(folder / "golden" / "golden.json", {"made_from": options, "cases": rows})


def climb(artifact: Artifact) -> Iterator[ParityLevel]:
    """Yields the levels in order: each encoder's features on the detailed cases, then the probabilities of all pictures
    over all prompts."""
    cases, arrays = golden.read(artifact)
    matcher = canonical_matcher(artifact)
    for index in range(min(golden.DETAILED, len(cases))):
        for component, runner, read, made in (
            ("vision_encoder", matcher.vision, "pixel_values", "image_features"),
            ("text_encoder", matcher.text, "input_ids", "text_features"),
        ):
            found = runner.run({read: arrays[f"{index}.{read}"]})[made]
            yield parity.compare(f"{made} of case {index}", component, arrays[f"{index}.{made}"], found)
    pictures = [open_image(artifact.root / case["image"]) for case in cases]
    matches = matcher.match(pictures, [case["prompt"] for case in cases])
    expected = replace(matches, cosines=arrays["cosines"]).probabilities
    yield parity.compare("probabilities", "vision_encoder and text_encoder", expected, matches.probabilities)
