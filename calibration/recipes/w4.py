"""4-bit weights in blocks for what reads and writes text, whose speed is the memory's; a head, where an error is an
error in the answer, keeps 8."""

from . import Precision, Recipe

_FOUR = Precision(weight_bits=4, block=32)

RECIPE = Recipe(
    "w4",
    "4-bit weights of decoder or text encoder in blocks of 32, 8-bit head",
    {"decoder/lm_head*": Precision(weight_bits=8, block=32), "decoder/*": _FOUR, "text_encoder/*": _FOUR},
)
