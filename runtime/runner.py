"""The contract that every backend and every PyTorch baseline fulfils, so that all are measured by one clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Runner(Protocol):
    """One loaded component without state: `vision_encoder` or `embed_tokens`."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name; shapes and dtypes as in the component's TensorSpecs."""


class Decoder(Protocol):
    """A loaded decoder with its KV cache and its token embeddings; batch 1, greedy choice.

    `capacity` is the number of positions that the cache holds. `stride` is how many tokens `decode` likes to make at
    once: a GPU that the host waits for after every one stands still meanwhile.
    """

    capacity: int
    stride: int

    def prefill(self, inputs_embeds: NDArray[np.float32]) -> int:
        """Forgets all, reads the prompt's embeddings (1, length, hidden) and returns the first token's id."""

    def decode(self, count: int) -> list[int]:
        """The next `count` token ids, each fed back in turn; the token before them is the last one returned."""

    def feed(self, token: int) -> int:
        """The choice after `token`, whether or not it was the last one chosen (teacher forcing)."""

    def logits(self) -> NDArray[np.float32]:
        """Logits (vocabulary,) of the last chosen token, for comparing engines."""


class HostDecoder(ABC):
    """A Decoder that keeps position and token choice on the host: a backend adds one forward step."""

    stride = 1

    def __init__(self, capacity: int, embed: Runner) -> None:
        self.capacity = capacity
        self._embed = embed
        self._position, self._token = 0, 0
        self._logits: NDArray[np.float32] = np.empty(0, np.float32)

    @abstractmethod
    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """Appends the positions start, start + 1, … (1, length, hidden) to the cache; the last one's logits."""

    def prefill(self, inputs_embeds: NDArray[np.float32]) -> int:
        self._position = 0
        return self._advance(inputs_embeds)

    def decode(self, count: int) -> list[int]:
        return [self.feed(self._token) for _ in range(count)]

    def feed(self, token: int) -> int:
        return self._advance(self._embed.run({"input_ids": np.array([[token]], np.int64)})["inputs_embeds"])

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def _advance(self, embeds: NDArray[np.float32]) -> int:
        self._logits = self.forward(embeds, self._position)
        self._position += embeds.shape[1]
        self._token = int(self._logits.argmax())
        return self._token
