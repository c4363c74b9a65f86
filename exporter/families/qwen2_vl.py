"""Qwen2-VL: Qwen2.5-VL's predecessor, whose vision encoder has layer norms and no windows (arXiv:2409.12191)."""

from __future__ import annotations

from typing import Any, ClassVar

from .qwen2_5_vl import Qwen25Vl


class Qwen2Vl(Qwen25Vl):
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)

    def picture_settings(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"window": 0}
