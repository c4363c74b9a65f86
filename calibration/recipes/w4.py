"""4-bit weights in blocks for the decoder; its head, where an error is an error in the answer, keeps 8."""

from . import Precision, Recipe

RECIPE = Recipe(
    "w4",
    "4-bit decoder weights in blocks of 32, 8-bit head",
    {
        "decoder/lm_head": Precision(weight_bits=8, block=32),
        "decoder/*": Precision(weight_bits=4, block=32),
    },
)
