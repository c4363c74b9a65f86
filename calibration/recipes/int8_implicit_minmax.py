"""`int8-implicit` with ranges of the largest values, which TensorRT recommends for transformers of text."""

from . import Recipe

RECIPE = Recipe(
    "int8-implicit-minmax",
    "INT8 of the vision encoder by TensorRT's own calibration, ranges of the largest values",
    {},
    implicit=("vision_encoder",),
)
