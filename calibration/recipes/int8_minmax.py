"""Plain post-training quantisation: the layers of `int8`, not smoothed, ranges from the largest value seen."""

from . import Recipe, eight_bits

RECIPE = Recipe(
    "int8-minmax",
    "8-bit weights and activations, not smoothed, ranges of the largest values",
    eight_bits(smooth=0.0),
)
