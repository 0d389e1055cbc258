"""Pruning by measured latency against cutting every layer by the same share, at equal measured latency, with three seeds.

    python benchmarks/prune_latency.py STEP NAME CHECKPOINT FOLDER OUT      # STEP, in this order: time, harm, choose, train

NAME is timm's, CHECKPOINT its weights at 64 px, FOLDER an image folder with train/ and val/. `time` and `choose` measure, so nothing else
should run; `harm` and `train` may share the machine. What a step found is in OUT, and no step repeats what is there.

A seed draws the 256 images by which harm is judged, and the order and crops of the fine-tuning, which is the same for both: an epoch of
3,000 images, by the labels. The table of times is measured once. Latencies: fp32 in onnxruntime, one thread, the two taking turns; the
uniform network nearest to 0.6 of the whole one's is found first, then, on each seed's path, the network whose latency is nearest to that.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecnn.data import Data, ImageSet, load_data, pack
from edgecnn.device.evaluate import accuracy
from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise
from edgecnn.latency_table import Row, _kl, _logits, plans, table
from edgecnn.models import TimmModel, load_model
from edgecnn.networks import head_names
from edgecnn.pace import Pace
from edgecnn.pruning import cut, groups_of
from edgecnn.screen import Screen
from edgecnn.sources import ImageFolder
from edgecnn.stages.base import Context, TorchModel
from edgecnn.train import Fit, fit, predict
from edgecnn.zoo import count_macs

AIM, SEEDS, HARM_IMAGES, TUNED_ON, ROUND_TO = 0.6, (0, 1, 2), 256, 3000, 8
CIFAR = {"size": 64, "fit": "squash", "interpolation": "bilinear", "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}
TUNING = Fit(1, 64, 1e-3, "adamw", 0.02, 0.1, None, 0.0, 0.0, 0.0, "standard")
Widths = dict[str, int]


class Case:
    """One network, and where its figures are kept."""

    def __init__(self, name: str, checkpoint: str, folder: str, out: str) -> None:
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.data: Data = load_data(ImageFolder(source="imagefolder", path=folder), 0, Screen(quiet=True))
        config = TimmModel(source="timm", name=name, checkpoint=checkpoint, input=CIFAR)
        self.model: TorchModel = load_model(config, self.data.outputs, self.data.names, trains=False)
        self.shape = self.model.input.shape
        self.groups = groups_of(self.model.module, self.shape, head_names(self.model.origin), "magnitude")

    def cut(self, widths: Widths) -> nn.Module:
        return cut(self.model.module, self.shape, self.groups, widths)

    def uniform(self, ratio: float) -> Widths:
        return {g.root: g.nearest(g.channels * (1 - ratio), ROUND_TO) for g in self.groups}

    def some(self, seed: int, count: int) -> ImageSet:
        return self.data.train.subset(np.random.default_rng(seed).permutation(len(self.data.train))[:count].tolist())

    def pixels(self, seed: int) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as work:
            packed = pack(self.some(seed, HARM_IMAGES), self.model.input, Path(work))
            return torch.from_numpy(normalise(np.asarray(packed.images), self.model.input))

    def pace(self, seconds: float) -> Pace:
        return Pace("onnxruntime", 1, self.model.input, seconds=seconds)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.out / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make(), indent=1))
        return json.loads(path.read_text())


def rows_of(case: Case) -> list[Row]:
    """The table of times, measured once; it has the harm of seed 0."""
    how = {"round_to": ROUND_TO, "kept_in": case.out / "table.json", "screen": Screen(quiet=True)}
    return table(case.model.module, case.groups, case.cut, case.pace(0.5), case.pixels(0), **how)


def harms(case: Case) -> list[list[dict[str, Any]]]:
    """The same rows for each seed, with the harm that its own images show."""
    images = [case.pixels(seed) for seed in SEEDS]
    before = [_logits(case.model.module, some) for some in images]
    found: list[list[dict[str, Any]]] = [[] for _ in SEEDS]
    for row in rows_of(case):
        narrow = case.cut({row.group: row.width})
        for rows, whole, some in zip(found, before, images, strict=True):
            rows.append(asdict(replace(row, harm=_kl(whole, _logits(narrow, some)))))
    return found


def choose(case: Case) -> dict[str, Any]:
    """Widths of the uniform network and of each seed's, and latencies: of the uniform one to the whole, of each seed's to the uniform."""
    pace, slow = case.pace(1.0), case.pace(4.0)
    paths = [plans([Row(**row) for row in rows]) for rows in case.kept("harm", lambda: harms(case))]
    with pace.against(case.model.module) as share_of, slow.against(case.model.module) as slowly:
        tried: dict[float, float] = {}
        low, high = 0.0, 0.9
        for _ in range(7):
            middle = (low + high) / 2
            tried[middle] = share_of(case.cut(case.uniform(middle)))
            low, high = (middle, high) if tried[middle] > AIM else (low, middle)
        ratio = min(tried, key=lambda one: abs(tried[one] - AIM))
        uniform = case.cut(case.uniform(ratio))
        share = slowly(uniform)
    found: dict[str, Any] = {"ratio": ratio, "share": share, "uniform": case.uniform(ratio), "aware": []}
    with pace.against(uniform) as share_of, slow.against(uniform) as slowly:
        for path in paths:
            at = functools.cache(lambda i, path=path: share_of(case.cut(path[i])))
            low, high = 0, len(path) - 1
            while low < high:  # the first that is no slower than the uniform one
                middle = (low + high) // 2
                low, high = (middle + 1, high) if at(middle) > 1 else (low, middle)
            i = min(range(max(0, low - 2), min(len(path), low + 3)), key=lambda i: abs(at(i) - 1))
            found["aware"].append({"widths": path[i], "to_uniform": slowly(case.cut(path[i]))})
            print(f"step {i + 1} of {len(path)}: {found['aware'][-1]['to_uniform']:.3f} of the uniform network's latency", flush=True)
    return found


def train(case: Case) -> list[dict[str, Any]]:
    """Top-1 of both, for each seed, before and after fine-tuning; a row at a time is kept."""
    chosen = case.kept("chosen", lambda: choose(case))
    packed = pack(case.data.evaluation, case.model.input, case.out / "evaluation")
    macs = count_macs(case.model.module, case.shape)
    print(f"whole: {top1(case, case.model.module, packed):.2%}; uniform {chosen['ratio']:.2f}: {chosen['share']:.3f} of its latency")
    print("| seed | how | MACs | latency to the uniform one | top-1, not trained | fine-tuned |\n|---|---|--:|--:|--:|--:|")
    found = []
    for seed in SEEDS:
        for how, widths, pace in (("uniform", chosen["uniform"], 1.0), ("by latency", *chosen["aware"][seed].values())):
            row = case.kept(f"{how}-{seed}", lambda widths=widths, seed=seed: tuned(case, widths, seed, packed))
            cells = (f"{row['macs'] / macs:.1%}", f"{pace:.3f}", f"{row['before']:.2%}", f"{row['after']:.2%}")
            print(f"| {seed} | {how} | {' | '.join(cells)} |", flush=True)
            found.append(row)
    return found


def tuned(case: Case, widths: Widths, seed: int, packed: Packed) -> dict[str, Any]:
    model = case.model.with_module(case.cut(widths))
    before = top1(case, model.module, packed)
    data = replace(case.data, train=case.some(seed, TUNED_ON), choice=case.data.choice.subset(range(100)))
    with tempfile.TemporaryDirectory() as work:
        fit(model, TUNING, Context(data, seed, Path(work), Screen(quiet=True)))
    return {"macs": count_macs(model.module, case.shape), "before": before, "after": top1(case, model.module, packed)}


def top1(case: Case, module: nn.Module, packed: Packed) -> float:
    return accuracy(predict(module, packed, case.model.input), packed.labels).top1


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Case(*sys.argv[2:])
    {
        "time": rows_of,
        "harm": lambda case: case.kept("harm", lambda: harms(case)),
        "choose": lambda case: case.kept("chosen", lambda: choose(case)),
        "train": train,
    }[sys.argv[1]](given)
