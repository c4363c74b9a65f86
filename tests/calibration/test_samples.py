"""What is kept of a calibration set for TensorRT's own calibration: one tile a picture, bounded, and never mixed up."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vlmc.artifact import Artifact, TensorSpec
from vlmc.calibration import recipes, samples
from vlmc.calibration.calibrate import plan_for
from vlmc.calibration.plan import Plan, read_plan, write_plan
from vlmc.calibration.sets import CalibrationSet, load_set
from vlmc.errors import VlmcError
from vlmc.files import sha256_of
from vlmc.records import FileSpec
from vlmc.runtime.images import open_image


@pytest.fixture(scope="module")
def data(set_file: Path) -> CalibrationSet:
    return load_set(set_file)


@pytest.fixture
def artifact(artifact: Artifact, tmp_path: Path) -> Artifact:
    """A copy to write into."""
    return Artifact(Path(shutil.copytree(artifact.root, tmp_path / "tiny")))


@pytest.fixture
def planned(session: Any, components: Any, data: CalibrationSet) -> Any:
    """planned(rows=None, …): the plan of int8-implicit with the set's rows, or others, and the recipe changed so."""

    def make(rows: Any = None, **changes: Any) -> Plan:
        recipe = replace(recipes.load("int8-implicit"), **changes)
        some = data if rows is None else replace(data, rows=tuple(rows))
        return plan_for(session, components, recipe, some, lambda *_: None)

    return make


def files(artifact: Artifact) -> list[str]:
    return sorted(path.name for path in (artifact.root / "plans").glob("int8-implicit.*"))


def test_samples_are_one_tile_of_each_picture_another_place_each_time(
    planned: Any, session: Any, artifact: Artifact, data: CalibrationSet
) -> None:
    whole = session.preprocess

    def in_two_tiles(images: Any) -> Any:
        pixels = whole(images).vision["pixel_values"]
        return SimpleNamespace(vision={"pixel_values": np.concatenate([pixels, pixels / 2])})

    session.preprocess = in_two_tiles
    found = samples.read(artifact, planned(), "vision_encoder")
    assert len(found) == 3
    for sample, row, share in zip(found, data.rows, (1, 0.5, 1), strict=True):
        pixels = whole([open_image(row.image)]).vision["pixel_values"] * share
        assert sample.keys() == {"pixel_values"}
        assert sample["pixel_values"].dtype == np.float32
        assert sample["pixel_values"].shape == pixels.shape
        np.testing.assert_allclose(sample["pixel_values"], pixels, atol=1e-3)


def test_the_plan_has_no_numbers_and_says_what_was_seen(planned: Any, data: CalibrationSet) -> None:
    plan = planned()
    assert (plan.modules, plan.absorbers, list(plan.samples)) == ({}, {}, ["vision_encoder"])
    assert (plan.calibrated_on.sha256, plan.calibrated_on.rows) == (data.sha256, 3)
    assert plan == planned()


def test_a_large_set_is_cut(planned: Any, artifact: Artifact, data: CalibrationSet) -> None:
    plan = planned(rows=data.rows * 8)
    assert plan.calibrated_on.rows == samples.MOST
    assert len(samples.read(artifact, plan, "vision_encoder")) == samples.MOST


def test_until_a_new_plan_is_written_the_old_one_has_its_samples(
    planned: Any, artifact: Artifact, data: CalibrationSet
) -> None:
    write_plan(artifact, planned())
    other = planned(rows=data.rows[:1])
    assert len(samples.read(artifact, read_plan(artifact, "int8-implicit"), "vision_encoder")) == 3
    assert len(files(artifact)) == 3  # the plan, its samples, and those that no plan names yet
    (artifact.root / "plans" / "int8-implicit-minmax.vision_encoder.0.npz").touch()
    write_plan(artifact, other)
    assert len(samples.read(artifact, read_plan(artifact, "int8-implicit"), "vision_encoder")) == 1
    assert len(files(artifact)) == 2
    assert (artifact.root / "plans" / "int8-implicit-minmax.vision_encoder.0.npz").exists()


def test_altered_samples_are_refused(planned: Any, artifact: Artifact) -> None:
    plan = planned()
    path = artifact.root / "plans" / files(artifact)[-1]
    whole = path.read_bytes()
    for damaged, says in ((whole[:-1], "truncated"), (whole[:-1] + b"\1", "altered")):
        path.write_bytes(damaged)
        with pytest.raises(VlmcError, match=says):
            samples.read(artifact, plan, "vision_encoder")
    path.unlink()
    with pytest.raises(VlmcError, match="is missing"):
        samples.read(artifact, plan, "vision_encoder")


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_an_observer_that_tensorrt_has_not_is_refused(observer: str, planned: Any) -> None:
    with pytest.raises(
        VlmcError, match=rf"no calibrator of that kind\. Found: {observer}\. Expected: entropy or minmax"
    ):
        planned(observer=observer)


@pytest.mark.parametrize(
    "inputs",
    [
        (TensorSpec("pixel_values", "float32", ("tokens", "windows")),),
        (TensorSpec("pixel_values", "float32", ("tiles", 3)), TensorSpec("places", "int64", ("tiles",))),
    ],
)
def test_inputs_of_several_sizes_are_refused(
    inputs: tuple[TensorSpec, ...], planned: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(artifact.manifest.components["vision_encoder"], inputs=inputs)
    monkeypatch.setitem(artifact.manifest.components, "vision_encoder", spec)
    with pytest.raises(VlmcError, match=r"vision_encoder are no tiles of one size.*calibrate the recipe int8,"):
        planned()


def test_samples_of_another_form_are_refused(planned: Any, artifact: Artifact) -> None:
    plan = planned()
    path = artifact.root / "plans" / files(artifact)[-1]
    for array in (np.zeros((3, 3, 8, 8), np.float16), np.float16(1), np.array(["x"])):
        np.savez(path, pixel_values=array)
        spec = FileSpec(sha256_of(path), path.stat().st_size)
        named = Path(path.with_name(f"int8-implicit.vision_encoder.{spec.sha256[:12]}.npz"))
        named.write_bytes(path.read_bytes())
        with pytest.raises(VlmcError, match=r"The array pixel_values in .* is not what the model takes"):
            samples.read(artifact, replace(plan, samples={"vision_encoder": spec}), "vision_encoder")
