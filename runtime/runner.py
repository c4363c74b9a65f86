"""The contract that every backend and every PyTorch baseline fulfils, so that all are measured by one clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..artifact import CROSSED, ComponentSpec, TensorSpec
from ..errors import VlmcError
from ..records import REMAKE

Array = NDArray[Any]


class Runner(Protocol):
    """One loaded component without state: any but the decoder."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name; shapes and dtypes as in the component's TensorSpecs."""


class Decoder(Protocol):
    """A loaded decoder with its KV cache and its token embeddings; batch 1, greedy choice.

    `capacity` is the number of positions that the cache holds. `stride` is how many tokens `decode` likes to make at
    once: a GPU that the host waits for after every one stands still meanwhile.
    """

    capacity: int
    stride: int

    def prefill(self, inputs_embeds: NDArray[np.float32], **further: Array) -> int:
        """Forgets all, reads the prompt's embeddings (1, length, hidden) and returns the first token's id. `further`:
        what this decoder takes that not every one does, by the names of its graph's inputs (`Session.embed_prompt`)."""

    def decode(self, count: int) -> list[int]:
        """The next `count` token ids, each fed back in turn; the token before them is the last one returned."""

    def feed(self, token: int) -> int:
        """The choice after `token`, whether or not it was the last one chosen (teacher forcing)."""

    def logits(self) -> NDArray[np.float32]:
        """Logits (vocabulary,) of the last chosen token, for comparing engines."""


def require_fit(tensor: TensorSpec, array: Array | None, what: str) -> None:
    """Raises where an array is not of the tensor's type and of a shape that it can have; `what` names it."""
    shape = () if array is None else array.shape
    axes = [size == length or isinstance(size, str) for size, length in zip(tensor.shape, shape, strict=False)]
    fits = array is not None and str(array.dtype) == tensor.dtype and len(shape) == len(tensor.shape)
    if not fits or 0 in shape or not all(axes):
        found = "none" if array is None else f"{array.dtype} {array.shape}"
        expected = f"{tensor.dtype} ({', '.join(map(str, tensor.shape))})"
        raise VlmcError(f"{what} is not what the model takes", found=found, expected=expected, fix=REMAKE)


def require_inputs(spec: ComponentSpec, inputs: Mapping[str, Array]) -> None:
    """`require_fit` of all that the component takes."""
    for tensor in spec.inputs:
        require_fit(tensor, inputs.get(tensor.name), f"The input {tensor.name}")


class HostDecoder(ABC):
    """A Decoder that keeps position and token choice on the host: a backend adds one forward step."""

    stride = 1

    def __init__(self, capacity: int, embed: Runner) -> None:
        self.capacity = capacity
        self._embed = embed
        self._position, self._token = 0, 0
        self._logits: NDArray[np.float32] = np.empty(0, np.float32)
        self._rows, self._ahead = 0, 0  # positions a token has, where not one, and how far they are ahead of its place
        self._prefixed = False
        self._crossed: dict[str, Array] = {}  # what a decoder with cross-attention sees of the picture at every step

    @abstractmethod
    def forward(self, inputs_embeds: NDArray[np.float32], start: int, **further: Array) -> NDArray[np.float32]:
        """Appends the places start, start + 1, … (1, length, hidden) to the cache; the last one's logits. `further` is
        by name what the decoder takes beside them; without `position_ids` positions are places."""

    def prefill(self, inputs_embeds: NDArray[np.float32], **further: Array) -> int:
        positions = further.get("position_ids")
        self._rows = 0 if positions is None else len(positions)
        self._ahead = 0 if positions is None else int(positions.max()) + 1 - inputs_embeds.shape[1]
        self._prefixed = "prefix_length" in further
        self._crossed = {name: further[name] for name in further.keys() & set(CROSSED)}
        self._position = inputs_embeds.shape[1]
        return self._choose(self.forward(inputs_embeds, 0, **further))

    def decode(self, count: int) -> list[int]:
        return [self.feed(self._token) for _ in range(count)]

    def feed(self, token: int) -> int:
        logits = self.read(np.array([token], np.int64), self._position)
        self._position += 1
        return self._choose(logits)

    def read(self, ids: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Appends the tokens (length,), which stand behind the prompt, at the places from `start` on; the last one's
        logits."""
        further = {**self._embed.run({"input_ids": ids[None]}), **self._crossed}
        embeds = further.pop("inputs_embeds")
        if self._rows:
            places = np.arange(start, start + len(ids), dtype=np.int64)
            further["position_ids"] = np.tile(places + self._ahead, (self._rows, 1, 1))
        if self._prefixed:
            further["prefix_length"] = np.zeros(1, np.int64)  # a new token sees all before it anyway
        return self.forward(embeds, start, **further)

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def _choose(self, logits: NDArray[np.float32]) -> int:
        self._logits, self._token = logits, int(logits.argmax())
        return self._token
