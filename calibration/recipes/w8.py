"""8-bit weights in blocks for the decoder, whose speed is the memory's; nothing needs to be calibrated."""

from . import Precision, Recipe

RECIPE = Recipe("w8", "8-bit decoder weights in blocks of 32", {"decoder/*": Precision(weight_bits=8, block=32)})
