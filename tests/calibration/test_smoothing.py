"""Which module makes a layer's input is seen in one run; dividing there and multiplying here changes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from vlmc.calibration.observation import Observation
from vlmc.calibration.sets import load_set
from vlmc.calibration.smoothing import Group, Trace, absorbs, divide_outputs, divisors, multiply_inputs

WIDTH = 6
Forward = Callable[["Toy", Tensor], Tensor]


class Toy(nn.Module):
    """A norm and three linear layers, put together by the test."""

    def __init__(self, forward: Forward, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = norm or nn.LayerNorm(WIDTH)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self._forward = forward
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def traced(module: nn.Module) -> list[Group]:
    trace = Trace({"toy": module})
    with torch.inference_mode(), trace.watching():
        module(torch.randn(2, 4, WIDTH))
    return trace.groups()


def found(module: nn.Module) -> dict[str, set[str]]:
    return {group.producer: set(group.consumers) for group in traced(module)}


def test_layers_that_share_an_input_share_its_norm() -> None:
    toy = Toy(lambda m, x: functional.gelu(m.a(h := m.norm(x))) + functional.gelu(m.b(h)))
    assert found(toy) == {"toy/norm": {"toy/a", "toy/b"}}


def test_a_gate_leaves_the_other_factor_linear() -> None:
    toy = Toy(lambda m, x: m.c(functional.silu(m.a(x)) * m.b(x)) + 1)
    assert found(toy) == {"toy/b": {"toy/c"}}


def test_channels_are_followed_through_reshapes_and_slices() -> None:
    def shuffled(m: Toy, x: Tensor) -> Tensor:
        h = m.norm(x)[:, 1:].view(2, 3, 2, 3).transpose(2, 3).reshape(2, 3, WIDTH)
        return m.a(h.index_select(1, torch.tensor([0]))) + 1

    (group,) = traced(Toy(shuffled))
    assert group.consumers["toy/a"].tolist() == [0, 3, 1, 4, 2, 5]


def test_what_the_run_lets_go_is_not_kept() -> None:
    """Of a large model's first question that would be gigabytes."""
    made: list[weakref.ref[Tensor]] = []

    def forward(m: Toy, x: Tensor) -> Tensor:
        h = m.norm(x)
        made.append(weakref.ref(h))
        h = functional.gelu(m.a(h))
        assert made[0]() is None
        return h

    assert found(Toy(forward)) == {"toy/norm": {"toy/a"}}


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: x + m.a(h := m.norm(x)) + h, id="the norm is also a residual"),
        pytest.param(lambda m, x: m.a(m.norm(x) + x) + 1, id="something is added to it"),
        pytest.param(lambda m, x: (m.a(m.norm(x)), m.norm(x)), id="the component gives it out"),
        pytest.param(lambda m, x: m.a(functional.gelu(m.norm(x))) + 1, id="a function lies between"),
        pytest.param(lambda m, x: m.a(m.norm(x)) + m.a(x), id="the layer is also used elsewhere"),
        pytest.param(lambda m, x: m.a(torch.cat((m.norm(x), x), 1)) + 1, id="other values are put beside it"),
        pytest.param(lambda m, x: m.a(m.norm(x)) @ m.norm(x).mT, id="a product within the same channels"),
        pytest.param(lambda m, x: m.c(m.a(x) * m.b(x)) + 1, id="its factor could be divided, too, and both are known"),
        pytest.param(lambda m, x: m.a(m.norm(x).mul_(2)) + 1, id="it is changed in place"),
        pytest.param(lambda m, x: m.a(m.norm(x).transpose(1, 2)[..., :1].expand(2, 6, 6)) + 1, id="channels mix"),
        pytest.param(lambda m, x: functional.linear(m.norm(x), m.a.weight.clone()), id="a weight of no layer"),
        pytest.param(lambda m, x: x.clone().index_copy_(1, torch.arange(4), m.norm(x)), id="it is written elsewhere"),
    ],
)
def test_a_norm_that_something_else_needs_is_left_alone(forward: Forward) -> None:
    assert found(Toy(forward)) == {}


def test_layers_that_share_a_weight_are_left_alone() -> None:
    toy = Toy(lambda m, x: m.a(h := m.norm(x)) + m.b(h))
    toy.b.weight = toy.a.weight
    assert found(toy) == {}


def test_a_norm_that_multiplies_by_one_plus_its_weight_cannot_absorb() -> None:
    assert absorbs(LlamaRMSNorm(WIDTH))
    assert absorbs(nn.LayerNorm(WIDTH))
    gemma = GemmaRMSNorm(WIDTH)
    nn.init.ones_(gemma.weight)
    assert not absorbs(gemma)
    assert found(Toy(lambda m, x: m.a(m.norm(x)) + 1, norm=gemma)) == {}


class WrittenLayerNorm(nn.LayerNorm):
    """Which no graph has as one node: what it makes is arithmetic, as in transformers' Cohere2LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) + self.bias


class NamedLayerNorm(nn.LayerNorm):
    """That is torch's own, by another name."""


def test_a_norm_that_is_written_out_cannot_absorb() -> None:
    assert absorbs(NamedLayerNorm(WIDTH))
    assert not absorbs(WrittenLayerNorm(WIDTH))
    assert not absorbs(Cohere2LayerNorm(WIDTH))
    assert found(Toy(lambda m, x: m.a(m.norm(x)) + 1, norm=WrittenLayerNorm(WIDTH))) == {}


CASES: dict[str, Toy] = {
    "norm": Toy(lambda m, x: x + m.a(h := m.norm(x)) * functional.silu(m.b(h))),
    "gate": Toy(lambda m, x: m.c(m.b(h := m.norm(x)) * functional.gelu(m.a(h))) + x),
    "shuffle": Toy(lambda m, x: m.a(m.norm(x).view(2, 4, 3, 2).permute(0, 1, 3, 2).reshape(2, 4, WIDTH)) + x),
}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**31), st.floats(0.1, 0.9))
def test_smoothing_leaves_the_function_as_it_is(case: str, seed: int, alpha: float) -> None:
    """The law, for any activations seen: f(x) before and after differ by float rounding alone."""
    import copy

    toy, rng = copy.deepcopy(CASES[case]), np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(2, 4, WIDTH)).astype(np.float32))
    with torch.inference_mode():
        before = toy(x)
    groups = traced(toy)
    assert groups
    for group in groups:
        peaks = {path: np.exp(rng.normal(0, 3, WIDTH)).astype(np.float32) for path in group.consumers}
        modules = {path: toy.get_submodule(path[4:]) for path in group.consumers}
        columns = {path: module.weight.detach().abs().amax(0).numpy() for path, module in modules.items()}
        divided = divisors(group, peaks, columns, alpha)
        divide_outputs(toy.get_submodule(group.producer[4:]), torch.from_numpy(divided))
        for path, module in modules.items():
            multiply_inputs(module, torch.from_numpy(divided[group.consumers[path]]))
    with torch.inference_mode():
        assert (toy(x) - before).abs().max() < 1e-4 * (1 + before.abs().max())


def test_alpha_shares_the_range_between_activations_and_weights() -> None:
    group = Group("norm", 3, {"a": np.array([0, 1, 2]), "b": np.array([0, 1, 2])})
    peaks = {"a": np.array([100, 1, 4], np.float32), "b": np.array([100, 1, 4], np.float32)}
    columns = {"a": np.array([1, 1, 0.25], np.float32), "b": np.array([0.5, 0.25, 1], np.float32)}
    np.testing.assert_allclose(divisors(group, peaks, columns, 0.5), [10, 1, 2], rtol=1e-6)
    columns["a"] = columns["b"] = np.array([16, 1, 1], np.float32)
    np.testing.assert_allclose(divisors(group, peaks, columns, 1.0), [100, 1, 4], rtol=1e-6)
    np.testing.assert_allclose(divisors(group, peaks, columns, 0.75), [100**0.75 / 2, 1, 4**0.75], rtol=1e-6)


def test_a_silent_channel_is_not_blown_up() -> None:
    group = Group("norm", 3, {"a": np.array([0, 1, 2])})
    one = np.ones(3, np.float32)
    quiet = divisors(group, {"a": np.array([0, 1, 100], np.float32)}, {"a": one}, 0.5)
    assert quiet[0] == pytest.approx(0.1)  # as if it had reached a ten-thousandth of the loudest
    assert divisors(group, {"a": 0 * one}, {"a": one}, 0.5).tolist() == [1, 1, 1]


def test_a_whole_vlm_shows_every_norm_gate_and_connector(session, components, set_file) -> None:
    groups = Observation(session, components, load_set(set_file), lambda *_: None).groups()
    seen = {group.producer: set(group.consumers) for group in groups}
    vision, text = "vision_encoder/vision_model.encoder.layers", "decoder/model.layers"
    expected = {
        "vision_encoder/vision_model.post_layernorm": {"vision_encoder/connector.modality_projection.proj"},
        "decoder/model.norm": {"decoder/lm_head"},
    }
    for i in (0, 1):
        qkv = ("q_proj", "k_proj", "v_proj")
        mlp = f"{text}.{i}.mlp"
        expected |= {
            f"{vision}.{i}.layer_norm1": {f"{vision}.{i}.self_attn.{name}" for name in qkv},
            f"{vision}.{i}.layer_norm2": {f"{vision}.{i}.mlp.fc1"},
            f"{text}.{i}.input_layernorm": {f"{text}.{i}.self_attn.{name}" for name in qkv},
            f"{text}.{i}.post_attention_layernorm": {f"{mlp}.gate_proj", f"{mlp}.up_proj"},
            f"{mlp}.up_proj": {f"{mlp}.down_proj"},
        }
    assert seen == expected
