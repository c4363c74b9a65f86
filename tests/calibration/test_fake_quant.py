"""The fake-quant model computes what the plan says, no more and no less."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vlmc.calibration import recipes
from vlmc.calibration.calibrate import plan_for
from vlmc.calibration.fake_quant import QuantisedConv2d, QuantisedLinear, apply_plan
from vlmc.calibration.plan import ModulePlan, Plan
from vlmc.calibration.recipes import Recipe
from vlmc.calibration.sets import load_set
from vlmc.calibration.weights import dequantize_weight, quantize_weight
from vlmc.errors import VlmcError
from vlmc.records import SCHEMA
from vlmc.runtime.images import open_image


def plan_of(**modules: ModulePlan) -> Plan:
    return Plan(SCHEMA, Recipe("r", "", {}), "", None, {f"part/{path}": m for path, m in modules.items()}, {})


@pytest.fixture
def part() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 8, bias=False))


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 32), (4, 32), (4, 5)])
def test_the_weight_is_the_shared_definition_to_the_last_bit(part: nn.Module, bits: int, block: int) -> None:
    made = apply_plan(part, plan_of(**{"0": ModulePlan(bits, block)}), "part")
    values, scales = quantize_weight(part[0].weight.detach().numpy(), bits, block)
    assert isinstance(made[0], QuantisedLinear)
    assert made[0].values.dtype == torch.int8
    np.testing.assert_array_equal(made[0].weight().numpy(), dequantize_weight(values, scales, block))
    assert isinstance(made[2], nn.Linear)


@pytest.mark.parametrize("place", ["activation_scale", "output_scale"])
@pytest.mark.parametrize("kind", [nn.Linear, functools.partial(nn.Conv2d, kernel_size=1)])
def test_an_input_or_an_output_is_rounded_to_eight_bits_and_clipped(kind: Any, place: str) -> None:
    layer = kind(1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    made = apply_plan(nn.Sequential(layer), plan_of(**{"0": ModulePlan(8, 0, **{place: 0.5})}), "part")
    x = torch.tensor([0.0, 0.25, 0.26, -0.25, 0.75, -1.0, 63.5, 80.0, -64.0, -80.0])
    expected = torch.tensor([0.0, 0.0, 0.5, 0.0, 1.0, -1.0, 63.5, 63.5, -64.0, -64.0])
    found = made(x[:, None] if kind is nn.Linear else x[:, None, None, None]).flatten()
    torch.testing.assert_close(found, expected)


def test_an_output_is_rounded_with_its_bias(part: nn.Module) -> None:
    plain, rounded = (
        apply_plan(part, plan_of(**{"0": ModulePlan(8, 0, output_scale=scale)}), "part")[0] for scale in (None, 0.05)
    )
    x = torch.randn(7, 40)
    torch.testing.assert_close(rounded(x), (plain(x) / 0.05).round().clamp(-128, 127) * 0.05)
    assert part[0].bias.abs().min() > 0


def test_the_original_is_not_touched(part: nn.Module) -> None:
    before = part[0].weight.clone()
    plan = replace(plan_of(**{"0": ModulePlan(8, 0, smoothing=(2.0,) * 40)}), absorbers={"part/0": (2.0,) * 24})
    apply_plan(part, plan, "part")
    assert isinstance(part[0], nn.Linear)
    assert torch.equal(part[0].weight, before)


def test_a_convolution_is_quantised_by_output_channel() -> None:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2, padding="valid"))
    made = apply_plan(part, plan_of(**{"0": ModulePlan(8, 0, activation_scale=0.01)}), "part")
    x = torch.rand(1, 3, 6, 6)
    assert isinstance(made[0], QuantisedConv2d)
    assert made[0].scales.shape == (4, 1, 1)
    with torch.inference_mode():
        assert (made(x) - part(x)).abs().max() < 0.03
        assert not torch.equal(made(x), part(x))


class Wrapped(nn.Conv2d):
    """Pads by itself, as Gemma 3n's do."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(torch.nn.functional.pad(x, (0, 1, 0, 1), mode="circular"), weight, bias)


def test_a_kind_of_convolution_keeps_its_own_way_and_only_the_integers_of_its_weight() -> None:
    torch.manual_seed(0)
    part = nn.Sequential(Wrapped(3, 4, 2))
    made = apply_plan(part, plan_of(**{"0": ModulePlan(8, 0)}), "part")
    x = torch.rand(1, 3, 6, 6)
    with torch.inference_mode():
        assert (made(x) - part(x)).abs().max() < 0.03
    assert [name for name, _ in made.named_parameters()] == ["0.bias"]


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_computes_something_of_its_own_is_refused() -> None:
    with pytest.raises(VlmcError, match=r"part/0, which is no linear layer or convolution. Found: Doubled"):
        apply_plan(nn.Sequential(Doubled(4, 4)), plan_of(**{"0": ModulePlan(8, 0)}), "part")


def test_other_components_of_the_plan_do_not_matter(part: nn.Module) -> None:
    plan = replace(plan_of(), modules={"other/0": ModulePlan(8, 0)}, absorbers={"other/5": (1.0,)})
    assert isinstance(apply_plan(part, plan, "part")[0], nn.Linear)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_of(**{"7": ModulePlan(8, 0)}), "part/7, which the model does not have"),
        (replace(plan_of(), absorbers={"part/7": (1.0,)}), "part/7, which the model does not have"),
        (plan_of(**{"1": ModulePlan(8, 0)}), "part/1, which is no linear layer"),
        (plan_of(**{"0": ModulePlan(0, 0, smoothing=(1.0, 2.0))}), "part/0 with other channels"),
        (replace(plan_of(), absorbers={"part/0": (1.0, 2.0)}), "part/0 with other channels"),
        (replace(plan_of(), absorbers={"part/1": (1.0, 2.0)}), "part/1 with other channels"),
    ],
)
def test_a_plan_for_another_model_is_refused(part: nn.Module, plan: Plan, says: str) -> None:
    with pytest.raises(VlmcError, match=says):
        apply_plan(part, plan, "part")


@pytest.fixture
def run(components: Any, session: Any, set_file: Any) -> Any:
    """Vision features and prefill logits of the small VLM under a plan (None: float)."""
    data = load_set(set_file)
    inputs = session.prepare([open_image(data.rows[0].image)], "What does the picture show?")
    exact = session.vision.run(inputs.vision)["image_features"]
    embeds = torch.from_numpy(session.embed_prompt(inputs, exact)["inputs_embeds"])
    length = embeds.shape[1]

    def outputs(plan: Plan | None) -> tuple[torch.Tensor, torch.Tensor]:
        vision, decoder = components.vision_encoder, components.decoder
        if plan:
            vision, decoder = (apply_plan(m, plan, n) for n, m in components.items() if n != "embed_tokens")
        past = [torch.zeros(1, 2, length, 8) for _ in range(4)]
        with torch.inference_mode():
            features = vision(torch.from_numpy(inputs.vision["pixel_values"]))
            logits, _ = decoder(embeds, torch.arange(length)[None], torch.tensor([0]), torch.tensor([length - 1]), past)
        return features, logits

    def recipe_run(recipe: Recipe | None) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs(recipe and plan_for(session, components, recipe, data, lambda *_: None))

    return recipe_run


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_smoothing_without_quantisation_is_the_float_model(run: Any) -> None:
    int8 = recipes.load("int8")
    only_smoothed = {pattern: replace(rule, weight_bits=0, activation_bits=0) for pattern, rule in int8.rules.items()}
    for smoothed, exact in zip(run(replace(int8, rules=only_smoothed)), run(None), strict=True):
        assert (smoothed - exact).abs().max() < 1e-4 * exact.abs().max()
        assert not torch.equal(smoothed, exact)


@pytest.mark.parametrize(("name", "least"), [("int8", 0.999), ("w8", 0.999), ("w4", 0.97)])
def test_a_quantised_model_is_close_to_float_and_not_equal(run: Any, name: str, least: float) -> None:
    features, logits = run(recipes.load(name))
    exact_features, exact_logits = run(None)
    assert least < cosine(logits, exact_logits)
    assert not torch.equal(logits, exact_logits)
    assert least < cosine(features, exact_features)
    assert torch.equal(features, exact_features) == name.startswith("w")


def test_smoothing_helps_where_there_are_outliers(run: Any) -> None:
    exact = run(None)
    smooth, plain = run(recipes.load("int8")), run(recipes.load("int8-minmax"))
    for part in (0, 1):
        assert 1 - cosine(smooth[part], exact[part]) < (1 - cosine(plain[part], exact[part])) / 3


def test_fp32_changes_nothing(run: Any) -> None:
    for planned, exact in zip(run(recipes.load("fp32")), run(None), strict=True):
        assert torch.equal(planned, exact)
