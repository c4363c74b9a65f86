"""Recipes: what precision each part of a model gets. A new recipe is one file here with a `RECIPE`, found by its name
(`int8_minmax.py` is `int8-minmax`).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import VlmcError, reason


@dataclass(frozen=True)
class Precision:
    """How one linear layer or convolution is quantised.

    weight_bits: 0 (float), 8 or 4. block: input channels that share a scale, 0 for all of an output channel.
    activation_bits: of its input, 0 (float) or 8. smooth: SmoothQuant's alpha, the share of the difficulty that moves
    from activations to weights (arXiv:2211.10438, eq. 4); 0 does not smooth. output_bits: of its output, bias
    included, 0 (float) or 8, for attention's queries and keys, which are multiplied without being a layer; it counts
    only where there are weight_bits.
    """

    weight_bits: int = 0
    block: int = 0
    activation_bits: int = 0
    smooth: float = 0.0
    output_bits: int = 0


FLOAT = Precision()


def eight_bits(smooth: float) -> dict[str, Precision]:
    """The rules of 8-bit weights and activations everywhere but in the patch convolution, which is below a hundredth of
    the work. Of vision attention, queries and keys too (see `int8`)."""
    plain = Precision(weight_bits=8, activation_bits=8, smooth=smooth)
    rules = {"*patch_embed*": FLOAT}
    rules |= dict.fromkeys(("vision_encoder/*.q_proj", "vision_encoder/*.k_proj"), replace(plain, output_bits=8))
    return rules | dict.fromkeys(("vision_encoder/*", "text_encoder/*", "fusion/*", "decoder/*"), plain)


@dataclass(frozen=True)
class Recipe:
    """`rules` maps patterns on COMPONENT/MODULE.PATH (fnmatch) to precisions. The first that matches counts, and what
    none matches stays float. `observer` chooses the range of activations (see `observers.RANGES`). `implicit`: the
    components that TensorRT calibrates itself while it builds, by that observer, from inputs that the plan keeps."""

    name: str
    about: str
    rules: dict[str, Precision]
    observer: str = "minmax"
    implicit: tuple[str, ...] = ()

    def precision(self, module: str) -> Precision:
        """The precision of the module COMPONENT/MODULE.PATH."""
        return next((rule for pattern, rule in self.rules.items() if fnmatchcase(module, pattern)), FLOAT)

    @property
    def kind(self) -> str:
        """The precision that a device has to take for it: int8, w8 or w4; fp32 where nothing is quantised."""
        if self.implicit or any(rule.activation_bits for rule in self.rules.values()):
            return "int8"
        bits = {rule.weight_bits for rule in self.rules.values()} - {0}
        return f"w{min(bits)}" if bits else "fp32"

    @property
    def block_bits(self) -> frozenset[int]:
        """Bits of the weights that it keeps in blocks."""
        return frozenset(rule.weight_bits for rule in self.rules.values() if rule.block)

    @property
    def needs_data(self) -> bool:
        """Whether activations must be seen; weights alone need no calibration set."""
        return bool(self.implicit) or any(
            rule.activation_bits or rule.smooth or rule.output_bits for rule in self.rules.values()
        )


def names() -> list[str]:
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Recipe:
    """The recipe of that name; an unknown one is answered with the nearest names, a file that is no recipe refused."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=2)
        raise VlmcError(
            f"There is no recipe {name!r}",
            expected="one of " + ", ".join(names()),
            fix=f"did you mean {' or '.join(near)}" if near else "choose one of these",
        )
    path = Path(__path__[0]) / f"{name.replace('-', '_')}.py"
    try:
        recipe = importlib.import_module(f"{__name__}.{path.stem}").RECIPE
    except Exception as error:  # whatever stands in the file
        said = f"{type(error).__name__}: {reason(error)}"
        raise VlmcError(f"{path} is no recipe", found=said, expected="a RECIPE", fix="mend the file") from error
    if not isinstance(recipe, Recipe):
        kind = type(recipe).__name__
        raise VlmcError(
            f"{path} is no recipe", found=f"a RECIPE of type {kind}", expected="a Recipe", fix="mend the file"
        )
    if recipe.name != name:
        raise VlmcError(f"The recipe in the file of {name!r} calls itself {recipe.name!r}", fix="give both one name")
    return recipe
