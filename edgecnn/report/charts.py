"""Accuracy against latency, accuracy against size, and how steady the latency is: Vega-Lite specifications for `plots.draw`.

Unlike the charts of `plots`, these have a fixed place for every pixel (no automatic size), so that names can be put beside marks where
there is room: what Vega does for this needs a canvas, which drawing to SVG has not. Each is drawn for the width it is asked for,
so that text keeps its size on a phone and on a desktop. Marks of one target lie in a group of its own class, by which the page hides them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from edgecnn.report import plots

SHAPES = ("circle", "square", "triangle-up", "diamond")
LARGEST = 460  # area of the largest mark, in square pixels
RIDGE = 40  # pixels of the highest density
_SIGNS = ("M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z", "M-5 -5H5V5H-5z", "M0 -6.5L6.2 4.8H-6.2z", "M0 -7L7 0L0 7L-7 0z")
_CHAR = 6.9  # width of an average character at 12 px
_LEFT, _RIGHT, _BOTTOM = 58, 14, 46
_ROW = 15  # of words
_PROMISE = "var(--fail)"
_DASHED = {"type": "rule", "color": _PROMISE, "strokeDash": [6, 4], "strokeWidth": 1.5}
_FONT = {"axis": {**plots.AXIS, "labelFontSize": 12, "titleFontSize": 12}, "text": {"fontSize": 12}}
_PIXEL = {"type": "quantitative", "scale": None, "axis": None}  # a place given in pixels
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A file in an accuracy chart.

    Attributes:
        x: milliseconds or megabytes, > 0.
        top1: fraction.
        interval: of `top1`, fractions, or None.
        megabytes: size, drawn as the mark's area, or None.
        label: written beside it; said: the whole story, shown on hover.
        series: decides colour and shape.
        shipped: drawn filled.
    """

    x: float
    top1: float
    interval: tuple[float, float] | None
    megabytes: float | None
    label: str
    said: str
    series: int
    shipped: bool


@dataclass(frozen=True)
class Line:
    """A promise, drawn across a chart at `at` (milliseconds, megabytes or a fraction)."""

    at: float
    label: str


@dataclass(frozen=True)
class Strip:
    """The latency samples of one target and its percentiles with their intervals (or None), all in milliseconds."""

    name: str
    samples: Sequence[float]
    percentiles: Sequence[tuple[str, float, tuple[float, float] | None]]
    series: int


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] onto pixels [0, length], linear or logarithmic."""

    low: float
    high: float
    length: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return min(max(share, 0.0), 1.0) * self.length

    def spec(self, title: str) -> dict[str, Any]:
        """The same axis for Vega-Lite."""
        scale = {"type": "log" if self.log else "linear", "domain": [self.low, self.high], "nice": False, "zero": False}
        shown: dict[str, Any] = {"labelExpr": "format(datum.value, ',.4~r')"}
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            steps = (1, 2, 5) if self.high < 1000 * self.low else (1,)
            ticks = [m * 10.0**e for e in decades for m in steps]
            shown |= {"values": [tick for tick in ticks if self.low <= tick <= self.high], "labelOverlap": False}
        else:
            shown["tickCount"] = max(int(self.length / 130), 3)
        return {"type": "quantitative", "scale": scale, "axis": {**shown, "title": title + (", logarithmic" if self.log else "")}}


def positive_axis(values: Sequence[float], length: float) -> Axis:
    """From zero, or logarithmic where the values differ more than sixfold."""
    low, high = min(values), max(values)
    if high > 6 * low:
        return Axis(low / 1.35, high * 1.35, length, log=True)
    return Axis(0.0, high * 1.12, length)


def accuracy(points: Sequence[Point], floors: Sequence[Line], ceilings: Sequence[Line], across: str, width: int, label: str) -> Markup:
    """Files by top-1 (up) and by what `across` names. `floors` are promised accuracies, `ceilings` promises about `across`."""
    sized = [p.megabytes for p in points if p.megabytes]
    height = 300
    x = positive_axis([p.x for p in points] + [c.at for c in ceilings], width - _LEFT - _RIGHT)
    tops = [p.top1 for p in points] + [end for p in points if p.interval for end in p.interval if end <= 1]
    best = max(tops + [f.at for f in floors])
    # A file that lost everything must not flatten the others into one line: it is drawn at the bottom, with its figure.
    wanted = min([max(top1, best - 0.06) for top1 in tops] + [f.at for f in floors])
    margin = max((best - wanted) * 0.18, 0.004)
    y = Axis(max(wanted - margin, 0.0), min(best + margin, 1.0 + margin / 3), height)

    # From no area for no size, so that areas compare as sizes do.
    areas = {"scale": {"domain": [0, max(sized, default=1)], "range": [0, LARGEST]}, "legend": None}
    percent = "datum.value > 1 ? '' : format(datum.value * 100, '.4~g') + ' %'"
    at_the_top = {"titleAngle": 0, "titleAlign": "left", "titleX": 8 - _LEFT, "titleY": -12}
    place = {
        "x": {"field": "x", **x.spec(across)},
        "y": {
            "field": "y",
            "type": "quantitative",
            "scale": {"domain": [y.low, y.high], "nice": False, "zero": False},
            "axis": {"title": "top-1", "tickCount": 5, "labelExpr": percent, **at_the_top},
        },
    }
    layers = _ceilings(ceilings, x, place["x"])
    taken: list[Box] = []
    for nth, line in enumerate(floors):
        py = height - y(line.at)
        layers.append(_layer(f"floor{nth}", [{"y": line.at}], _DASHED, {"y": place["y"]}))
        layers.append(_text(f"floor{nth}_words", 4, py + 15, line.label, colour=_PROMISE))
        taken += [(0, py - 2, x.length, py + 2), (0, py, 4 + _CHAR * len(line.label), py + 18)]
    taken += [(x(c.at) - 2, 0, x(c.at) + 2, height) for c in ceilings]
    taken += [(x(p.x) - 2, height - y(p.interval[1]), x(p.x) + 2, height - y(p.interval[0])) for p in points if p.interval]
    for shipped in (False, True):  # the shipped files last, on top
        for series in sorted({p.series for p in points if p.shipped == shipped}):
            found = [p for p in points if (p.series, p.shipped) == (series, shipped)]
            rows = [
                {
                    "x": p.x,
                    "y": max(p.top1, y.low),
                    "low": p.interval and max(p.interval[0], y.low),
                    "high": p.interval and min(p.interval[1], y.high),
                    "mb": p.megabytes,
                    "said": p.said,
                    "shape": "triangle-down" if p.top1 < y.low else SHAPES[series % len(SHAPES)],
                }
                for p in found
            ]
            colour = _colour(series)
            if shipped and any(p.interval for p in found):
                ends = {"x": place["x"], "y": {**place["y"], "field": "low"}, "y2": {"field": "high"}, "description": {"field": "said"}}
                held = [row for row in rows if row["low"] is not None]
                layers.append(_layer(f"t{series}_interval", held, {"type": "rule", "color": colour, "strokeWidth": 2}, ends))
            fill, stroke = (colour, "var(--card)") if shipped else ("var(--card)", colour)
            mark = {"type": "point", "fill": fill, "stroke": stroke, "strokeWidth": 1.6, "opacity": 1, "size": 110}
            encoding = {
                **place,
                **({"size": {"field": "mb", "type": "quantitative", **areas}} if sized else {}),
                "shape": {"field": "shape", "type": "nominal", "scale": None},
                "description": {"field": "said"},
            }
            layers.append(_layer(f"t{series}_{'ships' if shipped else 'lost'}", rows, mark, encoding))
    layers += _names(points, x, y, taken)
    return _drawn(layers, x.length, height, (_LEFT, 26 + _ROW * len(ceilings)), label)


def steadiness(strips: Sequence[Strip], ceilings: Sequence[Line], width: int) -> Markup:
    """The distribution of each target's samples on one axis, with percentiles, their intervals and the promises.

    Samples beyond 1.25 times a target's p99 are counted in words: an axis that reaches them would show nothing else.
    """
    left, one_line = 14, width > 600
    row = 84 if one_line else 104
    ordered = [sorted(s.samples) for s in strips]
    ends = [min(o[-1], 1.25 * o[int(0.99 * (len(o) - 1))]) for o in ordered]
    x = positive_axis([o[0] for o in ordered] + ends + [c.at for c in ceilings], width - left - _RIGHT)
    across = {"field": "ms", **x.spec("latency of one image, ms")}
    layers = _ceilings(ceilings, x, across)
    for nth, (strip, samples, end) in enumerate(zip(strips, ordered, ends, strict=True)):
        floor = row * (nth + 1) - 10
        seen = [s for s in samples if s <= end]
        layers += [_density(strip, seen, x, across, floor), *_percentiles(strip, across, floor)]
        text = " · ".join(f"{what} {milliseconds(at / 1e3)}" for what, at, _ in strip.percentiles) + " ms"
        text += f" · {len(samples):,} samples" if one_line else ""
        text += f" · {len(samples) - len(seen)} slower, up to {milliseconds(samples[-1] / 1e3)} ms" if len(seen) < len(samples) else ""
        title, level = _cut(strip.name, 24), floor - row + 28
        px, py = (14 + (_CHAR + 0.9) * len(title), level) if one_line else (4, level + 18)
        layers += [_text(f"t{strip.series}_name", 4, level, title, bold=True), _text(f"t{strip.series}_words", px, py, text)]
    label = "Distribution of latency for each target. Percentiles are in the table below."
    return _drawn(layers, x.length, row * len(strips), (left, 10 + _ROW * len(ceilings)), label)


def _density(strip: Strip, samples: Sequence[float], x: Axis, across: dict[str, Any], floor: float) -> dict[str, Any]:
    """A Gaussian kernel density of Vega's own bandwidth (Scott 1992), on the axis's own scale, RIDGE pixels high at its peak."""
    to, back = ("log(datum.data)", "exp(datum.value)") if x.log else ("datum.data", "datum.value")
    extent = [math.log(x.low), math.log(x.high)] if x.log else [x.low, x.high]
    transform = [
        {"calculate": to, "as": "v"},
        {"density": "v", "extent": extent, "steps": 240},
        {"calculate": back, "as": "ms"},
        {"joinaggregate": [{"op": "max", "field": "density", "as": "peak"}]},
        {"filter": "datum.density > datum.peak / 1000"},
        {"calculate": f"{floor} - {RIDGE} * datum.density / datum.peak", "as": "top"},
        {"calculate": f"{floor}", "as": "floor"},
    ]
    mark = {"type": "area", "color": _colour(strip.series), "opacity": 0.3, "line": {"color": _colour(strip.series), "strokeWidth": 1.2}}
    encoding = {"x": across, "y": {"field": "top", **_PIXEL}, "y2": {"field": "floor"}}
    return {**_layer(f"t{strip.series}_ridge", samples, mark, encoding), "transform": transform}


def _percentiles(strip: Strip, across: dict[str, Any], floor: float) -> list[dict[str, Any]]:
    """An upright for each, and its interval as a bar at its foot."""
    rows = []
    for what, at, ends in strip.percentiles:
        said = f"{strip.name}: {what} {milliseconds(at / 1e3)} ms"
        if ends:
            said += f", interval {milliseconds(ends[0] / 1e3)} to {milliseconds(ends[1] / 1e3)}"
        rows.append({"ms": at, "low": ends and ends[0], "high": ends and ends[1], "said": said})
    rule = {"type": "rule", "color": _colour(strip.series)}
    upright = {"x": across, "y": {"value": floor - RIDGE}, "y2": {"value": floor + 4}, "description": {"field": "said"}}
    bar = {"x": {**across, "field": "low"}, "x2": {"field": "high"}, "y": {"value": floor + 3}, "description": {"field": "said"}}
    held = [row for row in rows if row["low"] is not None]
    layers = [_layer(f"t{strip.series}_percentiles", rows, {**rule, "strokeWidth": 1.5}, upright)]
    return layers + ([_layer(f"t{strip.series}_intervals", held, {**rule, "strokeWidth": 6}, bar)] if held else [])


def _drawn(layers: Sequence[dict[str, Any]], width: float, height: float, corner: tuple[float, float], label: str) -> Markup:
    """The picture: the plot of `width` x `height` pixels with its upper left at `corner`."""
    padding = {"left": corner[0], "right": _RIGHT, "top": corner[1], "bottom": _BOTTOM}
    place = {"autosize": "none", "width": width, "height": height, "padding": padding}
    return plots.draw({**place, "layer": layers, "config": {**plots.CONFIG, **_FONT}}, label, "chart")


def key(series: int, filled: bool = True) -> Markup:
    """The sign of a series for a legend or a table cell: shape and colour as in the charts, so that neither rests on colour alone."""
    return Markup('<svg class="key s{} {}" width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true"><path d="{}"/></svg>').format(
        series % 6, "full" if filled else "hollow", Markup(_SIGNS[series % len(_SIGNS)])
    )


def milliseconds(seconds: float) -> str:
    """At least three significant digits, in ms, without exponents."""
    ms = seconds * 1e3
    digits = 2 - math.floor(math.log10(abs(ms))) if ms else 0
    return f"{ms:,.{min(max(digits, 0), 6)}f}"


def _ceilings(ceilings: Sequence[Line], x: Axis, across: dict[str, Any]) -> list[dict[str, Any]]:
    """Upright promises, each with a line of words above the chart."""
    layers = []
    for nth, line in enumerate(ceilings):
        wide = _CHAR * len(line.label)
        layers.append(_layer(f"ceiling{nth}", [{across["field"]: line.at}], _DASHED, {"x": across}))
        start = min(max(x(line.at) - wide / 2, 0), x.length - wide)
        layers.append(_text(f"ceiling{nth}_words", start, -7 - _ROW * nth, line.label, colour=_PROMISE))
    return layers


def _names(points: Sequence[Point], x: Axis, y: Axis, taken: list[Box]) -> list[dict[str, Any]]:
    """Labels beside the marks, the shipped first; one that would touch something is left out: then the table and the hover text must do."""
    drawn = sorted(points, key=lambda p: not p.shipped)
    largest = max((p.megabytes or 0 for p in points), default=0)
    radius = {id(p): math.sqrt((p.megabytes / largest * LARGEST if p.megabytes else 110) / math.pi) + 1 for p in drawn}
    centre = {id(p): (x(p.x), y.length - y(p.top1)) for p in drawn}
    taken = taken + [(px - r, py - r, px + r, py + r) for p in drawn for (px, py), r in [(centre[id(p)], radius[id(p)])]]
    layers = []
    for nth, p in enumerate(drawn):
        label = _cut(p.label, 30) + (f" {p.top1 * 100:.1f} %" if p.top1 < y.low else "")
        px, py = centre[id(p)]
        box = _free_place(px, py, radius[id(p)], _CHAR * len(label), taken, (0, -6, x.length, y.length - 2))
        if box is not None:
            taken.append(box)
            layers.append(_text(f"t{p.series}_words{nth}", box[0], box[3] - 4, label, p.shipped))
    return layers


def _free_place(px: float, py: float, r: float, wide: float, taken: Sequence[Box], frame: Box) -> Box | None:
    """The first box beside the mark that touches nothing, or None."""
    beside, above, below = (py - 8, py + 8), (py - r - 17, py - r - 1), (py + r + 1, py + r + 17)
    places = [(px + r + 3, beside), (px - r - 3 - wide, beside), (px - wide / 2, above), (px - wide / 2, below)]
    places += [(at, level) for level in (above, below) for at in (px + 2, px - wide - 2)]
    for start, (upper, lower) in places:
        box = (start, upper, start + wide, lower)
        inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            return box
    return None


def _layer(name: str, rows: Sequence[Any], mark: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "data": {"values": list(rows)}, "mark": mark, "encoding": encoding}


def _text(name: str, px: float, py: float, words: str, bold: bool = False, colour: str = "") -> dict[str, Any]:
    """Words that begin at a pixel."""
    mark = {
        "type": "text", "align": "left", "baseline": "alphabetic", "fontWeight": "bold" if bold else "normal",
        "color": colour or ("var(--ink)" if bold else "var(--soft)"),
    }  # fmt: skip
    place = {"x": {"field": "x", **_PIXEL}, "y": {"field": "y", **_PIXEL}, "text": {"field": "words"}}
    return _layer(name, [{"x": px, "y": py, "words": words}], mark, place)


def _colour(series: int) -> str:
    return f"var(--s{series % 6})"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
