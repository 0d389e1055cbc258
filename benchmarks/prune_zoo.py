"""Prunes every network of a list at two ratios, builds it again from its record, exports it and runs it: prints a table in Markdown.

    python benchmarks/prune_zoo.py [NAME ...] > prune_zoo.md

Random weights with batch norm set by two images, 224 x 224, magnitude, channels in multiples of 8. "MACs" are those left; the square of
the share of channels that stays would be 49 % and 25 %. "Rebuilt" is the zoo's network made narrow from the JSON record, with the
weights loaded: its logits must be equal bit for bit. "ORT" and "OpenVINO" are the largest difference from torch, as a share of the
largest logit; "TensorRT" is the size of the engine that tensorrt_rtx builds of the same file for compute capability 8.6; no GPU ran it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecnn.device.runtimes.ort import OrtRunner
from edgecnn.device.runtimes.ov import OpenvinoRunner
from edgecnn.device.spec import InputSpec
from edgecnn.device.tensorrt import build_engine, load_tensorrt
from edgecnn.errors import EdgecnnError
from edgecnn.narrow import changes
from edgecnn.networks import build, head_names, skeleton
from edgecnn.pruning import cut, groups_of
from edgecnn.stages.base import TorchModel
from edgecnn.targets.onnx import export_onnx
from edgecnn.zoo import count_macs

NAMES = """mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0
efficientnet_lite0 tf_efficientnetv2_b0 mnasnet_100 resnet18 resnet50 regnetx_002 ghostnet_100 densenet121 convnext_atto repvit_m0_9
vit_tiny_patch16_224 torchvision/shufflenet_v2_x1_0 torchvision/googlenet torchvision/vgg16_bn torchvision/squeezenet1_1""".split()  # noqa: SIM905
SPEC = InputSpec(3, 224, 224, 256, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)
LABELS = tuple(f"class {i}" for i in range(10))


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    print("| network | ratio | groups | MACs | rebuilt | ORT | OpenVINO | TensorRT |\n|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        source, _, short = name.rpartition("/")
        options = {"aux_logits": False, "init_weights": True} if short == "googlenet" else {}
        origin = {"source": source or "timm", "name": short, "in_chans": 3, "num_classes": len(LABELS), "options": options}
        for ratio in (0.3, 0.5):
            try:
                cells = row(origin, ratio)
            except EdgecnnError as fault:
                print(f"| {name} | refused | | | | | | {str(fault)[:160]} |", flush=True)
                break
            print(f"| {name} | {ratio} | {' | '.join(cells)} |", flush=True)


def lively(module: nn.Module) -> nn.Module:
    """Batch norm with the statistics of two images: with its first values, signals die out in deep networks, and any cut seems right."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
        layer.train()
    with torch.no_grad():
        module(torch.randn(2, *SPEC.shape))
    for layer in norms:
        layer.momentum = 0.1
    return module.eval()


def row(origin: dict[str, Any], ratio: float) -> list[str]:
    """The cells of one network at one ratio."""
    torch.manual_seed(0)
    module = lively(build(origin))
    groups = groups_of(module, SPEC.shape, head_names(origin), "magnitude")
    pruned = cut(module, SPEC.shape, groups, {g.root: g.nearest(g.channels * (1 - ratio), 8) for g in groups})
    left = count_macs(pruned, SPEC.shape) / count_macs(module, SPEC.shape)
    again = build({**origin, "pruned": json.loads(json.dumps({"layers": changes(pruned, skeleton(origin))}))})
    again.load_state_dict(pruned.state_dict())
    x = torch.randn(1, *SPEC.shape)
    with torch.inference_mode():
        wanted = pruned(x).numpy()
        equal = np.array_equal(again.eval()(x).numpy(), wanted)
    apart = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(TorchModel(again, SPEC, LABELS, origin), path)
        engine = build_engine(load_tensorrt(), path, compute_capability="86")
        with OrtRunner(path, threads=1, provider=None, batch=1) as runner:
            apart.append(np.abs(runner.infer(x.numpy()) - wanted).max() / np.abs(wanted).max())
        with OpenvinoRunner(path, threads=1, device=None, batch=1, options={"INFERENCE_PRECISION_HINT": "f32"}) as runner:
            apart.append(np.abs(runner.infer(x.numpy()) - wanted).max() / np.abs(wanted).max())
    return [
        str(len(groups)),
        f"{left:.1%}",
        "equal" if equal else "DIFFERS",
        *(f"{value:.0e}" for value in apart),
        f"{len(engine) / 1e6:.1f} MB",
    ]


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)
