"""Of every family of two encoders: an export is whole or absent, and its graphs compute what PyTorch does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from vlmc.artifact import Artifact, MatchSpec, Source
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, golden, matching
from vlmc.exporter.export import Options
from vlmc.exporter.matching import Encoders, MatchingFamily, export
from vlmc.files import sha256_of
from vlmc.records import FileSpec

PREPROCESSING = {
    "kind": "clip",
    "shortest_edge": 8,
    "tile": 8,
    "pad": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "image_seq_len": 1,
    "image_token": "",
}


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3 * 8 * 8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return nn.functional.normalize(self.projection(pixel_values.flatten(1)), dim=-1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(400, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.normalize(self.table(input_ids).mean(dim=1), dim=-1)


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pixels, self.words = Pixels(), Words()

    def set_attn_implementation(self, name: str) -> None:
        """It has none."""


class Family(MatchingFamily):
    """The smallest that there can be."""

    model_types: ClassVar[tuple[str, ...]] = ("toy",)

    def randomise(self, config: dict[str, Any], seed: int) -> nn.Module:
        return Model(seed)

    def encoders(self, model: Any) -> Encoders:
        return Encoders(model.pixels, model.words, logit_scale=torch.tensor(20.0), text_length=16, vocabulary=400)

    def image_size(self, model: Any) -> tuple[int, int]:
        return 8, 8


@pytest.fixture(scope="module")
def toy(processor_folder: Path) -> checkpoint.Checkpoint:
    """A checkpoint of the smallest family, with a tokenizer that writes nothing around a text."""
    preset = {"preprocessing": PREPROCESSING}
    return checkpoint.Checkpoint(
        "toy", Source("random", "toy", "0" * 64), {"model_type": "toy"}, processor_folder, preset
    )


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "family_for", lambda *_: Family())


@pytest.fixture
def options(picture_set: Path) -> Options:
    return Options(cases=3, picture_set=picture_set)


@pytest.fixture(scope="module")
def exported(toy: checkpoint.Checkpoint, picture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "family_for", lambda *_: Family())
        target = tmp_path_factory.mktemp("matching") / "toy"
        return export(toy, target, Options(cases=3, picture_set=picture_set), lambda *_: None)


@pytest.fixture
def traced_before(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds, and gives what it gave before."""
    monkeypatch.setattr(matching.graph, "export_component", lambda name, *_: ir.load(exported.graph(name)))


def test_the_artefact_holds_what_the_manifest_says_and_no_more(exported: Artifact) -> None:
    files = {path.relative_to(exported.root).as_posix() for path in exported.root.rglob("*") if path.is_file()}
    assert files == {*exported.manifest.files, "manifest.json"}
    assert list(exported.manifest.components) == ["vision_encoder", "text_encoder"]
    assert exported.manifest.components["text_encoder"].inputs[0].shape == ("texts", "length")
    assert exported.manifest.hidden_size == 4
    assert exported.manifest.kv.layers == 0
    assert exported.manifest.matching == MatchSpec(20.0, 16, (), (), 1)


def test_the_ladder_has_every_encoder_and_what_both_make_together(exported: Artifact) -> None:
    levels = [(level.level, level.component) for level in exported.manifest.parity]
    assert levels == [
        ("image_features of case 0", "vision_encoder"),
        ("text_features of case 0", "text_encoder"),
        ("image_features of case 1", "vision_encoder"),
        ("text_features of case 1", "text_encoder"),
        ("probabilities", "vision_encoder and text_encoder"),
    ]
    assert all(level.passed for level in exported.manifest.parity)


def test_the_last_rung_is_held_against_the_golden_cosines(exported: Artifact, tmp_path: Path) -> None:
    made = Artifact(Path(shutil.copytree(exported.root, tmp_path / "copy")))
    path = made.root / "golden" / "golden.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **arrays | {"cosines": arrays["cosines"][::-1]})
    made.manifest.files["golden/golden.npz"] = FileSpec(sha256_of(path), path.stat().st_size)
    *encoders, last = matching.climb(made)
    assert all(level.passed for level in encoders)
    assert (last.level, last.passed) == ("probabilities", False)


def test_goldens_are_pytorchs_cosines_of_every_picture_with_every_prompt(exported: Artifact) -> None:
    cases, arrays = golden.read(exported)
    assert len({case["prompt"] for case in cases}) == 3
    assert arrays["cosines"].shape == (3, 3)
    assert arrays["1.pixel_values"].shape == (1, 3, 8, 8)
    model = Model(0)
    with torch.no_grad():
        images = model.pixels(torch.from_numpy(arrays["1.pixel_values"]))
        text = model.words(torch.from_numpy(arrays["1.input_ids"]))
    np.testing.assert_allclose(arrays["1.image_features"], images.numpy(), atol=1e-6)
    np.testing.assert_allclose(arrays["1.text_features"], text.numpy(), atol=1e-6)
    np.testing.assert_allclose(arrays["cosines"][1, 1], (images @ text.T).item(), atol=1e-6)


@pytest.mark.parametrize(
    ("component", "level"),
    [("vision_encoder", "image_features of case 0"), ("text_encoder", "text_features of case 0")],
)
def test_a_graph_that_computes_something_else_stops_the_export(
    component: str, level: str, toy: Any, options: Options, exported: Artifact, tmp_path: Path, monkeypatch: Any
) -> None:
    def trace(name: str, *_: Any) -> ir.Model:
        model = ir.load(exported.graph(name))
        if name == component:
            weight = max(model.graph.initializers.values(), key=lambda value: value.const_value.size)
            weight.const_value = ir.tensor(np.roll(weight.const_value.numpy(), 1), name=weight.name)
        return model

    monkeypatch.setattr(matching.graph, "export_component", trace)
    with pytest.raises(VlmcError, match=f"{component} does not compute what PyTorch does .{level}"):
        export(toy, tmp_path / "out", options, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_the_same_export_is_left_as_it_is(
    toy: Any, options: Options, tmp_path: Path, traced_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export(toy, tmp_path / "out", options, lambda *_: None)
    before = (first.root / "manifest.json").read_bytes()
    monkeypatch.setattr(matching.graph, "export_component", None)
    # A cache's capacity means nothing here.
    export(toy, tmp_path / "out", replace(options, capacity=7, max_new_tokens=9), lambda *_: None)
    assert (first.root / "manifest.json").read_bytes() == before
    with pytest.raises(VlmcError, match="already holds an export of 'toy'"):
        export(toy, tmp_path / "out", replace(options, cases=2), lambda *_: None)


def test_features_that_are_no_numbers_are_refused(
    toy: Any, options: Options, tmp_path: Path, traced_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(0)
    model.pixels.projection.weight.data[:] = float("nan")
    monkeypatch.setattr(Family, "randomise", lambda *_: model)
    with pytest.raises(VlmcError, match="not finite"):
        export(toy, tmp_path / "out", options, lambda *_: None)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_no_model_has_is_refused(
    scale: float, toy: Any, options: Options, tmp_path: Path, traced_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(Family().encoders(Model(0)), logit_scale=torch.tensor(scale))
    monkeypatch.setattr(Family, "encoders", lambda *_: made)
    with pytest.raises(VlmcError, match="The checkpoint cannot match: its scale"):
        export(toy, tmp_path / "out", options, lambda *_: None)


def test_pictures_that_the_runtime_cannot_prepare_are_refused_before_anything_slow(
    toy: Any, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", None)
    broken = replace(toy, preset={"preprocessing": PREPROCESSING | {"tile": 0}})
    with pytest.raises(VlmcError, match=r"tile is out of range.*To mend it: fetch the checkpoint's files again"):
        export(broken, tmp_path / "out", options, lambda *_: None)


def test_progress_is_told(toy: Any, options: Options, tmp_path: Path, traced_before: None) -> None:
    told: list[str] = []
    export(toy, tmp_path / "out", options, lambda stage, done, total: told.append(stage))
    graphs = ("graph 1 of 2, vision_encoder", "graph 2 of 2, text_encoder")
    assert list(dict.fromkeys(told)) == [
        "loading the weights",
        *(f"{graph}: {what}" for graph in graphs for what in ("tracing", "writing MB")),
        "goldens from PyTorch",
        "parity ladder",
    ]
