"""Recipes are found by their file's name, and their first matching rule counts."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from vlmc.calibration import recipes
from vlmc.calibration.recipes import FLOAT, Precision, Recipe
from vlmc.errors import VlmcError


def test_every_file_is_a_recipe_of_its_name() -> None:
    assert recipes.names() == ["fp32", "int8", "int8-implicit", "int8-implicit-minmax", "int8-minmax", "w4", "w8"]
    for name in recipes.names():
        recipe = recipes.load(name)
        assert recipe.name == name
        assert recipe.about


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(VlmcError, match="did you mean int8-minmax"):
        recipes.load("int8-minmx")


def test_the_first_rule_that_matches_counts() -> None:
    recipe = Recipe("r", "", {"decoder/lm_head": Precision(8), "decoder/*": Precision(4, 32)})
    assert recipe.precision("decoder/lm_head") == Precision(8)
    assert recipe.precision("decoder/model.layers.0.mlp.up_proj") == Precision(4, 32)
    assert recipe.precision("vision_encoder/fc1") == FLOAT


@pytest.mark.parametrize(
    ("name", "needs"), [("fp32", False), ("w8", False), ("w4", False), ("int8", True), ("int8-implicit", True)]
)
def test_only_activations_need_data(name: str, needs: bool) -> None:
    assert recipes.load(name).needs_data == needs


def test_int8_leaves_the_patch_convolution_and_takes_the_head() -> None:
    recipe = recipes.load("int8")
    assert recipe.precision("vision_encoder/vision_model.embeddings.patch_embedding") == FLOAT
    assert recipe.precision("decoder/lm_head") == Precision(weight_bits=8, activation_bits=8, smooth=0.65)


@pytest.mark.parametrize("name", ["int8", "int8-minmax"])
@pytest.mark.parametrize("component", ["vision_encoder", "text_encoder", "fusion", "decoder"])
def test_int8_takes_every_component_also_those_that_few_models_have(name: str, component: str) -> None:
    assert recipes.load(name).precision(f"{component}/layers.0.mlp.fc1").activation_bits == 8


@pytest.mark.parametrize("name", ["int8", "int8-minmax"])
def test_int8_takes_what_makes_vision_attentions_queries_and_keys_and_no_other_output(name: str) -> None:
    recipe = recipes.load(name)
    attention = "vision_encoder/vision_model.encoder.layers.0.self_attn"
    other = recipe.precision(f"{attention}.v_proj")
    assert other.output_bits == 0
    for path in (f"{attention}.q_proj", f"{attention}.k_proj", "vision_encoder/compressor.q_proj"):
        assert recipe.precision(path) == replace(other, output_bits=8)
    assert recipe.precision("decoder/model.layers.0.self_attn.q_proj") == other


@pytest.mark.parametrize("precision", [Precision(8, output_bits=8), Precision(8, smooth=0.5)])
def test_an_output_and_smoothing_need_data_too(precision: Precision) -> None:
    assert Recipe("r", "", {"*": precision}).needs_data


@pytest.mark.parametrize(
    ("name", "kind"), [("fp32", "fp32"), ("int8", "int8"), ("int8-implicit", "int8"), ("w8", "w8"), ("w4", "w4")]
)
def test_what_a_device_has_to_take_for_it_follows_from_its_rules(name: str, kind: str) -> None:
    assert recipes.load(name).kind == kind


def test_a_recipe_that_calls_itself_by_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("vlmc.calibration.recipes.w4")
    monkeypatch.setattr(module, "RECIPE", replace(module.RECIPE, name="w8"))
    with pytest.raises(VlmcError, match="of 'w4' calls itself 'w8'"):
        recipes.load("w4")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("RECIPE = (", r"Found: SyntaxError: '\(' was never closed \(mine\.py, line 1\)"),
        ("RECIPE = Recipe('mine', '', {})", "Found: NameError: name 'Recipe' is not defined"),
        ("", "Found: AttributeError: .*RECIPE"),
        ("RECIPE = 8", "Found: a RECIPE of type int. Expected: a Recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_what_is_wrong_in_it(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "__path__", [str(tmp_path)])
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.delitem(sys.modules, f"{recipes.__name__}.mine", raising=False)  # the case before this one
    with pytest.raises(VlmcError, match=rf"{tmp_path / 'mine.py'} is no recipe\. {says}"):
        recipes.load("mine")
