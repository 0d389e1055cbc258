"""The layer chart: what int8 does to each layer's output and time, which were kept in float and why; what is missing is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgecnn.report import plots

SHOWN = 24  # layers in the charts; the table has all
TABLE = 400


def section(target: Mapping[str, Any], series: int) -> dict[str, Any] | None:
    """What the template shows of `targets[].layers`, or None where the result has none."""
    rows = [row for row in target.get("layers") or [] if isinstance(row, Mapping) and row.get("name") is not None]
    if not rows:
        return None
    telling = _telling(rows)
    shown = [row for nth, row in enumerate(rows) if nth in telling]
    timed = [row for row in shown if _number(row, "float_s") or _number(row, "int8_s")]
    judged = [row for row in shown if _number(row, "sqnr_db") is not None]
    return {
        "name": target.get("name", "unnamed"),
        "series": series,
        "n": len(rows),
        "shown": len(shown),
        "rows": rows[:TABLE],
        "kept": [row for row in rows if row.get("kept_float")],
        "times": plots.layer_times(timed) if timed else "",
        "sensitivity": plots.layer_sensitivity(judged) if judged else "",
    }


def _telling(rows: list[Mapping[str, Any]]) -> set[int]:
    """Places of the layers worth a line: kept in float, then by turns the slowest and the most sensitive."""
    by_time = sorted(range(len(rows)), key=lambda i: -max(_number(rows[i], "float_s") or 0.0, _number(rows[i], "int8_s") or 0.0))
    by_error = sorted(range(len(rows)), key=lambda i: value if (value := _number(rows[i], "sqnr_db")) is not None else math.inf)
    wanted = [i for i, row in enumerate(rows) if row.get("kept_float")] + [i for pair in zip(by_error, by_time, strict=True) for i in pair]
    return set(list(dict.fromkeys(wanted))[:SHOWN])


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
