"""Devices as data, and the protocol that measures latency, memory and energy."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def summarize(folder: Path) -> dict[str, Any]:
    """The contents of report.json, made from the raw samples in `profile/DEVICE` alone (see `summary`)."""
    from . import summary

    return summary.summarize(folder)
