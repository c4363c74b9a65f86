"""Plain post-training quantisation: 8-bit weights and activations, ranges from the largest value seen."""

from . import FLOAT, Precision, Recipe

W8A8 = Precision(weight_bits=8, activation_bits=8)

RECIPE = Recipe(
    "int8-minmax",
    "8-bit weights and activations, not smoothed, ranges of the largest values",
    {"*patch_embed*": FLOAT} | dict.fromkeys(("vision_encoder/*", "text_encoder/*", "fusion/*", "decoder/*"), W8A8),
)
