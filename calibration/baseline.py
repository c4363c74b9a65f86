"""The PyTorch baselines, as sessions that the same clock measures: eager float, and fake-quant from a plan."""

from __future__ import annotations

import torch

from ..artifact import Artifact
from ..exporter.checkpoint import load_components
from ..exporter.matching import Encoders, torch_matcher
from ..exporter.torch_runner import torch_session
from ..runtime.matching import Matcher
from ..runtime.session import Session
from .fake_quant import apply_plan
from .plan import read_plan


def open_session(artifact: Artifact, recipe: str, threads: int = 0) -> Session | Matcher:
    """The artefact's model in PyTorch: float32 for the recipe `fp32`, otherwise fake-quant from `plans/RECIPE.json`.
    `threads` 0 leaves PyTorch's own choice."""
    plan = None if recipe == "fp32" else read_plan(artifact, recipe)
    if threads:
        torch.set_num_threads(threads)
    components = load_components(artifact)
    if plan is not None:
        components = components.map(lambda name, module: apply_plan(module, plan, name))
    if isinstance(components, Encoders):
        return torch_matcher(artifact, components)
    return torch_session(artifact, components)
