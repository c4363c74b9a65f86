"""8-bit weights in blocks for what reads and writes text, whose speed is the memory's; nothing has to be calibrated."""

from . import Precision, Recipe

_EIGHT = Precision(weight_bits=8, block=32)

RECIPE = Recipe(
    "w8",
    "8-bit weights of decoder or text encoder in blocks of 32",
    {"decoder/*": _EIGHT, "text_encoder/*": _EIGHT},
)
