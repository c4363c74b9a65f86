"""8-bit weights and activations with SmoothQuant (arXiv:2211.10438, its default alpha).

The patch convolution stays float: it sees raw pixels, is a percent of the work, and TensorRT's INT8 convolutions of
three input channels are slower than its float ones.
"""

from . import FLOAT, Precision, Recipe

W8A8 = Precision(weight_bits=8, activation_bits=8, smooth=0.5)

RECIPE = Recipe(
    "int8",
    "8-bit weights and activations, smoothed",
    {"*patch_embed*": FLOAT, "vision_encoder/*": W8A8, "decoder/*": W8A8},
)
