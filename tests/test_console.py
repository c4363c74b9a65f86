from __future__ import annotations

import pytest
from rich.progress import Progress
from vlmc import console


def test_a_bar_shows_what_it_was_told_last_and_no_end_where_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Progress(disable=True)
    monkeypatch.setattr(console, "progress", lambda: bar)
    with console.reporting("building") as report:
        (task,) = bar.tasks
        assert (task.description, task.completed, task.total) == ("building", 0, None)
        report("trying", 1, 0)
        assert (task.description, task.completed, task.total) == ("trying", 1, None)
        report("building the decoder", 2, 5)
        assert (task.description, task.completed, task.total) == ("building the decoder", 2, 5)
