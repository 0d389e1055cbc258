"""The bundle's bill of materials: CycloneDX 1.6 JSON of the model, its data and the software that made it. Only what the manifest says.

Written by hand: cyclonedx-python-lib does not know model cards. The test validates it against the schema that library ships.
Source: cyclonedx.org/docs/1.6/json, sections components and modelCard.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from edgecnn.board_readme import taken
from edgecnn.device.spec import Manifest

BOM = "bom.cdx.json"

_NAMESPACE = uuid.UUID("5b0c9d0e-5f43-4f0b-9a37-3c6f0d0a8b11")  # ours: the same files always have the same serial number


def ml_bom(manifest: Manifest) -> str:
    """JSON of the bundle's bill of materials.

    Args:
        manifest: complete: digests, evidence, recipe.
    """
    origin = manifest.evidence["made_from"]
    files = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        for name, digest in manifest.digests.items()
    ]
    data = {
        "type": "data",
        "bom-ref": "data",
        "name": origin["data"],
        "hashes": [{"alg": "SHA-256", "content": origin["data_sha256"]}],
        "data": [{"type": "dataset", "name": origin["data"]}],
    }
    software = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}".replace("+", "%2B"),
        }
        for name, version in manifest.versions.items()
    ]
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, manifest.to_json())}",
        "version": 1,
        "metadata": {
            **({"timestamp": manifest.made} if manifest.made else {}),
            "tools": {"components": [{"type": "application", "name": "edgecnn", "version": manifest.versions["edgecnn"]}]},
            "component": _model(manifest),
        },
        "components": [*files, data, *software],
        "dependencies": [{"ref": "model", "dependsOn": [*(f["bom-ref"] for f in files), "data", *(s["bom-ref"] for s in software)]}],
    }
    return json.dumps(bom, indent=1, ensure_ascii=False) + "\n"


def _model(manifest: Manifest) -> dict[str, Any]:
    e = manifest.evidence
    origin, latency = e["made_from"], e["latency_s"]
    metrics: list[dict[str, Any]] = [
        {"type": "top-1 accuracy", "value": repr(e["top1"]), "slice": e["accuracy_where"], "confidenceInterval": _interval(e["interval"])},
        {"type": "top-1 drop against the float model", "value": repr(e["top1_drop"]), "confidenceInterval": _interval(e["drop_interval"])},
        {"type": "same class as the float model", "value": repr(e["agreement"])},
    ]
    if latency and not latency.get("void"):
        metrics += [
            {"type": f"{name} latency in seconds", "value": repr(latency[name]), "slice": e["where"]}
            for name in ("p50", "p90", "p99")
            if latency[name] is not None
        ]
    properties = {
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "candidate": manifest.candidate,
        "recipe": manifest.recipe,
        "recipe_sha256": manifest.recipe_sha256,
        "calibration_sha256": origin["calibration_sha256"],
        "stages": " -> ".join(["load", *origin["stages"]]),
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "version": manifest.model_sha256[:12],
        "hashes": [{"alg": "SHA-256", "content": manifest.model_sha256}],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "image classification",
                "architectureFamily": "convolutional neural network",
                "modelArchitecture": origin["model"],
                "datasets": [{"ref": "data"}],
                "inputs": [{"format": taken(manifest)}],
                "outputs": [{"format": f"float32 logits of {len(manifest.labels)} classes"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": metrics},
            "considerations": {
                "useCases": [f"image classification of {len(manifest.labels)} classes on a board with {manifest.runtime}"],
                "technicalLimitations": [
                    "Measured on the data and the machine named here, and on no others; it names one of its classes for any image."
                ],
                **({"performanceTradeoffs": e["notes"]} if e["notes"] else {}),
            },
        },
        "properties": [{"name": f"edgecnn:{name}", "value": value} for name, value in properties.items()],
    }


def _interval(bounds: list[float]) -> dict[str, str]:
    low, high = bounds
    return {"lowerBound": repr(low), "upperBound": repr(high)}
