"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): outliers move from activations into weights, in float exactly.

Whatever divides the input channels of a linear layer must be absorbed by the module that makes them. Which module
that is, is found by watching one run: `Trace` follows the output channels of every norm and linear layer through
operations that keep each channel to itself (reshapes, permutations, slices, products) into linear layers. A module
qualifies only if all it makes ends there, so that dividing it changes nothing else; then the same is known of a model
never seen before. For Llama's and SigLIP's layers this finds norm → q, k, v; norm → gate, up or fc1; up → down (the
product with the gate is linear in up; AWQ, arXiv:2306.00978); last norm → head or, through the pixel shuffle,
connector. Values → attention's output layer is left out: it would scale the KV cache, which all engines share.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..exporter.onnx_ops import is_rms_norm

# Operations that move whole channels about, by torch's names for them.
MOVES = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("transpose", "permute", "contiguous", "clone", "index_select", "__getitem__"),
}
METADATA = (torch.Size, torch.dtype, torch.device, torch.layout, bool, int)
_FLOOR = 1e-4  # of the largest channel: a channel that was silent in calibration may speak later


@dataclass(frozen=True)
class Group:
    """Linear layers whose input channels are all made by one module. `consumers`: for each of them, which of the
    producer's `channels` output channels each input channel is, int (in,)."""

    producer: str
    channels: int
    consumers: dict[str, NDArray[np.int64]]


class Trace(TorchFunctionMode):
    """While `watching()`, follows the channels of what runs; afterwards `groups()` has what was found.

    components: name → module; all names found are COMPONENT/MODULE.PATH.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._roots = list(components.values())
        modules = {f"{name}/{path}": m for name, root in components.items() for path, m in root.named_modules()}
        self._norms = {path: m for path, m in modules.items() if not isinstance(m, nn.Linear) and absorbs(m)}
        linears = [(path, m) for path, m in modules.items() if isinstance(m, nn.Linear)]
        uses = Counter(id(m.weight) for _, m in linears)
        self._linears = {id(m.weight): path for path, m in linears if uses[id(m.weight)] == 1}
        # tensor → its producer, and for every element the producer's channel that it comes from
        self._known: MutableMapping[Tensor, tuple[str, Tensor]] = WeakTensorKeyDictionary()
        self._channels: dict[str, int] = {}
        self._consumed: dict[str, tuple[str, NDArray[np.int64]]] = {}
        self._refused: set[str] = set()

    def groups(self) -> list[Group]:
        found: dict[str, dict[str, NDArray[np.int64]]] = {}
        for consumer, (producer, channels) in self._consumed.items():
            if producer and producer not in self._refused:
                found.setdefault(producer, {})[consumer] = channels
        return [Group(producer, self._channels[producer], consumers) for producer, consumers in found.items()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [norm.register_forward_hook(self._norm_hook(path)) for path, norm in self._norms.items()]
        hooks += [root.register_forward_hook(self._leave) for root in self._roots]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._known.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "linear" and id(args[1]) in self._linears:
            self._consume(self._linears[id(args[1])], args[0])
            self._produce(self._linears[id(args[1])], result)
            return result
        known = [self._known[t] for t in _tensors((args, kwargs)) if t in self._known]
        if not known or isinstance(result, METADATA):
            return result
        producer, channels = known[0]
        if name in MOVES and args[0] in self._known:
            name = "reshape" if name == "view" else name  # an expanded tensor has no such view
            self._known[result] = (producer, getattr(channels, name)(*args[1:], **kwargs))
        elif name == "mul" and len(known) == 1:
            self._known[result] = (producer, channels.expand(result.shape))
        else:
            self._refused.update(producer for producer, _ in known)
        return result

    def _norm_hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: self._produce(path, output)

    def _produce(self, path: str, output: Tensor) -> None:
        self._channels[path] = output.shape[-1]
        self._known[output] = (path, torch.arange(output.shape[-1]).expand(output.shape))

    def _consume(self, path: str, values: Tensor) -> None:
        producer, channels = "", np.empty(0, np.int64)
        if values in self._known:
            producer, every = self._known[values]
            rows = every.flatten(0, -2)
            channels = rows[0].numpy()
            if not bool((rows == rows[0]).all()):
                self._refused.add(producer)
        before = self._consumed.setdefault(path, (producer, channels))
        if before[0] != producer or not np.array_equal(before[1], channels):
            self._refused.update((producer, before[0]))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """What a component gives out is used by who knows whom."""
        self._refused.update(self._known[t][0] for t in _tensors(output) if t in self._known)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@torch.no_grad()
def absorbs(module: nn.Module) -> bool:
    """Whether dividing the module's weight and bias divides its output channels: true of linear layers, and of norms
    that multiply by their weight (not of those that multiply by 1 + weight) and are one node of the graph, where the
    plan is to find them (not of those that are written out in arithmetic)."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    one_node = type(module).forward is nn.LayerNorm.forward or is_rms_norm(module)
    if not one_node or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    divided = copy.deepcopy(module)
    divisor = torch.linspace(1, 2, len(weight))
    divide_outputs(divided, divisor)
    values = torch.linspace(-1, 1, len(weight))[None].sin()
    return bool(torch.allclose(divided(values) * divisor, module(values), atol=1e-5))


@torch.no_grad()
def divide_outputs(module: nn.Module, divisors: Tensor) -> None:
    """Divides the output channels of a linear layer or norm, in place."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    weight.div_(divisors.reshape(-1, *[1] * (weight.dim() - 1)))
    if isinstance(bias, Tensor):
        bias.div_(divisors)


@torch.no_grad()
def multiply_inputs(module: nn.Module, factors: Tensor) -> None:
    """Multiplies the input channels of a linear layer's weight, in place."""
    assert isinstance(module, nn.Linear)
    module.weight.mul_(factors)


def divisors(
    group: Group,
    peaks: Mapping[str, NDArray[np.float32]],
    weight_peaks: Mapping[str, NDArray[np.float32]],
    alpha: float,
) -> NDArray[np.float32]:
    """What each output channel of the group's producer is divided by, float32 (channels,).

    peaks, weight_peaks: of each consumer, the largest magnitude of every input channel, and of the weight's column
    for it, (in,). Per channel: peak^alpha / weight_peak^(1 - alpha) (eq. 4), each the largest over the consumers.
    """
    return (_largest(group, peaks) ** alpha / _largest(group, weight_peaks) ** (1 - alpha)).astype(np.float32)


def _largest(group: Group, peaks: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    largest = np.zeros(group.channels)
    for consumer, channels in group.consumers.items():
        np.maximum.at(largest, channels, peaks[consumer])
    return np.maximum(largest, _FLOOR * largest.max()) if largest.any() else np.ones(group.channels)
