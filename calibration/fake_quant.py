"""The fake-quant model: how quantisation is simulated in PyTorch today, made from the same plan as the engines.

Weights are kept as integers and turned back into floats at every call; inputs, and some outputs, are rounded to 8 bits
and back. It shows what a recipe costs in accuracy and, being slower than the float model, why a compiler is wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import VlmcError
from .plan import ModulePlan, Plan
from .smoothing import divide_outputs, multiply_inputs
from .weights import quantize_weight


class QuantisedLinear(nn.Module):
    """A linear layer with an integer weight and, unless they are None, the scales of its input and its output.

    Buffers: values int8 (out, groups, block), the last block filled up with zeros; scales float32 (out, groups, 1).
    """

    values: Tensor
    scales: Tensor

    def __init__(self, module: nn.Linear | nn.Conv2d, plan: ModulePlan) -> None:
        super().__init__()
        rows, place = module.weight.detach().flatten(1), module.weight.device
        values, scales = quantize_weight(rows.cpu().numpy(), plan.weight_bits, plan.block)
        self._shape, self._columns = module.weight.shape, rows.shape[1]
        size = plan.block or self._columns
        padded = functional.pad(torch.from_numpy(values).to(place), (0, -self._columns % size))
        self.register_buffer("values", padded.reshape(len(rows), -1, size))
        self.register_buffer("scales", torch.from_numpy(scales)[:, :, None].to(place))
        self.bias = module.bias
        self.activation_scale, self.output_scale = plan.activation_scale, plan.output_scale

    def weight(self) -> Tensor:
        """`weights.dequantize_weight`, in torch."""
        return (self.values * self.scales).flatten(1)[:, : self._columns].reshape(self._shape)

    def forward(self, x: Tensor) -> Tensor:
        return _rounded(self.product(_rounded(x, self.activation_scale)), self.output_scale)

    def product(self, x: Tensor) -> Tensor:
        """The layer's own arithmetic, between the roundings."""
        return functional.linear(x, self.weight(), self.bias)


class QuantisedConv2d(QuantisedLinear):
    """The same for a convolution, whose weight is taken as (out, in × height × width)."""

    def __init__(self, module: nn.Conv2d, plan: ModulePlan) -> None:
        super().__init__(module, plan)
        shape = copy.copy(module)  # of strides and padding, which a kind of convolution may have its own way with
        shape._parameters = {}
        self._convolve = shape._conv_forward

    def product(self, x: Tensor) -> Tensor:
        convolved: Tensor = self._convolve(x, self.weight(), self.bias)
        return convolved


def apply_plan(component: nn.Module, plan: Plan, name: str) -> nn.Module:
    """A copy of the component `name` with the plan's smoothing and quantised layers; what the plan does not name stays
    float and is shared with the component. A plan that names a module which the component lacks is a VlmcError."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*component.parameters(), *component.buffers())}
    made = copy.deepcopy(component, shared)
    for path, divisors in plan.absorbers.items():
        if path.startswith(f"{name}/"):
            module = _with_own_tensors(_find(made, path))
            divide_outputs(module, _fitting(divisors, module, 0, path))
    for path, entry in plan.modules.items():
        if path.startswith(f"{name}/"):
            module = _find(made, path)
            if entry.smoothing is not None:
                module = _with_own_tensors(module)
                multiply_inputs(module, _fitting(entry.smoothing, module, 1, path))
            if entry.weight_bits:  # what only shares the smoothing of others stays float
                parent, _, attribute = path.partition("/")[2].rpartition(".")
                setattr(made.get_submodule(parent), attribute, _quantised(module, entry, path))
    return made


def _rounded(x: Tensor, scale: float | None) -> Tensor:
    """x as 8-bit integers of that scale represent it; with None as it is."""
    return x if scale is None else torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)


def _find(component: nn.Module, path: str) -> nn.Module:
    try:
        return component.get_submodule(path.partition("/")[2])
    except AttributeError:
        raise VlmcError(
            f"The plan names the module {path}, which the model does not have", fix="run `vlmc calibrate` again"
        ) from None


def _with_own_tensors(module: nn.Module) -> nn.Module:
    """The module, its weight and bias copied, so that they can be changed in place."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
    return module


def _fitting(factors: Sequence[float], module: nn.Module, axis: int, path: str) -> Tensor:
    """The factors, one for each output (axis 0) or input channel (axis 1) of the module's weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape[axis : axis + 1] != (len(factors),):
        raise VlmcError(f"The plan smooths {path} with other channels than it has", fix="run `vlmc calibrate` again")
    return torch.tensor(factors)


def _quantised(module: nn.Module, plan: ModulePlan, path: str) -> QuantisedLinear:
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        return QuantisedConv2d(module, plan)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return QuantisedLinear(module, plan)
    raise VlmcError(f"The plan quantises {path}, which is no linear layer or convolution", found=type(module).__name__)
