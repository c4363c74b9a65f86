"""Rotary embeddings (RoFormer, arXiv:2104.09864) whose angles depend on a text's length, and those that do not.

Keys in a cache are rotated already, so angles that change for a longer text would be wrong for all that is there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import VlmcError

# Rotations whose angles are the same for every length, and those that change theirs, with the field of config.json that
# says from which length on (NTK-aware scaling as transformers has it; LongRoPE, arXiv:2402.13753).
STEADY = ("default", "linear", "llama3", "yarn")
CHANGING = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}


class FirstRotation(nn.Module):
    """A rotation that changes its angles for longer texts, held at those that it begins with: (hidden, position_ids
    (1, length)) → cos and sin (1, length, head_dim)."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", rotary.original_inv_freq, persistent=False)
        self.scale = float(rotary.attention_scaling)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return (angles.cos() * self.scale).to(hidden.dtype), (angles.sin() * self.scale).to(hidden.dtype)


def steady(rotary: Any) -> nn.Module:
    """transformers' rotation, or the FirstRotation of one that changes: `check` ends the cache where it would."""
    module: nn.Module = FirstRotation(rotary) if getattr(rotary, "rope_type", "") in tuple(CHANGING) else rotary
    return module


def check(text: Any, capacity: int) -> None:
    """Refuses a decoder, by its config, whose rotation would change within a cache of that many places, or is of a kind
    that was not compared with transformers'."""
    rotation = getattr(text, "rope_parameters", None) or {}
    kind = rotation.get("rope_type", "default")
    if kind not in (*STEADY, *CHANGING):
        raise VlmcError(
            "The decoder has a rotation that vlmc was not compared with",
            found=f"rope_type {kind}",
            expected=" or ".join((*STEADY, *CHANGING)),
        )
    if kind in CHANGING:
        most = rotation.get(CHANGING[kind]) or text.max_position_embeddings
        if capacity > most:
            raise VlmcError(
                "The decoder rotates longer texts by other angles, which vlmc does not follow",
                found=f"{kind} RoPE, a KV cache of {capacity} positions",
                expected=f"at most {most}",
                fix=f"export with --capacity {most} or less",
            )
