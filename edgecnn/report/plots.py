"""The report's charts: Vega-Lite specifications, drawn to SVG here by vl-convert, so that the page holds pictures and no script.

What Vega-Lite draws is rebuilt from a short list of elements and attributes, takes its colours from the page (and so follows dark mode),
and every mark with a description says it on hover.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup, escape

WIDTH = 330
FLOAT, FILE = "var(--s5)", "var(--s0)"
_ELEMENTS = {"svg", "g", "path", "line", "text", "tspan", "rect"}
_ATTRIBUTES = {
    "d", "transform", "fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "opacity", "viewBox",
    "text-anchor", "font-size", "font-weight", "x", "y", "x1", "y1", "x2", "y2", "dx", "dy", "width", "height",
}  # fmt: skip
_OF_TARGET = re.compile(r"\b(t\d+)_\w+_marks\b")  # the class of a layer that is named t<number of the target>_<what it shows>
_LONG = re.compile(r"-?\d+\.\d{3,}")  # a hundredth of a pixel is enough
AXIS = {
    "labelColor": "var(--soft)", "titleColor": "var(--soft)", "gridColor": "var(--rule)", "domainColor": "var(--rule)",
    "tickColor": "var(--rule)", "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelLimit": 130,
    "labelSeparation": 6,
}  # fmt: skip
CONFIG = {"view": {"stroke": None}, "axis": AXIS, "legend": {"labelColor": "var(--soft)", "title": None, "orient": "top"}}


def reliability(float_bins: Sequence[Mapping[str, Any]], file_bins: Sequence[Mapping[str, Any]]) -> Markup:
    """How often each model is right (up) where it is so sure (right); on the diagonal it is as good as it says."""
    rows = [
        {
            "model": name,
            "confidence": b["confidence"],
            "accuracy": b["accuracy"],
            "n": b["n"],
            "said": f"{name}: {b['n']} images at {b['confidence'] * 100:.0f} % confidence, {b['accuracy'] * 100:.0f} % right",
        }
        for name, bins in (("float", float_bins), ("file", file_bins))
        for b in bins
    ]
    share = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"format": ".0%", "tickCount": 5}}
    model = {"field": "model", "type": "nominal", "scale": {"domain": ["float", "file"], "range": [FLOAT, FILE]}}
    place = {
        "x": {"field": "confidence", "title": "confidence", **share},
        "y": {"field": "accuracy", "title": "right", **share},
        "color": model,
    }
    diagonal = {"data": {"values": [{"a": 0}, {"a": 1}]}, "mark": {"type": "line", "strokeDash": [4, 4], "color": "var(--soft)"}}
    layers = [
        {**diagonal, "encoding": {"x": {"field": "a", **share}, "y": {"field": "a", **share}}},
        # A bin of a few images has its small mark, and does not bend the line.
        {"transform": [{"filter": "datum.n >= 5"}], "mark": {"type": "line", "strokeWidth": 1.5}, "encoding": place},
        {
            "mark": {"type": "point", "filled": True, "opacity": 1},
            "encoding": {
                **place,
                "size": {"field": "n", "type": "quantitative", "scale": {"range": [15, 160]}, "legend": None},
                "shape": {**model, "scale": {"domain": ["float", "file"], "range": ["circle", "square"]}},
                "description": {"field": "said"},
            },
        },
    ]
    return draw(
        {"data": {"values": rows}, "layer": layers, "height": 210}, "Reliability: how often each model is right, by its confidence."
    )


def robustness(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Top-1 of both models under each corruption, joined by a line."""
    marks = [
        {
            "model": name,
            "what": f"{row['kind']} {row['severity']}",
            "top1": row[key],
            "said": f"{row['kind']}, severity {row['severity']}: {name} {row[key] * 100:.1f} %",
        }
        for row in rows
        for name, key in (("float", "before"), ("file", "after"))
    ]
    what = {"field": "what", "type": "nominal", "sort": None, "title": None}
    top1 = {
        "field": "top1",
        "type": "quantitative",
        "scale": {"domain": [0, 1]},
        "axis": {"format": ".0%", "tickCount": 5},
        "title": "top-1",
    }
    pair = {"domain": ["float", "file"]}
    layers = [
        {"mark": {"type": "line", "color": "var(--soft)"}, "encoding": {"x": top1, "y": what, "detail": {"field": "what"}}},
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "encoding": {
                "x": top1,
                "y": what,
                "color": {"field": "model", "type": "nominal", "scale": {**pair, "range": [FLOAT, FILE]}},
                "shape": {"field": "model", "type": "nominal", "scale": {**pair, "range": ["circle", "square"]}},
                "description": {"field": "said"},
            },
        },
    ]
    return draw(
        {"data": {"values": marks}, "layer": layers, "height": {"step": 22}}, "Top-1 of the float model and the file on corrupted images."
    )


def class_changes(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """What classes lost in points, with 95 % intervals; flagged ones in the colour of failure."""
    marks = [
        {
            "label": f"{nth} {str(row['label'])[:24]}",  # two classes may share a name, but not a row
            "drop": -100 * row["drop"],
            "low": -100 * row["interval"][1],
            "high": -100 * row["interval"][0],
            "flagged": bool(row.get("flagged")),
            "said": f"{row['label']}: {-100 * row['drop']:+.1f} points on {row['n']} images",
        }
        for nth, row in enumerate(rows)
    ]
    name = {"labelExpr": "slice(datum.label, indexof(datum.label, ' ') + 1)"}
    label = {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": name}
    colour = {"condition": {"test": "datum.flagged", "value": "var(--fail)"}, "value": FILE}
    change = {"type": "quantitative", "title": "change of top-1, points"}
    layers = [
        {"mark": {"type": "rule", "color": "var(--soft)", "strokeDash": [4, 4]}, "encoding": {"x": {"datum": 0, **change}}},
        {
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "encoding": {"x": {"field": "low", **change}, "x2": {"field": "high"}, "y": label, "color": colour},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
            "encoding": {"x": {"field": "drop", **change}, "y": label, "color": colour, "description": {"field": "said"}},
        },
    ]
    return draw({"data": {"values": marks}, "layer": layers, "height": {"step": 18}}, "Change of top-1 by class, with 95 % intervals.")


def layer_times(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Time of each layer in ms, float and int8, joined by a line; layers in the order of the graph."""
    marks = [
        {"model": name, "what": _layer(nth, row), "ms": row[key] * 1e3, "said": f"{row['name']}: {name} {row[key] * 1e3:.3g} ms"}
        for nth, row in enumerate(rows)
        for name, key in (("float", "float_s"), ("int8", "int8_s"))
        if isinstance(row.get(key), int | float)
    ]
    place = {
        "x": {"field": "ms", "type": "quantitative", "title": "ms", "axis": {"tickCount": 5}},
        "y": {"field": "what", "type": "nominal", "sort": None, "title": None},
    }
    pair = {"field": "model", "type": "nominal"}
    domain = ["float", "int8"]
    point = {
        **place,
        "color": {**pair, "scale": {"domain": domain, "range": [FLOAT, FILE]}},
        "shape": {**pair, "scale": {"domain": domain, "range": ["circle", "square"]}},
        "description": {"field": "said"},
    }
    layers = [
        {"mark": {"type": "line", "color": "var(--soft)"}, "encoding": {**place, "detail": {"field": "what"}}},
        {"mark": {"type": "point", "filled": True, "size": 50, "opacity": 1}, "encoding": point},
    ]
    return draw({"data": {"values": marks}, "layer": layers, "height": {"step": 18}}, "Time of each layer in float and in int8.")


def layer_sensitivity(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Signal to quantization noise of each layer's output in dB, low is bad; what was kept in float in the colour of float."""
    marks = [
        {
            "what": _layer(nth, row),
            "db": row["sqnr_db"],
            "kept": "kept in float" if row.get("kept_float") else "int8",
            "said": f"{row['name']}: {row['sqnr_db']:.1f} dB{', kept in float' if row.get('kept_float') else ''}. {row.get('why') or ''}",
        }
        for nth, row in enumerate(rows)
    ]
    encoding = {
        "x": {"field": "db", "type": "quantitative", "title": "signal to rounding noise, dB", "axis": {"tickCount": 5}},
        "y": {"field": "what", "type": "nominal", "sort": None, "title": None},
        "color": {"field": "kept", "type": "nominal", "scale": {"domain": ["int8", "kept in float"], "range": [FILE, FLOAT]}},
        "description": {"field": "said"},
    }
    layer = {"mark": {"type": "bar", "height": 9}, "encoding": encoding}
    return draw({"data": {"values": marks}, "layer": [layer], "height": {"step": 18}}, "How much int8 changes each layer's output.")


def _layer(nth: int, row: Mapping[str, Any]) -> str:
    """A name for an axis, never the same twice."""
    name = str(row["name"])
    return f"{nth + 1}. {name if len(name) <= 24 else '…' + name[-23:]}"


def draw(spec: Mapping[str, Any], label: str, css: str = "plot") -> Markup:
    """SVG for the page. `label` is read out in the chart's place."""
    import vl_convert

    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": None,
        "width": WIDTH,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 18, "right": 12, "top": 4, "bottom": 4},  # the reader's font may be wider than the one measured here
        "config": CONFIG,
        **spec,
    }
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg(whole))
    return Markup('<svg class="{}" role="img" aria-label="{}" viewBox="{}">{}</svg>').format(
        css, label, root.get("viewBox", ""), Markup("").join(_safe(child) for child in root)
    )


def _safe(element: ElementTree.Element) -> Markup:
    """The element rebuilt from what a picture needs."""
    name = element.tag.rpartition("}")[2]
    if name not in _ELEMENTS or element.get("display") == "none":
        return Markup("")
    attributes = Markup("").join(
        Markup(' {}="{}"').format(key, _LONG.sub(lambda found: f"{float(found[0]):.2f}", value))
        for key, value in element.attrib.items()
        if key in _ATTRIBUTES and value != ""
    )
    if group := _OF_TARGET.search(element.get("class", "")):
        attributes += Markup(' class="{}"').format(group[1])
    said = element.get("aria-label") if element.get("role") == "graphics-symbol" and name in ("path", "line") else None
    title = Markup("<title>{}</title>").format(said) if said else Markup("")
    inner = Markup("").join(_safe(child) for child in element)
    if name == "g" and not inner:
        return Markup("")
    return Markup("<{0}{1}>{2}{3}{4}</{0}>").format(Markup(name), attributes, title, escape(element.text or ""), inner)
