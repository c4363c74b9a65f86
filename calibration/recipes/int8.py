"""8-bit weights and activations with SmoothQuant (arXiv:2211.10438).

Alpha is between the paper's 0.5 and the 0.85 that its authors use for Llama: of 0.5, 0.65, 0.75 and 0.85 it kept the
demo's log probabilities nearest to float on held-out questions. Ranges are the largest values seen: after smoothing,
cutting them (percentile, entropy, least squares) helped the picture's features a little and cost the decoder more.
The head is quantised: on the demo that costs nothing, and it is a fifth of the bytes that SmolVLM-256M's decoder
reads. The patch convolution stays float. A text encoder and a fusion, which few models have, are treated like the
rest; no trained one was measured yet.

Vision attention's queries and keys are 8-bit where projections of their own make them, so that a backend can multiply
them as integers (OpenVINO does). The decoder's are not: its keys are in the KV cache, which all engines share. Where a
norm or a rotary embedding follows the projection, the product stays float and the rounding brings nothing.
"""

from . import Recipe, eight_bits

RECIPE = Recipe("int8", "8-bit weights and activations, smoothed", eight_bits(smooth=0.65))
