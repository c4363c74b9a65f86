"""What of an engine's inputs can be run in parts follows from the names of its sizes."""

from __future__ import annotations

import pytest
from vlmc.runtime.tensorrt_engine import batch


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ([("tiles", 3, 32, 32), ("tiles", 4, 64)], "tiles"),
        ([("texts", "length"), ("texts", 64)], "texts"),
        ([("tiles", 3, 8, 8), (1, "4*tiles + 2", 64)], ""),  # Phi-3.5: separators behind all tiles
        ([("tiles", 3, 8, 8), (49, "tiles", 49), (1, 49, 64)], ""),  # Moondream2: tiles that are averaged
        ([("tokens", 4, 96), ("tokens",), ("tokens", 64)], ""),  # Qwen2.5-VL: tokens that see one another
        ([("tiles", 40, 32), (1, "text_length", 32), ("tiles", 4, 32)], ""),  # LLaVA-Mini's fusion
        ([(1, 3, 8, 8), (1, 4, 64)], ""),
        ([(), ("tiles", 3)], ""),
    ],
)
def test_a_batch_is_the_first_axis_of_everything_and_of_things_that_are_apart(
    shapes: list[tuple[int | str, ...]], name: str
) -> None:
    assert batch(shapes) == name
