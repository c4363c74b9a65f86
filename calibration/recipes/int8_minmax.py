"""Plain post-training quantisation: 8-bit weights and activations, ranges from the largest value seen.
As in `int8`, vision attention's queries and keys are 8-bit too."""

from dataclasses import replace

from . import FLOAT, Precision, Recipe

W8A8 = Precision(weight_bits=8, activation_bits=8)
ATTENDING = dict.fromkeys(("vision_encoder/*.q_proj", "vision_encoder/*.k_proj"), replace(W8A8, output_bits=8))

RECIPE = Recipe(
    "int8-minmax",
    "8-bit weights and activations, not smoothed, ranges of the largest values",
    {"*patch_embed*": FLOAT}
    | ATTENDING
    | dict.fromkeys(("vision_encoder/*", "text_encoder/*", "fusion/*", "decoder/*"), W8A8),
)
