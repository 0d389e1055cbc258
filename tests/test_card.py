"""The model card and the bill of materials are read by the tools they are for, and say what the manifest says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_bundle import PLAIN

from edgecnn.board_readme import board_readme
from edgecnn.bom import BOM, ml_bom
from edgecnn.card import CARD, model_card
from edgecnn.device.bundle import verify_bundle
from edgecnn.device.spec import Manifest

LATENCY = {"p50": 0.0012, "p90": 0.0013, "p99": None, "n": 500}
EVIDENCE: dict[str, Any] = {
    "top1": 0.9123,
    "top1_drop": 0.004,
    "drop_interval": [-0.002, 0.011],
    "interval": [0.88, 0.935],
    "agreement": 0.98,
    "n": 400,
    "latency_s": LATENCY,
    "where": "this machine (Some CPU)",
    "accuracy_where": "this machine (Some CPU), onnxruntime 1",
    "notes": ["slower than float: 1.2 against 1.0 ms"],
    "made_from": {
        "model": "timm mobilenetv2_035",
        "stages": ["train", "prune"],
        "data": "flowers",
        "data_sha256": "a" * 64,
        "calibration_n": 300,
        "calibration_sha256": "b" * 64,
    },
}
FULL = replace(
    PLAIN,
    digests={"model.xml": "c" * 64, "model.bin": "d" * 64},
    evidence=EVIDENCE,
    versions={"edgecnn": "1.0", "torch": "2.15.0+cu132"},
    recipe="story",
    recipe_sha256="e" * 64,
    made="2026-11-23T22:10:00Z",
)
VARIANTS: list[Manifest] = [
    FULL,
    replace(FULL, made=""),
    replace(FULL, runtime="tensorrt", evidence={**EVIDENCE, "latency_s": None, "notes": []}),
    replace(FULL, runtime="onnxruntime", takes="uint8", precision="fp32"),
    replace(FULL, name="a.b-c_d", evidence={**EVIDENCE, "made_from": {**EVIDENCE["made_from"], "data": "Blumen: äöü # 'x' --- \"y\""}}),
]


def parsed(text: str) -> Any:
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard(text, ignore_metadata_errors=False)


def faults(text: str) -> Any:
    """What CycloneDX's own validator says, None if nothing."""
    pytest.importorskip("cyclonedx", reason="needs cyclonedx-python-lib[json-validation], which brings the schema")
    pytest.importorskip("jsonschema")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


@pytest.mark.parametrize("manifest", VARIANTS)
def test_the_hub_reads_the_card(manifest: Manifest) -> None:
    """huggingface_hub parses the header, finds one result with our accuracy, and writes it back without a loss."""
    data = parsed(model_card(manifest)).data
    assert data.pipeline_tag == "image-classification"
    assert data.tags == ["edgecnn", "image-classification", manifest.runtime, manifest.precision]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", EVIDENCE["top1"])
    assert result.dataset_name == manifest.evidence["made_from"]["data"]
    assert data.model_name == manifest.name
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


@pytest.mark.parametrize("manifest", VARIANTS)
def test_the_bill_of_materials_fits_the_schema(manifest: Manifest) -> None:
    """CycloneDX 1.6's own strict schema accepts it."""
    assert faults(ml_bom(manifest)) is None


def test_the_validator_would_say() -> None:
    """A wrong kind of component, an unknown key and a wrong serial number are each found by that validator: its silence means something."""
    good = json.loads(ml_bom(FULL))
    for change in ({"serialNumber": "1"}, {"unknown": 1}, {"components": [{"type": "model", "name": "x"}]}):
        assert faults(json.dumps({**good, **change})) is not None, change


def test_the_bill_names_every_file_and_version_once() -> None:
    """Each file's digest and each version is there; references are unique and lead to something; the figures are the manifest's."""
    bom = json.loads(ml_bom(FULL))
    by = {c["bom-ref"]: c for c in bom["components"]}
    assert len(by) == len(bom["components"])
    assert {c["name"]: c["hashes"][0]["content"] for c in bom["components"] if c["type"] == "file"} == FULL.digests
    assert {c["name"]: c["version"] for c in bom["components"] if c["type"] == "library"} == FULL.versions
    (depends,) = bom["dependencies"]
    assert set(depends["dependsOn"]) == set(by)
    metrics = {m["type"]: m["value"] for m in bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["top-1 accuracy"] == "0.9123"
    assert metrics["p90 latency in seconds"] == "0.0013"
    assert "p99 latency in seconds" not in metrics, "too few samples to say"


def test_the_same_facts_make_the_same_text() -> None:
    """Written twice they are equal; with another digest they differ, serial number and all."""
    assert (model_card(FULL), ml_bom(FULL)) == (model_card(FULL), ml_bom(FULL))
    other = replace(FULL, digests={"model.xml": "c" * 64, "model.bin": "f" * 64})
    assert json.loads(ml_bom(other))["serialNumber"] != json.loads(ml_bom(FULL))["serialNumber"]
    assert model_card(other) != model_card(FULL)


def test_every_bundle_has_both(finished: Path) -> None:
    """In each bundle of a real run both are there, covered by the sums, valid, and name the files' true digests; no path leaks."""
    seen = 0
    for folder in sorted((finished / "bundles").iterdir()):
        manifest = verify_bundle(folder)
        card, bom = (folder / CARD).read_text(encoding="utf-8"), (folder / BOM).read_text(encoding="utf-8")
        assert {CARD, BOM} <= {line[66:] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        assert parsed(card).data.eval_results[0].metric_value == manifest.evidence["top1"]
        assert faults(bom) is None
        assert all(digest in card and digest in bom for digest in manifest.digests.values())
        assert str(finished.parent) not in card + bom
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest.made)
        assert json.loads(bom)["metadata"]["timestamp"] == manifest.made
        seen += 1
    assert seen == 3


def test_void_latency_is_no_figure() -> None:
    """In the card, the bill of materials and the bundle's README the word stands with its reason where the p50 would."""
    void = replace(FULL, evidence={**EVIDENCE, "latency_s": {**LATENCY, "void": "something ran"}})
    for text in (model_card, board_readme):
        assert "1.2 ms," in text(FULL)
        assert "1.2 ms," not in text(void)
        assert "void (something ran)" in text(void)
    assert "p50" in ml_bom(FULL)
    assert "p50" not in ml_bom(void)
