"""A whole small VLM, its set, and the plan that comes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from vlmc.calibration import recipes
from vlmc.calibration.calibrate import plan_for
from vlmc.calibration.observation import Observation, layers_of
from vlmc.calibration.plan import Plan
from vlmc.calibration.recipes import Precision, Recipe
from vlmc.calibration.sets import CalibrationSet, load_set
from vlmc.calibration.smoothing import divide_outputs, multiply_inputs
from vlmc.errors import VlmcError
from vlmc.runtime.images import open_image

DOWN = "decoder/model.layers.1.mlp.down_proj"
QUERIES = "vision_encoder/vision_model.encoder.layers.1.self_attn.q_proj"
QK = ("q_proj", "k_proj")
FC1 = "vision_encoder/vision_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def data(set_file) -> CalibrationSet:
    return load_set(set_file)


@pytest.fixture
def plan(session, components, data) -> Any:
    def make(name: str, **changes: Any) -> Plan:
        return plan_for(session, components, replace(recipes.load(name), **changes), data, lambda *_: None)

    return make


def test_int8_plans_every_layer_but_the_patches(plan, components, artifact, data) -> None:
    made = plan("int8")
    quantised = {path for path, module in made.modules.items() if module.weight_bits}
    assert quantised == layers_of(components).keys() - {"vision_encoder/vision_model.embeddings.patch_embedding"}
    assert made.source_sha256 == artifact.manifest.source.sha256
    assert made.calibrated_on.sha256 == data.sha256
    assert made.calibrated_on.rows == 3
    assert made.calibrated_on.pictures == data.pictures
    assert made.notes == ()


def test_each_phase_is_observed_apart(plan) -> None:
    made = plan("int8-minmax")
    assert set(made.modules[FC1].peaks) == {"vision"}
    assert set(made.modules[DOWN].peaks) == {"prefill", "decode"}


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 3)], ids=["with answers", "without"])
def test_peaks_are_what_the_layers_got_step_by_step(session, components, data, rows: slice) -> None:
    """Calibration reads an answer in one call; here each of its tokens is a decode step, as it is when deployed."""
    seen = {"prefill": 0.0, "decode": 0.0}

    def hook(module: Any, args: tuple[torch.Tensor]) -> None:
        phase = "prefill" if args[0].shape[1] > 20 else "decode"
        seen[phase] = max(seen[phase], float(args[0].abs().max()))

    handle = components.decoder.get_submodule(DOWN.removeprefix("decoder/")).register_forward_pre_hook(hook)
    for row in data.rows[rows]:
        tokens = session.generate(session.prepare([open_image(row.image)], row.prompt), 32)
        if row.answer:
            next(tokens)
            for token in session.tokenizer.encode(" " + row.answer):
                session.decoder.feed(int(token))
        else:
            list(tokens)
    handle.remove()
    recipe, some = recipes.load("int8-minmax"), replace(data, rows=data.rows[rows])
    made = plan_for(session, components, recipe, some, lambda *_: None)
    assert made.modules[DOWN].peaks == pytest.approx(seen, rel=1e-5)


def test_a_scale_covers_the_larger_phase(plan) -> None:
    for observer in ("minmax", "mse"):
        for module in plan("int8", observer=observer).modules.values():
            assert module.activation_scale * 127 == pytest.approx(max(module.ranges.values()))
            assert (module.ranges == module.peaks) == (observer == "minmax")


@pytest.mark.parametrize("recipe", ["int8", "int8-minmax"])
def test_queries_and_keys_of_vision_alone_get_output_scales(plan, components, recipe: str) -> None:
    rounded = {path for path, module in plan(recipe).modules.items() if module.output_scale is not None}
    assert rounded == {path for path in layers_of(components) if path.startswith("vision") and path[-6:] in QK}
    assert len(rounded) == 4


def test_an_output_scale_covers_what_the_layer_made(plan, session, components, data) -> None:
    peak = 0.0

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal peak
        peak = max(peak, float(output.abs().max()))

    handle = components.vision_encoder.get_submodule(QUERIES.removeprefix("vision_encoder/")).register_forward_hook(
        hook
    )
    for row in data.rows:
        session.vision.run(session.prepare([open_image(row.image)], row.prompt).vision)
    handle.remove()
    assert plan("int8").modules[QUERIES].output_scale * 127 == pytest.approx(peak)
    assert plan("int8", observer="mse").modules[QUERIES].output_scale * 127 < 0.999 * peak


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_the_output_of_a_module_that_absorbs_smoothing_is_scaled_as_it_then_is(
    session, components, data, observer: str
) -> None:
    """`up_proj`, whose outputs are divided for `down_proj`, here by hand."""
    up = DOWN.replace("down", "up")
    smoothed = Precision(weight_bits=8, activation_bits=8, smooth=0.5, output_bits=8)
    recipe = Recipe("one", "", {up: smoothed, DOWN: smoothed}, observer)
    made = plan_for(session, components, recipe, data, lambda *_: None)
    pair = [components.decoder.get_submodule(path.removeprefix("decoder/")) for path in (up, DOWN)]
    weights = [layer.weight.clone() for layer in pair]
    divide_outputs(pair[0], torch.tensor(made.absorbers[up]))
    multiply_inputs(pair[1], torch.tensor(made.absorbers[up]))
    try:
        plain = replace(recipe, rules={up: replace(smoothed, smooth=0)})
        after = plan_for(session, components, plain, data, lambda *_: None)
    finally:
        for layer, weight in zip(pair, weights, strict=True):
            layer.weight.copy_(weight)
    assert made.modules[up].output_scale == pytest.approx(after.modules[up].output_scale, rel=1e-5)


def test_smoothing_tames_the_outliers(plan) -> None:
    plain, smooth = plan("int8-minmax").modules[FC1], plan("int8").modules[FC1]
    assert plain.smoothing is None
    assert plain.absorbed_by is None
    assert smooth.absorbed_by == "vision_encoder/vision_model.encoder.layers.0.layer_norm2"
    assert smooth.activation_scale < plain.activation_scale / 10


def test_absorbers_divide_by_what_the_layers_multiply_with(plan) -> None:
    made = plan("int8")
    for module in made.modules.values():
        if module.smoothing is not None:
            assert set(module.smoothing) == set(made.absorbers[module.absorbed_by])
    assert made.modules[DOWN].smoothing == made.absorbers["decoder/model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse"])
def test_an_observer_cuts_ranges_and_never_widens_them(plan, observer: str) -> None:
    made = plan("int8", observer=observer)
    shares = [module.ranges[phase] / peak for module in made.modules.values() for phase, peak in module.peaks.items()]
    # Peaks come of the channels' own, ranges of the histogram: the quotients round apart.
    assert max(shares) <= 1 + 1e-6
    assert min(shares) < 0.999
    assert made.recipe.observer == observer


def test_values_that_only_decoding_shows_are_noted_where_clipped(plan, monkeypatch) -> None:
    monkeypatch.setitem(__import__("vlmc.calibration.calibrate", fromlist=["_"]).RANGES, "mse", _blind_to_decoding())
    made = plan("int8-minmax", observer="mse")
    clipped = [p for p, m in made.modules.items() if m.peaks.get("decode", 0) > 1.001 * m.peaks.get("prefill", np.inf)]
    assert clipped
    (note,) = made.notes
    assert note.startswith(f"Values that only decoding showed are clipped in {clipped[0]}")


def _blind_to_decoding() -> Any:
    """An observer that keeps everything of large streams and nearly nothing of short ones."""
    return lambda seen: seen.peak if seen.counts.sum() > 2000 else seen.peak / 100


def test_weights_alone_need_no_set(session, components) -> None:
    made = plan_for(session, components, recipes.load("w4"), None, lambda *_: None)
    assert made.calibrated_on is None
    assert made.modules["decoder/lm_head"].weight_bits == 8
    assert made.modules[DOWN].weight_bits == 4
    assert made.modules[DOWN].activation_scale is None
    assert all(path.startswith("decoder/") for path in made.modules)
    assert plan_for(session, components, recipes.load("fp32"), None, lambda *_: None).modules == {}


def test_activations_need_a_set(session, components) -> None:
    with pytest.raises(VlmcError, match="'int8' needs a calibration set"):
        plan_for(session, components, recipes.load("int8"), None, lambda *_: None)


def test_a_layer_that_shares_the_smoothing_of_others_is_in_the_plan_though_it_stays_float(
    session, components, data
) -> None:
    layer = "decoder/model.layers.0.self_attn"
    smoothed = Precision(weight_bits=8, activation_bits=8, smooth=0.5)
    recipe = Recipe("one", "", {f"{layer}.q_proj": smoothed})
    made = plan_for(session, components, recipe, data, lambda *_: None)
    assert set(made.modules) == {f"{layer}.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    assert made.modules[f"{layer}.k_proj"].weight_bits == 0
    assert made.modules[f"{layer}.k_proj"].activation_scale is None
    assert made.modules[f"{layer}.k_proj"].smoothing == made.modules[f"{layer}.q_proj"].smoothing


def test_an_answer_longer_than_the_cache_is_read_as_far_as_it_goes(session, components, data) -> None:
    rows = (replace(data.rows[0], answer="yes " * session.decoder.capacity),)
    made = plan_for(session, components, recipes.load("int8-minmax"), replace(data, rows=rows), lambda *_: None)
    assert set(made.modules[DOWN].peaks) == {"prefill", "decode"}


def test_a_set_without_answers_follows_the_models_own(session, components, data) -> None:
    mute = replace(data, rows=data.rows[2:])
    made = plan_for(session, components, recipes.load("int8-minmax"), mute, lambda *_: None)
    assert set(made.modules[DOWN].peaks) == {"prefill", "decode"}


def test_a_model_that_says_nothing_is_noted(session, components, data, monkeypatch) -> None:
    monkeypatch.setattr(session, "generate", _only_the_first_token(session.generate))
    mute = replace(data, rows=data.rows[2:])
    (note,) = plan_for(session, components, recipes.load("int8-minmax"), mute, lambda *_: None).notes
    assert note.startswith("No decode step was observed")


def _only_the_first_token(generate: Any) -> Any:
    def one(inputs: Any, max_new_tokens: int = 1) -> Iterator[int]:
        yield from generate(inputs, 1)

    return one


def test_a_layer_that_makes_nan_is_named(session, components, data) -> None:
    weight = components.vision_encoder.get_submodule(QUERIES.removeprefix("vision_encoder/")).weight
    before = weight[0, 0].item()
    weight[0, 0] = float("nan")
    try:
        with pytest.raises(VlmcError, match=r"vision_encoder/.*layers\.1\.self_attn\.q_proj, vision: .* NaN"):
            Observation(session, components, data, lambda *_: None, outputs=[QUERIES]).peaks()
    finally:
        weight[0, 0] = before


def test_a_layer_that_turns_out_nan_is_named(session, components, data) -> None:
    weight = components.decoder.get_submodule("model.layers.1.mlp.up_proj").weight
    before = weight[0, 0].item()
    weight[0, 0] = float("nan")
    try:
        with pytest.raises(VlmcError, match=r"decoder/model\.layers\.1\.mlp\.down_proj, prefill: .* NaN"):
            Observation(session, components, data, lambda *_: None).peaks()
    finally:
        weight[0, 0] = before


def test_an_interrupted_run_leaves_no_hooks(session, components, data) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_for(session, components, recipes.load("int8"), data, interrupt)
    for _, component in components.items():
        for module in component.modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks


def test_the_same_set_gives_the_same_plan(plan) -> None:
    assert plan("int8") == plan("int8")
