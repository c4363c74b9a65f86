"""The parent's end of a worker, where there is no worker at the other end."""

from __future__ import annotations

from pathlib import Path

import pytest
from vlmc.profiles.process import Died, Process


def test_an_interpreter_that_cannot_be_started_is_a_worker_that_died(tmp_path: Path) -> None:
    job = {"python": str(tmp_path / "python"), "arguments": {}}
    with pytest.raises(Died, match=r"/python does not start: No such file or directory"):
        Process(job, tmp_path / "job.json", tmp_path / "log")
