"""What the trust section says of one target, from its part of the result; whatever is missing is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgecnn.report import plots
from edgecnn.report.tradeoff import is_number

SHOWN = 15  # classes in the chart
PICTURES = 24
KINDS = {"lost": "was right, now wrong", "won": "was wrong, now right", "differently": "wrong in another way", "typical": "unchanged"}


def section(target: Mapping[str, Any], series: int, picture: Callable[[Any], str]) -> dict[str, Any] | None:
    """What the template shows, or None where the run did not look."""
    found = target.get("trust")
    if not isinstance(found, dict):
        return None
    flips, classes, confidence = _part(found, "flips"), _part(found, "classes"), _part(found, "confidence")
    rows = [row for row in classes.get("rows", []) if _whole(row)]
    moved = [row for row in rows if row["drop"] or row.get("flagged")][:SHOWN]
    bins = [
        [b for b in confidence.get(which, {}).get("bins", []) if _numbers(b, "confidence", "accuracy", "n")] for which in ("float", "file")
    ]
    robust = found.get("robustness") or {}
    corrupted = [row for row in robust.get("rows", []) if _numbers(row, "before", "after", "extra")]
    return {
        "name": target.get("name", "unnamed"),
        "series": series,
        "say": headline(flips, classes),
        "flips": flips,
        "flagged": [row for row in rows if row.get("flagged")],
        "classes": classes,
        "changes": plots.class_changes(moved) if moved else "",
        "moved": len(moved),
        "confusions": found.get("confusions", []),
        "confidence": confidence,
        "reliability": plots.reliability(*bins) if any(bins) else "",
        "robustness": robust,
        "corrupted": corrupted,
        "corruption": plots.robustness(corrupted) if corrupted else "",
        "pictures": [
            {**p, "source": source, "why": KINDS.get(p.get("kind"), "")}
            for p in found.get("pictures", [])[:PICTURES]
            if (source := picture(p.get("file")))
        ],
        "panels": found.get("panels", []),
        "unseen": " and ".join(
            what for what, seen in (("corrupted images", corrupted), ("pictures of where each looks", found.get("pictures"))) if not seen
        ),
        "gradcam": found.get("gradcam", ""),
    }


def alarm(row: Mapping[str, Any], classes: Mapping[str, Any]) -> str:
    """A flagged class in one line, for the first screen."""
    whole = f", the model as a whole {100 * classes['drop']:.1f}" if _numbers(classes, "drop") else ""
    return f"class {str(row.get('label', 'unnamed'))[:80]} lost {100 * row['drop']:.1f} points of top-1{whole}"


def headline(flips: Mapping[str, Any], classes: Mapping[str, Any]) -> str:
    """The section in one sentence."""
    if not _numbers(flips, "n", "changed", "lost", "won") or not flips["n"]:
        return ""
    if not flips["changed"]:
        return f"On all {flips['n']} images the file answers as the float model does."
    said = (
        f"{flips['changed']} of {flips['n']} answers changed ({100 * flips['changed'] / flips['n']:.1f} %): "
        f"{flips['lost']} from right to wrong, {flips['won']} from wrong to right."
    )
    if _numbers(flips, "p"):
        better = "float model" if flips["lost"] > flips["won"] else "file"
        told = "no evidence that one is more accurate" if flips["p"] >= 0.05 else f"the {better} is more accurate"
        said += f" McNemar's exact test: p = {flips['p']:.2g}, {told}."
    return said


def _part(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = found.get(key)
    return value if isinstance(value, dict) else {}


def _whole(row: Any) -> bool:
    ends = row.get("interval") if isinstance(row, dict) else None
    return isinstance(ends, list) and len(ends) == 2 and _numbers(row, "n", "drop", "before", "after") and all(map(is_number, ends))


def _numbers(row: Any, *keys: str) -> bool:
    return isinstance(row, dict) and all(is_number(row.get(key)) for key in keys)
