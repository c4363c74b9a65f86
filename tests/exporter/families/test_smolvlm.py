"""SmolVLM, the family that the whole chain is tested with; here only what the README's table says of it."""

from __future__ import annotations

from collections.abc import Callable

from vlmc.artifact import Artifact


def test_the_readme_says_what_it_can_be_made_into(
    tiny: Artifact, assert_supported: Callable[[Artifact, str], None]
) -> None:
    assert_supported(tiny, "smolvlm")
