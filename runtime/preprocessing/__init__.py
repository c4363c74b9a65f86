"""From pictures to what the vision encoder takes, and to the text that stands for them in the prompt.

One module a kind, found by its name: `load(config)` in it makes the preprocessor from the manifest's `preprocessing`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import VlmcError


@dataclass(frozen=True)
class Prepared:
    """`pixel_values`: float32 (tiles, 3, height, width), all pictures' tiles in order; every pixel counts, there is no
    padding. `image_texts[i]` replaces the i-th `{image}` of the prompt."""

    pixel_values: NDArray[np.float32]
    image_texts: tuple[str, ...]


class Preprocessor(Protocol):
    def __call__(self, images: Sequence[Image.Image]) -> Prepared:
        """The pictures (any number, any size) prepared."""


def kinds() -> list[str]:
    """The names of the preprocessors that this version has."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(config: Mapping[str, Any]) -> Preprocessor:
    """The preprocessor that `config["kind"]` names, made from the rest of `config`."""
    kind = config.get("kind")
    if kind not in kinds():
        nearest = difflib.get_close_matches(str(kind), kinds(), cutoff=0.0)
        raise VlmcError(
            f"vlmc has no preprocessing of kind {kind!r}",
            expected="one of " + ", ".join(nearest),
            fix="use the version of vlmc that made the artefact, or a newer one",
        )
    return cast(Preprocessor, importlib.import_module(f"{__name__}.{kind}").load(config))
