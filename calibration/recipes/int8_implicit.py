"""TensorRT's own INT8 (up to 10.x): it calibrates the float graph while it builds and chooses itself what runs in INT8.

A comparison, for the scales are in no plan: neither the fake-quant model nor another backend can use them. The vision
encoder alone: a decoder's calibration would need caches that earlier steps have filled.
"""

from . import Recipe

RECIPE = Recipe(
    "int8-implicit",
    "INT8 of the vision encoder by TensorRT's own entropy calibration",
    {},
    observer="entropy",
    implicit=("vision_encoder",),
)
