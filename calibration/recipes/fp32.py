"""Nothing is quantised: what every other recipe is compared with."""

from . import Recipe

RECIPE = Recipe("fp32", "float32 throughout", {})
