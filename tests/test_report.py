"""The report: one page from result.json, whatever is in it."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgecnn.errors import EdgecnnError, IntegrityError, UsageError
from edgecnn.report import charts, tradeoff, write_report
from edgecnn.report.page import worst_classes

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'; </style><style>*{display:none}",
    "{{ 7 * 191 }}{% raw %}",
    "]]></svg><svg onload=alert(3)>",
    "\u202egnp.exe\u0000\ud800",
    "soft\u00adjoined\u2060vowel\u180etag\U000e0041own\ue004",
    "https://evil.example/x.js",
    "&lt;b&gt; &amp; ‘naïve’ 日本語 🐈",
)


def latency(p50_s: float, seed: int, n: int = 400, **more: Any) -> dict[str, Any]:
    """A skewed distribution with a few stragglers, as a real board gives."""
    rng = random.Random(seed)
    samples = [p50_s * (0.94 + rng.expovariate(9) + (rng.random() > 0.99) * rng.uniform(1, 6)) for _ in range(n)]
    ordered = sorted(samples)
    return {
        "p50": ordered[n // 2],
        "p90": ordered[n * 9 // 10],
        "p99": ordered[n * 99 // 100] if n > 660 else None,
        "intervals": {"p50": [p50_s * 0.99, p50_s * 1.04], "p90": [ordered[n * 85 // 100], ordered[n * 93 // 100]]},
        "n": n,
        "samples": samples,
        "threads": 1,
        "load_s": 0.041,
        "peak_rss_bytes": 96_000_000,
        "processes": 3,
        "first_s": p50_s * 4,
        "doubts": [],
        "void": "",
        **more,
    }


def candidate(
    name: str, precision: str, top1: float, p50_s: float, size: int, why: str, fastest_float_s: float, chosen: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "precision": precision,
        "chosen": chosen,
        "why": why,
        "file_sha256": "ab" * 32,
        "size_bytes": size,
        "choice_top1": top1,
        "choice_agreement": min(1.0, top1 + 0.012),
        "choice_n": 268,
        "p50_s": p50_s,
        "p90_s": p50_s * 1.12,
        "samples_n": 0 if math.isnan(p50_s) else 400,
        "speedup": fastest_float_s / p50_s,
        "notes": [],
    }


def classes(labels: list[str], n: int, top1: float, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"label": label, "n": n, "top1": round(min(1.0, rng.gauss(top1, 0.02)) * n) / n} for label in labels]


def passing() -> dict[str, Any]:
    """What `make demo` gives: three targets, all kept; TensorRT without a GPU has no latency."""
    labels = [str(i) for i in range(10)]
    promise = {"accuracy_drop": 0.01, "min_accuracy": None, "p90_latency_ms": 2.0, "size_mb": 2.0}
    recipe = "name: digits-int8\nseed: 0\nmodel: {source: timm, name: mobilenetv2_035}\nstages:\n  - {stage: train, epochs: 40}\n"
    rows = [
        (
            "pi5",
            "onnxruntime",
            "int8-percentile",
            0.9776,
            0.00031,
            0.00062,
            [-0.002, 0.013],
            [
                ("fp32", "fp32", 0.985, 0.00062, 1_720_000, "slower than int8-percentile: 0.62 ms against 0.31"),
                ("int8-minmax", "int8", 0.9590, 0.00031, 512_000, "drops 2.6 points against fp32, the promise is 1"),
                ("int8-entropy", "int8", 0.9739, 0.00033, 512_000, "slower than int8-percentile: 0.33 ms against 0.31"),
                ("int8-keep-first", "int8", 0.9813, 0.00036, 530_000, "slower than int8-percentile: 0.36 ms against 0.31"),
                ("int8-percentile", "int8", 0.9813, 0.00031, 512_000, "fastest that keeps the promise"),
            ],
        ),
        (
            "nuc",
            "openvino",
            "int8-nncf",
            0.9821,
            0.00021,
            0.00047,
            [-0.006, 0.008],
            [
                ("fp32", "fp32", 0.985, 0.00055, 1_690_000, "slower than int8-nncf: 0.55 ms against 0.21"),
                ("bf16", "bf16", 0.985, 0.00047, 1_690_000, "slower than int8-nncf: 0.47 ms against 0.21"),
                ("fp16", "fp16", 0.985, 0.00054, 870_000, "slower than int8-nncf: 0.54 ms against 0.21"),
                ("int8-nncf", "int8", 0.9851, 0.00021, 498_000, "fastest that keeps the promise"),
            ],
        ),
        (
            "orin",
            "tensorrt",
            "int8-explicit",
            0.9799,
            None,
            None,
            [-0.005, 0.011],
            [
                ("fp32", "fp32", 0.985, None, 1_720_000, "precision: int8 was asked for"),
                ("int8-explicit", "int8", 0.9776, None, 534_000, "the only int8 candidate, latency not measured here"),
            ],
        ),
    ]
    targets = []
    for i, (name, runtime, chosen, top1, p50_s, float_s, drop, found) in enumerate(rows):
        targets.append(
            {
                "name": name,
                "runtime": runtime,
                "precision": "int8",
                "candidate": chosen,
                "verdict": "pass",
                "reason": f"{chosen} is the fastest of {len(found)} candidates that keeps the promise",
                "reasons": ["top-1 drop 0.5 points, promised at most 1"] if p50_s else ["latency was not promised for this target"],
                "bundle": f"bundles/{name}",
                "file": "model.onnx",
                "file_sha256": f"{i}c" * 32,
                "size_bytes": 512_000 + i,
                "top1": top1,
                "top1_drop": 0.983 - top1,
                "drop_interval": drop,
                "agreement": 0.993,
                "n": 447,
                "per_class": classes(labels, 44, top1, i + 1),
                "latency_s": latency(p50_s, i) if p50_s else None,
                "where": "this machine, onnxruntime 1.31.1 CPUExecutionProvider, 1 thread" if p50_s else "not measured here: no GPU",
                "accuracy_where": None if p50_s else "the same graph in onnxruntime 1.31.1, not in TensorRT",
                "notes": [] if p50_s else ["built by tensorrt_rtx 1.7 for sm86"],
                "parity": [
                    {"step": "torch -> onnx (onnxruntime fp32)", "max_error": 1.1e-5, "cosine": 0.9999999, "agreement": 1.0, "n": 447},
                    {"step": f"onnx -> {chosen}", "max_error": 1.83, "cosine": 0.99812, "agreement": 0.993, "n": 447},
                ],
                "promise": promise if p50_s else promise | {"p90_latency_ms": None},
                "candidates": [
                    candidate(c, p, t, s or math.nan, size, why, float_s or math.nan, c == chosen) for c, p, t, s, size, why in found
                ],
            }
        )
    return {
        "schema": 1,
        "edgecnn": "0.1.0",
        "command": "edgecnn compress --recipe recipes/int8.yaml --out out/int8",
        "recipe": {},
        "recipe_text": recipe,
        "recipe_sha256": "5f" * 32,
        "name": "digits-int8",
        "verdict": "pass",
        "reasons": ["3 targets: every int8 file loses at most 0.6 points of top-1", "orin: latency was not promised, so it was not needed"],
        "promise": promise,
        "data": {
            "train": 947,
            "calibration": 135,
            "choice": 268,
            "evaluation": 447,
            "digest": "d1" * 32,
            "calibration_sha256": "e2" * 32,
            "doubts": [],
            "skipped": [],
        },
        "baseline": {
            "top1": 0.983,
            "n": 447,
            "interval": [0.966, 0.992],
            "per_class": classes(labels, 44, 0.983, 0),
            "parameters": 408_426,
            "macs": 21_400_000,
        },
        "stages": [
            {"stage": "train", "top1": 0.979, "seconds": 143.2, "resumed": False, "notes": ["40 epochs", "best at 36"]},
            {"stage": "qat", "top1": 0.983, "seconds": 41.8, "resumed": True, "notes": []},
        ],
        "targets": targets,
        "environment": {
            "machine": {
                "cpu": "AMD EPYC 9B45",
                "cores": 2,
                "isa": ["AVX2", "AVX512-VNNI", "AVX512-BF16"],
                "governor": None,
                "load": {"1 min": 0.42, "steal": 0.01},
                "throttled": False,
            },
            "versions": {"torch": "2.15.0", "onnxruntime": "1.31.1", "openvino": "2026.4.1", "timm": "1.0.31", "python": "3.11.7"},
        },
        "seconds": 214.6,
        "doubts": ["the clock frequency cannot be read on this machine"],
    }


def failing() -> dict[str, Any]:
    """One target that breaks its promise: 1000 classes, hostile text wherever text may come from outside, much missing."""
    labels = [HOSTILE[i % len(HOSTILE)] + f" {i}" for i in range(1000)]
    base, left = classes(labels, 5, 0.7, 0), classes(labels, 5, 0.66, 1)
    left[700]["top1"], base[700]["top1"] = 0.0, 1.0
    found = [candidate(f"{h} {i}", h, 0.7 - i / 50, 0.004 + i / 1000, 3_000_000, h, 0.004) for i, h in enumerate(HOSTILE)]
    found[-1]["choice_top1"] = 0.011  # collapsed
    text = " ".join(HOSTILE)
    return {
        "schema": 1,
        "edgecnn": "0.1.0",
        "command": f"edgecnn compress --recipe '{text}'",
        "recipe": {},
        "recipe_text": text,
        "name": HOSTILE[0],
        "verdict": "fail",
        "reasons": ["t0: top-1 drop 4.1 points [3.2, 5.0], promised at most 1", "t0: p90 7.4 ms, promised at most 5", *HOSTILE],
        "promise": {"accuracy_drop": 0.01, "p90_latency_ms": 5.0},
        "data": {"train": 0, "calibration": 100, "choice": None, "evaluation": 5000, "doubts": [text], "skipped": list(HOSTILE) * 100},
        "baseline": {"top1": 0.701, "n": 5000, "interval": [0.688, 0.714], "per_class": base, "parameters": 3_504_872},
        "stages": [{"stage": h, "top1": None, "seconds": None, "notes": [h]} for h in HOSTILE],
        "targets": [
            {
                "name": HOSTILE[1],
                "runtime": "onnxruntime",
                "precision": "int8",
                "candidate": HOSTILE[0],
                "verdict": "fail",
                "reason": text,
                "reasons": list(HOSTILE),
                "bundle": HOSTILE[4],
                "file": HOSTILE[1],
                "file_sha256": "0f" * 32,
                "size_bytes": 3_600_000,
                "top1": 0.66,
                "top1_drop": 0.041,
                "drop_interval": [0.032, 0.05],
                "agreement": 0.9,
                "n": 5000,
                "per_class": left,
                "latency_s": latency(0.006, 5, 2000, doubts=["the machine was busy: load 3.1 on 2 cores", text]),
                "where": text,
                "notes": [text],
                "parity": [{"step": text, "max_error": None, "cosine": math.nan}],
                "promise": {"accuracy_drop": 0.01, "p90_latency_ms": 5.0},
                "candidates": found,
            }
        ],
        "environment": {"machine": {HOSTILE[0]: {HOSTILE[1]: list(HOSTILE)}}, "versions": {HOSTILE[0]: HOSTILE[1]}},
        "seconds": None,
        "doubts": list(HOSTILE),
    }


class Page(HTMLParser):
    """What a browser would make of a page: tags with attributes, and text outside <style>."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def written(result: dict[str, Any], folder: Path) -> str:
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    write_report(folder / "result.json", folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [passing, failing])
def test_fetches_nothing_and_runs_nothing(make: Any, tmp_path: Path) -> None:
    """The page holds no script, no handler and no reference that leaves the file, and its own policy forbids them."""
    html = written(make(), tmp_path)
    page = Page(html)
    assert page.open == []
    assert len(page.tags) > 100
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
        "p",
        "a",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "div",
        "span",
        "small",
        "b",
        "bdi",
        "code",
        "pre",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
        "figcaption",
        "details",
        "summary",
        "svg",
        "path",
        "text",
        "g",
        "line",
        "rect",
        "img",
        "br",
        "label",
        "input",
    }
    for tag, attrs in page.tags:
        assert tag in allowed, tag
        assert not [a for a in attrs if a.startswith("on") or a in ("srcset", "action", "xlink:href")], attrs
        assert attrs.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert attrs.get("href", "#").startswith("#")
        assert tag != "input" or attrs["type"] == "checkbox"  # shows and hides by style alone
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    assert not re.search(r"url\(|@import", style[1])
    assert html.count("<style>") == 1
    assert "default-src 'none'" in html


def test_hostile_text_is_shown_not_obeyed(tmp_path: Path) -> None:
    """Every hostile string can be read on the page as it is, templates are not evaluated, tricks are written out."""
    html = written(failing(), tmp_path)
    text = Page(html).text
    seen = [h for h in HOSTILE if h.isprintable()]
    assert len(seen) == len(HOSTILE) - 2
    for hostile in seen:
        assert text.count(hostile) > 3, hostile
    assert "1337" not in text
    assert "\\u202egnp.exe\\u0000\\ud800" in text
    assert not re.search("[\x00-\x08\u00ad\u180e\u202a-\u202e\u2060-\u2069\ue000-\uf8ff\U000e0000-\U000e007f]", html)


@pytest.mark.parametrize("make", [passing, failing])
def test_every_target_candidate_and_reason_is_there(make: Any, tmp_path: Path) -> None:
    """Nothing of the result's lists is dropped: targets, candidates with why they lost, reasons, stages, doubts, notes."""
    result = make()
    text = Page(written(result, tmp_path)).text
    wanted = [*result["reasons"], *result["doubts"], *(s["stage"] for s in result["stages"])]
    for target in result["targets"]:
        wanted += [target["name"], target["where"], target["reason"], target["file_sha256"], *target["reasons"], *target["notes"]]
        wanted += [target["accuracy_where"]] if target.get("accuracy_where") else []
        wanted += [x for c in target["candidates"] for x in (c["name"], c["why"])]
    wanted = [w for w in wanted if w.isprintable()]
    assert len(wanted) > 20
    for want in wanted:
        assert want in text, want


@pytest.mark.parametrize(
    ("verdict", "word"), [("pass", "Pass"), ("fail", "Fail"), ("unproven", "Unproven"), (None, "No verdict"), ("odd", "odd")]
)
def test_the_verdict_is_a_word_in_the_heading(verdict: str | None, word: str, tmp_path: Path) -> None:
    """The first heading says the verdict in words; an unknown one is shown as it is and never as a pass."""
    html = written(passing() | {"verdict": verdict}, tmp_path)
    heading = Page(html.split("<h1>")[1].split("</h1>")[0])
    assert word in heading.text
    colour = verdict if verdict in ("pass", "fail", "unproven") else "none"
    assert [a["class"] for _, a in heading.tags if "badge" in a.get("class", "")] == [f"badge {colour}"]


def test_a_thousand_classes_stay_small(tmp_path: Path) -> None:
    """1000 classes stay far under 3 MB, all are on the page, and only 20 are open at first."""
    html = written(failing(), tmp_path)
    assert len(html.encode()) < 1_000_000
    first, rest = html.split('<section id="classes">')[1].split("</section>")[0].split("<details>")
    assert first.count('<th scope="row">') == 20
    assert rest.split("</details>")[0].count('<th scope="row">') == 980


def test_the_demo_is_small(tmp_path: Path) -> None:
    """A usual run's page is under 200 kB."""
    assert len(written(passing(), tmp_path).encode()) < 200_000


def test_the_class_that_lost_most_comes_first() -> None:
    """A sabotaged class leads the table, whatever the noise of the others; equal losses go by the lower top-1."""
    rows = worst_classes(failing())
    assert rows[0]["label"].endswith(" 700")
    assert [r["worst"] for r in rows] == sorted((r["worst"] for r in rows), reverse=True)
    pairs = [(a, b) for a, b in itertools.pairwise(rows) if a["worst"] == b["worst"]]
    assert len(pairs) > 100
    assert all(a["lowest"] <= b["lowest"] for a, b in pairs)


def prune(value: Any, rng: random.Random, null: bool) -> Any:
    """A copy with about a fifth of the fields taken away, or set to null."""
    if isinstance(value, dict):
        kept = {k: prune(v, rng, null) for k, v in value.items()}
        gone = {k for k in kept if k != "schema" and rng.random() < 0.2}
        return {k: None if k in gone else v for k, v in kept.items() if null or k not in gone}
    return [prune(v, rng, null) for v in value] if isinstance(value, list) else value


def test_any_field_may_be_missing_or_null(tmp_path: Path) -> None:
    """40 results with a fifth of their fields gone or null each give a whole page."""
    rendered = 0
    small = failing()
    small["baseline"]["per_class"], small["targets"][0]["per_class"] = (
        small["baseline"]["per_class"][:25],
        small["targets"][0]["per_class"][:23],
    )
    for seed in range(20):
        for full in (passing(), small):
            page = Page(written(prune(full, random.Random(seed), null=seed % 2 == 0), tmp_path))
            assert page.open == []
            assert "Reproduce" in page.text
            assert not {"None", "nan"} & set(page.text.split())
            rendered += 1
    assert rendered == 40


@pytest.mark.parametrize("field", ["targets", "stages", "reasons", "doubts", "data", "baseline", "environment", "promise"])
def test_an_empty_part_still_renders(field: str, tmp_path: Path) -> None:
    """A run that stopped early has empty parts; the page says what is there."""
    result = passing()
    result[field] = type(result[field])()
    assert Page(written(result, tmp_path)).open == []


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """A target without latency shows no figure for it and is named as missing from the chart."""
    html = written(passing(), tmp_path)
    row = html.split("<h2>Targets</h2>")[1].split("orin</bdi>")[1].split("</tr>")[0]
    assert row.count("not measured") == 3  # p50, p90, speed-up
    assert "for want of a latency: orin" in Page(html).text


def test_int8_that_is_slower_is_said_in_the_first_table(tmp_path: Path) -> None:
    """A shipped file that float beats on the same target says so in words, and only such a one."""
    result = passing()
    next(c for c in result["targets"][1]["candidates"] if c["chosen"])["speedup"] = 0.93
    table = written(result, tmp_path).split("<h2>Targets</h2>")[1].split("</table>")[0]
    rows = {name: table.split(f"<bdi>{name}</bdi>")[1].split("</tr>")[0] for name in ("pi5", "nuc", "orin")}
    assert [name for name, row in rows.items() if "slower than float" in row] == ["nuc"]


def test_a_void_latency_is_not_shown_as_a_figure(tmp_path: Path) -> None:
    """A measurement that must not be used appears as void with its reason, in no chart and in no table."""
    result = passing()
    void = result["targets"][0]["latency_s"]
    void["void"] = "another process used the cores"
    for candidate in result["targets"][0]["candidates"]:
        candidate["void"] = void["void"]
    html = written(result, tmp_path)
    assert "another process used the cores" in html
    before = html[: html.index('<section id="candidates">')]
    assert charts.milliseconds(result["targets"][1]["latency_s"]["p90"]) in before
    for target, said in ((0, False), (1, True)):
        figures = [result["targets"][target]["latency_s"][p] for p in ("p50", "p90")]
        assert any(f'<span class="main">{charts.milliseconds(f)}<' in before for f in figures) == said
    candidates = html[html.index('<section id="candidates">') : html.index('<section id="trust">')]
    assert "no latency, the measurement is void: another process used the cores" in html.partition("<nav")[0]
    assert candidates.count('<span class="main">void</span>') == 3 * len(result["targets"][0]["candidates"])
    latency = before[before.index("Accuracy against latency:") :]
    assert "pi5, fp32:" not in latency[: latency.index("</svg>")]
    assert "nuc, fp32:" in latency[: latency.index("</svg>")]


def test_a_pass_that_more_images_could_overturn_says_so_first(tmp_path: Path) -> None:
    """Where the interval of the drop reaches beyond the promise, the first screen has both figures; where it does not, nothing."""
    result = passing()
    first, second = result["targets"][:2]
    for target, high in ((first, 0.019), (second, 0.009)):
        target["drop_interval"], target["promise"] = [-0.002, high], {**target["promise"], "accuracy_drop": 0.01}
    hero = written(result, tmp_path).partition("<nav")[0]
    assert f"{first['name']}: judged by the drop as measured; with 447 images it may be as much as 1.9 points (promised: at most 1)" in hero
    assert f"{second['name']}: judged" not in hero


def test_a_flagged_class_is_on_the_first_screen(tmp_path: Path) -> None:
    """With what it lost and what the model as a whole did; where no class could be judged, that is said and not that none lost."""
    result = passing()
    row = {"label": "seven", "n": 40, "before": 0.98, "after": 0.1, "drop": 0.88, "interval": [0.7, 0.95], "p_holm": 1e-9, "flagged": True}
    result["targets"][0]["trust"] = {"classes": {"drop": 0.004, "tested": 1, "small": 0, "least": 6, "rows": [row]}}
    html = written(result, tmp_path)
    assert "class seven lost 88.0 points of top-1, the model as a whole 0.4" in html.partition("<nav")[0]
    result["targets"][0]["trust"]["classes"] = {"drop": 0.004, "tested": 0, "small": 1, "least": 6, "rows": [{**row, "flagged": False}]}
    html = written(result, tmp_path)
    assert "cannot be told from so few images" in html
    assert "No class lost" not in html


def test_candidates_stand_beside_what_ships(tmp_path: Path) -> None:
    """Top-1 on the choice images is moved so that that of fp32 is the float model's on the evaluation images; hover tells the figure."""
    result = passing()
    for candidate in result["targets"][0]["candidates"]:
        candidate["choice_top1"] -= 0.05
    points = [p for p in tradeoff._points({**result, "targets": result["targets"][:1]}, tradeoff._size) if p.label == "fp32"]
    assert [p.top1 for p in points] == [pytest.approx(result["baseline"]["top1"])]
    assert "on the choice images" in points[0].said


def test_the_promise_is_drawn_in_the_charts(tmp_path: Path) -> None:
    """The floor is the float model's top-1 less the promised drop; the ceiling is the promised p90."""
    text = Page(written(passing(), tmp_path)).text
    assert "promised: at least 97.3 %" in text
    assert text.count("promised: p90 ≤ 2 ms") == 4  # by latency and in the distributions, each for two widths
    assert text.count("promised: ≤ 2 MB") == 2


def test_size_is_drawn_and_every_mark_says_its_figures(tmp_path: Path) -> None:
    """A mark's area grows with its file, a target without latency has its place by size, and hovering tells the whole story."""
    html = written(passing(), tmp_path)
    by_latency, by_size, steady = html.split("<figure>")[1:4]
    area = {
        name: max(map(float, re.findall(r"[-.\d]+", re.search(rf' d="([^"]+)"[^>]*><title>{name}', by_latency)[1])))  # type: ignore[index]
        for name in ("pi5, fp32", "pi5, int8-minmax")
    }
    assert area["pi5, fp32"] / area["pi5, int8-minmax"] == pytest.approx(math.sqrt(1.72 / 0.512), rel=0.05)
    assert "orin, ships int8-explicit" not in by_latency
    assert "orin, ships int8-explicit: 98.0 %, no latency that may be used, 0.512 MB" in by_size
    assert "pi5, int8-minmax: 95.9 %, p90 0.347 ms, 0.512 MB on the choice images. drops 2.6 points against fp32" in by_latency
    assert re.search(r"pi5: p50 0\.3\d\d ms, interval 0\.307 to 0\.322", steady)


def test_odd_samples_and_lone_files_are_drawn() -> None:
    """All samples alike, one sample, a file at nothing: a picture without a figure that is none."""
    drawn = [charts.steadiness([charts.Strip("a", s, [("p50", s[0], None)], 0)], [], 880) for s in ([0.3] * 9, [0.3], [0.001, 500.0])]
    drawn.append(charts.accuracy([charts.Point(1.0, 0.0, None, None, "a", "b", 9, True)], [charts.Line(0.0, "z")], [], "ms", 360, "c"))
    assert [picture.count("<svg") for picture in drawn] == [1] * 4
    assert not any("NaN" in picture or "undefined" in picture for picture in drawn)


def test_the_page_is_a_function_of_the_result(tmp_path: Path) -> None:
    """The same result gives the same bytes, and no half-written file is left beside it."""
    assert written(passing(), tmp_path) == written(passing(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "result.json"]


def with_trust(result: dict[str, Any], names: list[str], n: int = 4000) -> dict[str, Any]:
    """The result with the trust section of its first target, in which the last class lost half of its answers."""
    import numpy as np

    from edgecnn.trust.change import Predictions
    from edgecnn.trust.examine import extra_drops, statistics

    random = np.random.default_rng(0)
    labels = np.arange(n) % len(names)
    before = np.where(random.random(n) < 0.8, labels, (labels + 1) % len(names))
    after = np.where((labels == len(names) - 1) & (random.random(n) < 0.5), 0, before)
    sure = random.uniform(0.4, 1, n)
    kinds = [("noise", 3), ("blur", 3)]
    right = random.random((2, 200)) < 0.7
    result["targets"][0]["trust"] = {
        **statistics(labels, Predictions(before, sure), Predictions(after, sure), tuple(names)),
        "robustness": {"n": 200, **extra_drops(kinds, right, right, right)},
        "pictures": [{"file": f, "kind": "lost", "id": f, "truth": "a", "before": "a", "after": "b"} for f in PICTURES],
        "panels": ["the image"],
        "gradcam": "by hand",
    }
    return result


PICTURES = ["pi-00.jpg", "../secret.jpg", "/etc/passwd", "link.jpg", "notes.txt", "not.jpg", "gone.jpg"]


def test_a_flagged_class_is_named_with_its_figures(tmp_path: Path) -> None:
    """The sabotaged class, its loss and its p-value are in the trust section; the flips are counted in words; charts are drawn."""
    html = written(with_trust(passing(), [*map(str, range(9)), "nightingale"]), tmp_path)
    section = Page(html.split('<section id="trust">')[1].split("</section>")[0])
    assert re.search(r"Class nightingale lost [34]\d\.\d points", section.text)
    assert "answers changed" in section.text
    assert "from right to wrong, 0 from wrong to right" in section.text
    assert sum(tag == "svg" and "plot" in attrs.get("class", "") for tag, attrs in section.tags) == 3
    assert "nightingale: -" in section.text  # the hover text of its mark


def test_only_our_own_pictures_enter_the_page(tmp_path: Path) -> None:
    """A name that leaves the folder, a link, another kind of file or a file that is no JPEG is left out; the page is made all the same."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"\xff\xd8\xffsecret")
    (folder / "pi-00.jpg").write_bytes(b"\xff\xd8\xffours")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "notes.txt").write_bytes(b"\xff\xd8\xff")
    (folder / "not.jpg").write_bytes(b"<svg onload=alert(1)>")
    html = written(with_trust(passing(), ["a", "b"]), tmp_path)
    assert html.count("<img ") == 1
    assert "b3Vycw" in html
    assert "c2VjcmV0" not in html


def test_hostile_class_names_are_inert_in_charts(tmp_path: Path) -> None:
    """Names with markup are text in the trust section too, hover texts among them."""
    html = written(with_trust(passing(), [*HOSTILE[:5], *HOSTILE[6:]]), tmp_path)
    page = Page(html)
    assert page.open == []
    assert not [attrs for _, attrs in page.tags if any(a.startswith("on") for a in attrs)]
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>") >= 1


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("", IntegrityError, "JSON"),
        ("[]", IntegrityError, "schema"),
        ('{"schema": 1, "targets": "x"}', IntegrityError, "not as edgecnn writes it"),
        ('{"schema": 1, "promise": "x", "environment": "x"}', IntegrityError, "not as edgecnn writes it"),
        ('{"schema": 2}', UsageError, "newer"),
        (None, UsageError, "not there"),
        ("[" * 100_000, IntegrityError, "JSON"),
    ],
)
def test_what_is_no_result_is_refused(text: str | None, kind: type[EdgecnnError], says: str, tmp_path: Path) -> None:
    """A missing, broken, foreign or newer file is one clear error, and no page is written."""
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(kind, match=says):
        write_report(tmp_path / "result.json", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00031, "0.310"), (0.0123456, "12.3"), (1.5, "1,500"), (2e-7, "0.000200"), (0.1, "100"), (0, "0")]
)
def test_milliseconds_have_three_digits(seconds: float, text: str) -> None:
    """Times are readable without exponents over seven orders of magnitude."""
    assert charts.milliseconds(seconds) == text


def layered() -> dict[str, Any]:
    """A passing result whose first target has 60 layers, whose stages were timed, and that had controls."""
    result = passing()
    result["targets"][0]["layers"] = [
        {
            "name": f"blocks.{i}.conv_dw",
            "operator": "Conv",
            "sqnr_db": 40 - i / 2,
            "flips": i / 600,
            "float_s": 1e-5 * (i + 1),
            "int8_s": 5e-6 * (i + 1),
        }
        for i in range(60)
    ]
    result["targets"][0]["layers"][7] |= {"kept_float": True, "why": "int8 is slower here", "int8_s": None}
    result["targets"][0]["layers"][8] = {"name": "<b>half</b>"}
    result["targets"][0]["draws"] = [{"top1": top1, "failure": ""} for top1 in (0.71, 0.72)] + [{"failure": "no memory"}]
    for nth, stage in enumerate(result["stages"]):
        stage |= {"latency_s": 0.002 / (nth + 1), "latency_where": "pi (Cortex-A76), onnxruntime, 1 thread"}
    control = {"n": 400, "ours_top1": 0.98, "ours_latency": 0.6, "note": "narrower", "seconds": 60.0}
    result["controls"] = [
        {
            "name": "uniform-width",
            "top1": 0.97,
            "latency": 0.61,
            "macs": 1e7,
            "parameters": 2e6,
            "verdict": "ours is +1.00 points",
            **control,
        },
        {"name": "nearest-zoo", "verdict": "not made", **control},
    ]
    return result


def test_layers_controls_and_timed_stages_are_shown_where_there_are_such(tmp_path: Path) -> None:
    """The layers worth a line are drawn, all are listed, one kept in float is named with its reason; without them nothing is said."""
    assert 'id="layers"' not in written(passing(), tmp_path)
    page = written(layered(), tmp_path)
    layers = page[page.index('<section id="layers">') : page.index('<section id="stages">')]
    assert layers.count('<svg class="plot"') == 2
    assert "blocks.7.conv_dw</bdi> (int8 is slower here)" in layers
    assert "made again from 3 draws of two thirds of the calibration images: top-1 71.0 %, 72.0 %, not built on" in " ".join(page.split())
    assert layers.count('<tr><th scope="row">') == 60
    assert "the 24 slowest, most sensitive or kept in float, of 60" in layers
    assert "<b>half</b>" not in layers
    assert layers.count("blocks.59.conv_dw: 10.5 dB") == 1  # the most sensitive, on hover
    stages = page[page.index('<section id="stages">') : page.index('<section id="classes">')]
    assert "Latency, ms" in stages
    assert stages.count("on pi (Cortex-A76), onnxruntime, 1 thread.</caption>") == 2
    assert all(word in stages for word in ("uniform-width", "ours is +1.00 points", "nearest-zoo", "not made"))


LARGE = """
import json, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_report import passing
from edgecnn.report import write_report
from edgecnn.trust.change import Predictions
from edgecnn.trust.examine import statistics

folder, labels = Path(sys.argv[2]), np.arange(50_000) % 1000
before, after = (np.load(folder / name, mmap_mode="r") for name in ("before.npy", "after.npy"))
begun = time.monotonic()
found = statistics(labels, Predictions.of(before), Predictions.of(after), tuple(f"class {i}" for i in range(1000)))
run = passing()
rows = found["classes"]["rows"]
run["baseline"]["per_class"] = [{"label": r["label"], "n": r["n"], "top1": r["before"]} for r in rows]
for target in run["targets"]:
    target["per_class"] = [{"label": r["label"], "n": r["n"], "top1": r["after"]} for r in rows]
    target["trust"] = {**found, "robustness": None, "pictures": [], "panels": [], "gradcam": ""}
    target["candidates"] = [{**c, "name": f"{c['name']}-{i}"} for i in range(14) for c in target["candidates"]][:14]
(folder / "result.json").write_text(json.dumps(run))
write_report(folder / "result.json", folder / "report.html")
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
seen = {"seconds": time.monotonic() - begun, "candidates": sum(len(t["candidates"]) for t in run["targets"])}
print(json.dumps({**seen, "peak_bytes": int(peak.split()[1]) * 1024}))
"""


@pytest.mark.slow
def test_a_large_run_is_reported_soon_and_stays_small(tmp_path: Path) -> None:
    """1,000 classes, 42 candidates, 50,000 images with their logits: statistics and page in 20 s of one process, 1 GB and 3 MB."""
    import numpy as np

    random = np.random.default_rng(0)
    maps = [np.lib.format.open_memmap(tmp_path / name, "w+", np.float32, (50_000, 1000)) for name in ("before.npy", "after.npy")]
    for start in range(0, 50_000, 5000):
        some = random.normal(size=(5000, 1000)).astype(np.float32)
        some[np.arange(5000), np.arange(start, start + 5000) % 1000] += 4
        maps[0][start : start + 5000] = some
        maps[1][start : start + 5000] = some + 0.3 * random.normal(size=some.shape)
    del maps
    command = [sys.executable, "-c", LARGE, str(Path(__file__).parent), str(tmp_path)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = (tmp_path / "report.html").stat().st_size
    print(told, size)
    assert told["candidates"] >= 40
    assert told["peak_bytes"] < 1e9
    assert size < 3_000_000
    assert told["seconds"] < 20


@pytest.mark.parametrize("part", [{"targets": 5}, {"baseline": [1]}, {"data": 3}, {"targets": [{"trust": {"confidence": {"float": "x"}}}]}])
def test_what_is_no_whole_result_is_refused_in_one_line(part: dict[str, Any], tmp_path: Path) -> None:
    """A result that is in parts not one is no bug of the report."""
    (tmp_path / "result.json").write_text(json.dumps({**passing(), **part}))
    with pytest.raises(IntegrityError, match="not as edgecnn writes it"):
        write_report(tmp_path / "result.json", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_circumstances_have_units(tmp_path: Path) -> None:
    """Bytes, seconds, hertz and degrees are shown as such and not as they lie in the result; counts beside them stay counts."""
    result = passing()
    result["environment"]["machine"] = {
        "memory_bytes": 25276510208, "frequencies_hz": [2.4e9, 8e8], "cpu_s": {"busy": 2256.78, "cores": 2}, "temperatures_c": {"a": 51.2},
    }  # fmt: skip
    text = Page(written(result, tmp_path)).text
    for shown in ("25.3 GB", "2400 MHz, 800 MHz", "2257 s", "51 °C"):
        assert shown in text
    assert "2 s" not in text.partition("cores")[2][:12]
    assert "memory_bytes" not in text


def test_doubts_that_differ_in_figures_only_are_told_once(tmp_path: Path) -> None:
    """With the first one's figures, and how often they came up."""
    result = passing()
    result["targets"][0]["latency_s"]["doubts"] = [f"{n}.5% of the calls took long" for n in (3, 11, 40)] + ["something else"]
    told = Page(written(result, tmp_path)).text
    assert "3.5% of the calls took long (3 times, with other figures)" in told
    assert "11.5%" not in told
    assert "something else" in told


def test_a_promise_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    """A drop that is larger than the float model's top-1 has no line."""
    result = passing()
    for target in result["targets"]:
        target["promise"]["accuracy_drop"] = 1
    assert "promised: at least" not in written(result, tmp_path).partition('<section id="tradeoff">')[2]


@pytest.mark.parametrize("where", ["nowhere/report.html", "."])
def test_a_page_that_cannot_be_written_is_no_bug(where: str, tmp_path: Path) -> None:
    """A folder that is not there, or a folder in its place, is refused with what to do."""
    (tmp_path / "result.json").write_text(json.dumps(passing()))
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(tmp_path / "result.json", tmp_path / where)
