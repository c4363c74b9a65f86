"""The law of decoders, whatever they run on: one state, one step at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.artifact import TensorSpec
from vlmc.errors import VlmcError
from vlmc.runtime.runner import HostDecoder, require_fit

VOCABULARY, HIDDEN = 17, 8


class Table:
    """Token embeddings: a row of a fixed table for each id."""

    rows = np.random.default_rng(0).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"inputs_embeds": self.rows[inputs["input_ids"]]}


class Sums(HostDecoder):
    """A decoder whose choice depends on all positions that it has read, and on their order."""

    def __init__(self, capacity: int = 64) -> None:
        super().__init__(capacity, Table())
        self.cache = np.full((capacity, HIDDEN), np.nan, np.float32)
        self.calls: list[tuple[int, int]] = []

    def forward(self, inputs_embeds: Any, start: int) -> Any:
        length = inputs_embeds.shape[1]
        self.calls.append((start, length))
        self.cache[start : start + length] = inputs_embeds[0]
        weights = np.arange(1, start + length + 1, dtype=np.float32)
        return Table.rows @ (weights @ self.cache[: start + length])


def prompt(length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(1, length, HIDDEN)).astype(np.float32)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(length=st.integers(1, 9), counts=st.lists(st.integers(0, 5), max_size=6))
def test_decoding_in_any_portions_gives_the_same_tokens(length: int, counts: list[int]) -> None:
    by_ones, by_portions = Sums(), Sums()
    assert by_ones.prefill(prompt(length)) == by_portions.prefill(prompt(length))
    ones = [token for _ in range(sum(counts)) for token in by_ones.decode(1)]
    portions = [token for count in counts for token in by_portions.decode(count)]
    assert portions == ones
    assert by_ones.calls == by_portions.calls
    np.testing.assert_array_equal(by_ones.logits(), by_portions.logits())


def test_every_token_is_appended_behind_the_last() -> None:
    decoder = Sums()
    decoder.prefill(prompt(5))
    decoder.decode(3)
    assert decoder.calls == [(0, 5), (5, 1), (6, 1), (7, 1)]


def test_prefill_forgets_all() -> None:
    used, fresh = Sums(), Sums()
    used.prefill(prompt(9))
    used.decode(4)
    assert used.prefill(prompt(3, 1)) == fresh.prefill(prompt(3, 1))
    assert used.decode(4) == fresh.decode(4)


def test_a_decoder_can_be_led_along_other_tokens() -> None:
    led, free = Sums(), Sums()
    first = led.prefill(prompt(4))
    free.prefill(prompt(4))
    other = (first + 1) % VOCABULARY
    assert led.feed(first) == free.decode(1)[0]
    led.feed(other)
    np.testing.assert_array_equal(led.cache[5], Table.rows[other])
    assert led.decode(1) == [led.logits().argmax()]


def test_the_choice_is_the_largest_logit_and_the_first_of_equals() -> None:
    class Fixed(Sums):
        def forward(self, inputs_embeds: Any, start: int) -> Any:
            return np.array([0.0, 2.0, 2.0, 1.0], np.float32)

    decoder = Fixed()
    assert decoder.prefill(prompt(1)) == 1
    assert decoder.logits().tolist() == [0.0, 2.0, 2.0, 1.0]


def test_behind_a_prompt_positions_go_on_from_its_greatest_and_nothing_is_prefix() -> None:
    seen: list[dict[str, Any]] = []

    class Further(Sums):
        def forward(self, inputs_embeds: Any, start: int, **further: Any) -> Any:
            seen.append({name: array.tolist() for name, array in further.items()})
            return super().forward(inputs_embeds, start)

    decoder = Further()
    positions = np.array([[[0, 1, 1, 2]], [[0, 5, 3, 2]]])
    decoder.prefill(prompt(4), position_ids=positions, prefix_length=np.array([3]))
    decoder.decode(2)
    decoder.read(np.array([3, 4]), 6)
    assert seen[0] == {"position_ids": positions.tolist(), "prefix_length": [3]}
    assert [step["position_ids"] for step in seen[1:]] == [[[[6]]] * 2, [[[7]]] * 2, [[[8, 9]]] * 2]
    assert all(step["prefix_length"] == [0] for step in seen[1:])
    decoder.prefill(prompt(2))
    decoder.decode(1)
    assert seen[4:] == [{}, {}]


def test_what_embeddings_bring_along_comes_with_every_step() -> None:
    class Both(Table):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return super().run(inputs) | {"more": inputs["input_ids"] * 2}

    class Further(Sums):
        more: ClassVar[list[Any]] = []

        def forward(self, inputs_embeds: Any, start: int, **further: Any) -> Any:
            self.more.append(further["more"].tolist())
            return super().forward(inputs_embeds, start)

    decoder = Further()
    decoder._embed = Both()
    decoder.prefill(prompt(2), more=np.array([[1, 2]]))
    decoder.feed(7)
    assert decoder.more == [[[1, 2]], [[14]]]


def test_a_decoder_without_a_step_is_none() -> None:
    with pytest.raises(TypeError, match="forward"):
        HostDecoder(4, Table())  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("array", "fits"),
    [
        (np.zeros((1, 5, 3), np.float32), True),
        (np.zeros((1, 0, 3), np.float32), False),
        (np.zeros((1, 5, 4), np.float32), False),
        (np.zeros((1, 5), np.float32), False),
        (np.zeros((1, 5, 3), np.float64), False),
        (None, False),
    ],
)
def test_an_array_fits_by_type_and_size_and_an_empty_one_never(array: Any, fits: bool) -> None:
    tensor = TensorSpec("pixel_values", "float32", (1, "tiles", 3))
    with contextlib.nullcontext() if fits else pytest.raises(VlmcError, match=r"Expected: float32 \(1, tiles, 3\)"):
        require_fit(tensor, array, "The picture")
