"""`vlmc export` for families of two encoders (CLIP): what export.py does for those that generate.

golden/golden.json   the pictures with their prompts; every picture is matched with every prompt
golden/golden.npz    of the first cases what both encoders take and give; of all, the cosines
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import GRAPH_FILES, Artifact, ComponentSpec, KvSpec, MatchSpec, ParityLevel, PromptSpec
from ..console import Report
from ..errors import VlmcError, mended_by
from ..files import write_json
from ..runtime import preprocessing
from ..runtime.backends import onnxruntime as backend
from ..runtime.images import open_image
from ..runtime.matching import Matcher
from ..runtime.runner import Array
from . import checkpoint, golden, graph, parity, processor
from .export import Kind, Options, export_as
from .family import Family
from .inspection import AGAIN
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

    def map(self, change: Callable[[str, nn.Module], nn.Module]) -> Encoders:
        """Each encoder changed, called with its name."""
        made = {name: change(name, encoder) for name, encoder in self.items()}
        return replace(self, vision_encoder=made["vision_encoder"], text_encoder=made["text_encoder"])


class MatchingFamily(Family):
    """A family that matches pictures with texts and writes nothing."""

    @abstractmethod
    def encoders(self, model: nn.Module) -> Encoders:
        """The model's parts, sharing its weights."""

    def describe_pictures(self, folder: Path) -> dict[str, Any]:
        """The manifest's `preprocessing` for the checkpoint in `folder`; here of CLIP's picture processor."""
        return describe_pictures(folder)

    def split(self, model: nn.Module) -> Encoders:  # type: ignore[override]  # the other kind of parts
        return self.encoders(model)

    def kv(self, model: nn.Module, capacity: int) -> KvSpec:
        """None: nothing is decoded."""
        return KvSpec(layers=0, kv_heads=0, head_dim=0, capacity=0)


class Matching(Kind):
    files = FILES

    def describe(self, model: checkpoint.Checkpoint, stage: Path) -> dict[str, Any]:
        family = model.family
        assert isinstance(family, MatchingFamily)
        processor.save_tokenizer(model.folder, stage / "tokenizer.json")
        described = model.preset["preprocessing"] if model.preset else family.describe_pictures(model.folder)
        with mended_by(AGAIN):
            preprocessing.load(described)  # what the runtime would refuse is refused now
        return {
            "preprocessing": described,
            "prompt": PromptSpec(with_image="", text_only="{text}", image_token="", eos_token_ids=()),
            "matching": describe_texts(model.folder),
        }

    def signature(self, name: str, parts: Encoders, specs: Mapping[str, ComponentSpec], kv: KvSpec) -> graph.Signature:
        return text_signature(parts.text_length)

    def complete(
        self, described: dict[str, Any], parts: Encoders, specs: Mapping[str, ComponentSpec]
    ) -> dict[str, Any]:
        matching = MatchSpec(float(parts.logit_scale), parts.text_length, **described["matching"])
        if not matching.is_sound(parts.vocabulary):
            raise VlmcError(
                "The checkpoint cannot match: its scale or the tokens around a text are none that a model can have",
                found=str(matching),
                fix=AGAIN,
            )
        size = int(specs["vision_encoder"].outputs[0].shape[-1])
        return described | {"matching": matching, "hidden_size": size, "vocab_size": parts.vocabulary}

    def record(
        self, artifact: Artifact, parts: Encoders, cases: Sequence[golden.Case], options: dict[str, Any]
    ) -> Iterator[int]:
        return record(torch_matcher(artifact, parts), cases, options)

    def climb(self, artifact: Artifact) -> Iterator[ParityLevel]:
        return climb(artifact)


def export(model: checkpoint.Checkpoint, target: Path, options: Options, report: Report) -> Artifact:
    """Writes the artefact `target`, as `export.export` does. Of the options only cases, picture_set and force count; a
    golden picture is matched with every golden prompt."""
    return export_as(Matching(), model, target, replace(options, capacity=0, max_new_tokens=0), report)


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


def record(matcher: Matcher, cases: Sequence[golden.Case], options: dict[str, Any]) -> Iterator[int]:
    """Runs PyTorch over the cases and writes the goldens; yields the number of cases done."""
    folder, arrays, features = matcher.artifact.root, dict[str, Array](), []
    for index, case in enumerate(cases):
        inputs = {**matcher.preprocess([open_image(folder / case.image)]).vision}
        found = matcher.vision.run(inputs)
        features.append(found["image_features"])
        if index < golden.DETAILED:
            inputs["input_ids"] = matcher.encode([case.prompt])
            found |= matcher.text.run({"input_ids": inputs["input_ids"]})
            arrays |= {f"{index}.{name}": array for name, array in (inputs | found).items()}
        yield index + 1
    arrays["cosines"] = np.concatenate(features) @ matcher.text_features([case.prompt for case in cases]).T
    if not np.isfinite(arrays["cosines"]).all():
        raise VlmcError("The model's features are not finite numbers", fix="check the checkpoint's weights")
    np.savez(folder / "golden" / "golden.npz", **arrays)  # type: ignore[arg-type]  # numpy types `allow_pickle` alone
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
