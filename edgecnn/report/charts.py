"""The report's charts, as inline SVG that takes its colours from the page and so follows dark mode.

Every chart is drawn at the width it is asked for, so that text keeps its size on a phone and on a desktop. Text comes
from users: it goes in through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

BINS = 72
SHAPES = ("M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z", "M-5 -5H5V5H-5z", "M0 -6.5L6.2 4.8H-6.2z", "M0 -7L7 0L0 7L-7 0z")
_CHAR = 7.0  # width of an average character at the charts' 12.5 px


@dataclass(frozen=True)
class Point:
    """A file in the accuracy chart.

    Attributes:
        latency_s: seconds, > 0.
        top1: fraction.
        interval: of `top1`, fractions, or None.
        label: written beside it; title: the whole story, shown on hover.
        series: decides colour and shape.
        shipped: drawn filled.
    """

    latency_s: float
    top1: float
    interval: tuple[float, float] | None
    label: str
    title: str
    series: int
    shipped: bool


@dataclass(frozen=True)
class Line:
    """A promise, drawn across a chart at `at` (seconds or fraction)."""

    at: float
    label: str


@dataclass(frozen=True)
class Strip:
    """The latency samples of one target, and the percentiles that the result gives for them, in seconds."""

    name: str
    samples_s: Sequence[float]
    p50_s: float
    p90_s: float
    series: int


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] onto pixels [start, end], linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Around `about` round values inside the axis."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps if self.low <= m * 10.0**e <= self.high]
                if len(ticks) <= about + 2:
                    break
            return ticks
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def latency_axis(values_s: Sequence[float], start: float, end: float) -> Axis:
    """An axis in seconds: from zero, or logarithmic where the values differ more than sixfold."""
    low, high = min(values_s), max(values_s)
    if high > 6 * low:
        return Axis(low / 1.35, high * 1.35, start, end, log=True)
    return Axis(0.0, high * 1.12, start, end)


def accuracy_against_latency(points: Sequence[Point], floors: Sequence[Line], ceilings: Sequence[Line], width: int) -> Markup:
    """Files by p90 latency and top-1. `floors` are promised accuracies, `ceilings` promised latencies."""
    height, left, right, top, bottom = 380, 52, 16, 26, 46
    x = latency_axis([p.latency_s for p in points] + [c.at for c in ceilings], left, width - right)
    best = max([p.top1 for p in points] + [f.at for f in floors])
    # A file that lost everything must not flatten the others into one line: it is drawn at the bottom, with its figure.
    wanted = min([max(p.top1, best - 0.06) for p in points] + [f.at for f in floors])
    margin = max((best - wanted) * 0.18, 0.004)
    y = Axis(max(wanted - margin, 0.0), min(best + margin, 1.0 + margin / 3), height - bottom, top)

    out = [_open(width, height, "Accuracy against latency: every measured file. The same figures are in the tables.")]
    for value in y.ticks(6):
        if value <= 1:
            out.append(_grid(left, y(value), width - right, y(value)))
            out.append(_text(left - 8, y(value) + 4, f"{value * 100:.4g} %", "end"))
    for value in x.ticks(width // 110):
        out.append(_grid(x(value), top, x(value), height - bottom))
        out.append(_text(x(value), height - bottom + 18, f"{value * 1e3:.6g}"))
    scale = ", logarithmic" if x.log else ""
    out.append(_text((left + width - right) / 2, height - 8, f"p90 latency of one image (ms{scale})", css="axis"))
    out.append(_text(8, 14, "top-1", "start", css="axis"))

    taken: list[tuple[float, float, float, float]] = []
    for line in floors:
        out.append(_promise(left, y(line.at), width - right, y(line.at)))
        out.append(_text(left + 4, y(line.at) + 15, line.label, "start", css="promised"))
        taken.append((left, y(line.at) - 1, left + 4 + _CHAR * len(line.label), y(line.at) + 17))
    for nth, line in enumerate(ceilings):
        row = top + 12 + 15 * nth
        at_start = x(line.at) - _CHAR * len(line.label) < left
        out.append(_promise(x(line.at), top, x(line.at), height - bottom))
        out.append(_text(x(line.at) + (5 if at_start else -5), row, line.label, "start" if at_start else "end", css="promised"))
        edge = x(line.at) + (_CHAR * len(line.label) if at_start else -_CHAR * len(line.label))
        taken.append((min(edge, x(line.at)), row - 11, max(edge, x(line.at)), row + 3))

    drawn = sorted(points, key=lambda p: p.shipped)  # the shipped files last, on top
    taken += [(x(p.latency_s) - 7, y(p.top1) - 7, x(p.latency_s) + 7, y(p.top1) + 7) for p in drawn]
    for p in drawn:
        px, py = x(p.latency_s), y(p.top1)
        out.append(Markup('<g class="t{}">').format(p.series))
        if p.interval and p.shipped:
            bar = Markup('<path class="s{} interval" d="M{:.1f} {:.1f}V{:.1f}"/>')
            out.append(bar.format(p.series % 6, px, y(p.interval[0]), y(p.interval[1])))
        out.append(mark(px, py, p.series, p.shipped, p.title))
        if p.top1 < y.low:
            out.append(Markup('<path class="s{} interval" d="M{:.1f} {:.1f}l4 5l4 -5"/>').format(p.series % 6, px - 4, py - 16))
        out.append(Markup("</g>"))
    for p in reversed(drawn):
        label = _cut(p.label, 30) + (f" ↓ {p.top1 * 100:.1f} %" if p.top1 < y.low else "")
        place = _free_place(x(p.latency_s), y(p.top1), _CHAR * len(label), taken, (left, top - 8, width - 2, height - bottom - 2))
        if place is not None:
            taken.append(place)
            out.append(_text(place[0], place[3] - 4, label, "start", css=f"{'shipped' if p.shipped else 'lost'} t{p.series}"))
    return Markup("").join([*out, Markup("</svg>")])


def latency_strips(strips: Sequence[Strip], ceilings: Sequence[Line], width: int) -> Markup:
    """The distribution of each target's samples on one axis, with p50, p90 and the promises.

    Samples beyond twice a target's p99 are counted in words: an axis that reaches them would show nothing else.
    """
    left, right, top, bottom = 12, 16, 26, 46
    one_line = width > 600
    row = 82 if one_line else 98
    ordered = [sorted(s.samples_s) for s in strips]
    ends = [min(o[-1], 2 * o[int(0.99 * (len(o) - 1))]) for o in ordered]
    x = latency_axis([o[0] for o in ordered] + ends + [c.at for c in ceilings], left, width - right)
    base = top + row * len(strips)
    out = [_open(width, base + bottom, "Distribution of latency for each target. Percentiles are in the table below.")]
    for value in x.ticks(width // 110):
        out.append(_grid(x(value), top, x(value), base))
        out.append(_text(x(value), base + 18, f"{value * 1e3:.6g}"))
    scale = ", logarithmic" if x.log else ""
    out.append(_text((left + width - right) / 2, base + bottom - 8, f"latency of one image (ms{scale})", css="axis"))
    for line in ceilings:
        out.append(_promise(x(line.at), top - 6, x(line.at), base))
        at_start = x(line.at) - _CHAR * len(line.label) < left
        out.append(_text(x(line.at) + (5 if at_start else -5), top - 10, line.label, "start" if at_start else "end", css="promised"))
    for nth, (strip, samples, end) in enumerate(zip(strips, ordered, ends, strict=True)):
        floor = top + row * (nth + 1) - 8
        beyond = sum(s > end for s in samples)
        out.append(_ridge(samples, x, floor, 44, strip.series))
        tick = Markup('<path class="s{} tick" d="M{:.1f} {:.1f}V{:.1f}"/>')
        out += [tick.format(strip.series % 6, x(value), floor + 4, floor - 42) for value in (strip.p50_s, strip.p90_s)]
        text = f"p50 {milliseconds(strip.p50_s)} · p90 {milliseconds(strip.p90_s)} ms" + (f" · n {len(samples)}" if one_line else "")
        if beyond:
            text += f" · {beyond} slower, up to {milliseconds(samples[-1])} ms"
        name = _cut(strip.name, 24)
        out.append(_text(left + 4, floor - row + 24, name, "start", css="shipped"))
        text_x, text_y = (left + 12 + (_CHAR + 0.9) * len(name), floor - row + 24) if one_line else (left + 4, floor - row + 40)
        out.append(_text(text_x, text_y, text, "start", css="lost"))
    return Markup("").join([*out, Markup("</svg>")])


def mark(px: float, py: float, series: int, filled: bool, title: str) -> Markup:
    """The sign of a series: colour and shape, so that it does not rest on colour alone."""
    shape = SHAPES[series % len(SHAPES)]
    return Markup('<path class="s{} {}" transform="translate({:.1f} {:.1f})" d="{}"><title>{}</title></path>').format(
        series % 6, "full" if filled else "hollow", px, py, Markup(shape), title
    )


def key(series: int, filled: bool = True) -> Markup:
    """The sign of a series for a legend or a table cell."""
    return Markup('<svg class="key" width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true">{}</svg>').format(
        mark(0, 0, series, filled, "")
    )


def milliseconds(seconds: float) -> str:
    """At least three significant digits, in ms, without exponents."""
    ms = seconds * 1e3
    digits = 2 - math.floor(math.log10(abs(ms))) if ms else 0
    return f"{ms:,.{min(max(digits, 0), 6)}f}"


def _ridge(samples: Sequence[float], x: Axis, floor: float, height: float, series: int) -> Markup:
    """A smoothed histogram of sorted `samples`, over equal steps of pixels, `height` at its peak."""
    step = (x.end - x.start) / BINS
    counts = [0.0] * BINS
    for value in samples:
        counts[min(int((x(value) - x.start) / step), BINS - 1)] += 1
    padded = [0.0, *counts, 0.0]
    smooth = [(a + 2 * b + c) / 4 for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)]
    peak = max(smooth)
    line = " ".join(f"{x.start + (i + 0.5) * step:.1f} {floor - count / peak * height:.1f}" for i, count in enumerate(smooth))
    return Markup('<path class="s{} ridge" d="M{:.1f} {:.1f}L{} {:.1f} {:.1f}z"/>').format(series % 6, x.start, floor, line, x.end, floor)


def _free_place(
    px: float, py: float, wide: float, taken: Sequence[tuple[float, float, float, float]], frame: tuple[float, float, float, float]
) -> tuple[float, float, float, float] | None:
    """The first box beside the point that touches nothing, or None: then the table and the hover text must do."""
    for dx, dy in ((10, -8), (-10 - wide, -8), (-wide / 2, -26), (-wide / 2, 10), (8, -24), (8, 8), (-8 - wide, -24), (-8 - wide, 8)):
        box = (px + dx, py + dy, px + dx + wide, py + dy + 16)
        inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            return box
    return None


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 x 10^n that is at least `rough`."""
    ten = 10.0 ** math.floor(math.log10(rough))
    return next(m * ten for m in (1, 2, 5, 10) if m * ten >= rough * (1 - 1e-9))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _open(width: float, height: float, label: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)


def _grid(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="grid" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x1, y1, x2, y2)


def _promise(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="promise" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, css, text)
