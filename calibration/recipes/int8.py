"""8-bit weights and activations with SmoothQuant (arXiv:2211.10438, its default alpha).

Ranges are those of least squared error: that cuts lone outliers but keeps the huge values that decoders depend on, for
which a percentile has no eye. The head is quantised: on the demo that costs nothing, and it is a fifth of the bytes
that SmolVLM-256M's decoder reads. The patch convolution stays float: it is below a hundredth of the work.
"""

from . import FLOAT, Precision, Recipe

W8A8 = Precision(weight_bits=8, activation_bits=8, smooth=0.5)

RECIPE = Recipe(
    "int8",
    "8-bit weights and activations, smoothed, ranges of least squared error",
    {"*patch_embed*": FLOAT, "vision_encoder/*": W8A8, "decoder/*": W8A8},
    observer="mse",
)
