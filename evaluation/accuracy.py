"""Accuracy with its uncertainty, and whether two variants really differ on the same questions.

A row is one answered question: {"image", "task", "prompt", "score"}, the score from 0 to 1 by `tasks.score`.

Intervals are Wilson's (1927; recommended by Brown, Cai & DasGupta 2001, doi:10.1214/ss/1009213286) at 95 %:

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)        z = 1.96

They stay inside [0, 1] and do not collapse when all answers are right, as a bootstrap does. Two things need thought:

- A caption's score is a share, and the facts of one picture are not independent, so n is the number of pictures and
  not of facts. Wilson's formula still holds, a little too wide: of all values in [0, 1] with mean p, none vary more
  than right-or-wrong ones, whose variance is p(1-p) (Bhatia & Davis 2000).
- Questions about one picture are not independent either. There n is the effective number of questions,
  p(1-p) / variance of p between pictures (Korn & Graubard 1998), never below the number of pictures and never
  above the number of questions.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import VlmcError

Z95 = 1.959963984540054
SIGNIFICANT = 0.05

Row = Mapping[str, Any]


def summarize(rows: Iterable[Row]) -> dict[str, Any]:
    """{"tasks": {task: entry}, "overall": entry}, an entry being `score` (the sum of scores), `total` (questions),
    `value` (their ratio) and `low`, `high` (its 95 % interval). No rows at all is a VlmcError."""
    rows = list(rows)
    if not rows:
        raise VlmcError("Accuracy cannot be computed from no answers", fix="evaluate at least one picture")
    by_task: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    return {"tasks": {task: _entry(some) for task, some in by_task.items()}, "overall": _entry(rows)}


def wilson(p: float, n: float) -> tuple[float, float]:
    """The 95 % interval of the share `p`, from 0 to 1, seen in `n` independent trials (at least 1)."""
    centre = p + Z95**2 / (2 * n)
    reach = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return min(p, max(0.0, (centre - reach) / scale)), max(p, min(1.0, (centre + reach) / scale))


def paired(rows_a: Iterable[Row], rows_b: Iterable[Row]) -> dict[str, Any]:
    """Variant a against variant b on the questions that both answered.

    `total` questions, of which a `won` (scored higher), `lost` and left the `same`; `p_value`, two-sided, of the exact
    test whose null hypothesis is that for every picture, all its questions together, a and b could as well be the other
    way round (Fisher's randomisation test, 1935); `significant` where it is below 0.05. With one question a picture it
    is the exact McNemar test (McNemar 1947, doi:10.1007/BF02295996), which takes questions about one picture for
    independent and then finds differences where there are none.
    """
    a, b = _by_question(rows_a), _by_question(rows_b)
    common = a.keys() & b.keys()
    if not common:
        raise VlmcError("The two variants answered no question in common", fix="evaluate both on the same set")
    won = sum(a[key] > b[key] for key in common)
    lost = sum(a[key] < b[key] for key in common)
    net: Counter[str] = Counter()
    for key in common:
        net[key[0]] += (a[key] > b[key]) - (a[key] < b[key])
    p_value = _by_chance([count for count in net.values() if count])
    return {
        "total": len(common),
        "won": won,
        "lost": lost,
        "same": len(common) - won - lost,
        "p_value": p_value,
        "significant": p_value < SIGNIFICANT,
    }


def _entry(rows: Sequence[Row]) -> dict[str, float]:
    total, score = len(rows), math.fsum(row["score"] for row in rows)
    low, high = wilson(score / total, _trials(rows))
    return {"score": score, "total": total, "value": score / total, "low": low, "high": high}


def _trials(rows: Sequence[Row]) -> float:
    """The effective number of independent questions; see the module's text."""
    pictures: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        pictures[row["image"]].append(row["score"])
    total, count = len(rows), len(pictures)
    p: float = math.fsum(row["score"] for row in rows) / total
    spread = math.fsum((math.fsum(scores) - p * len(scores)) ** 2 for scores in pictures.values())
    if count == total or count < 2 or not 0 < p < 1:
        return count
    variance = count / (count - 1) * spread / total**2
    return min(total, max(count, p * (1 - p) / variance)) if variance else total


def _by_question(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    return {(row["image"], row["task"], row["prompt"]): row["score"] for row in rows}


def _by_chance(nets: Sequence[int]) -> float:
    """Two-sided probability of a sum at least this far from 0 if the sign of each were a coin's."""
    ways = Counter({0: 1})
    for net in nets:
        after: Counter[int] = Counter()
        for total, count in ways.items():
            after[total + net] += count
            after[total - net] += count
        ways = after
    far = sum(count for total, count in ways.items() if abs(total) >= abs(sum(nets)))
    return far / (1 << len(nets))
