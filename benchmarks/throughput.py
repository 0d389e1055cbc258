"""Images per second of the train stage's loop against the plain loop of PyTorch's examples: same network, images, batch and optimizer.

    python benchmarks/throughput.py FOLDER [--model NAME] [--size 64] [--batch 64] [--images 2048] [--epochs 3] [--rounds 3]

FOLDER is an image folder with train/ (or of class folders). Each figure is of a process of its own, the two loops in turns. "First" is the
first epoch, with opening files and, in edgecnn, decoding every image once where that fits into memory; "later" is the rate of the epochs
after it, the cost of loading included. The plain loop is an ImageFolder, a DataLoader with a process per core, AdamW, cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="mobilenetv3_small_100")
    for name, value in (("size", 64), ("batch", 64), ("images", 2048), ("epochs", 3), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        print(json.dumps(LOOPS[given.loop](given)))
        return
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in LOOPS}
    for _ in range(given.rounds):
        for name in LOOPS:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--loop", name], capture_output=True, text=True, check=True)
            rates[name].append(tuple(json.loads(done.stdout.splitlines()[-1])))
    print(f"{given.model}, {given.size} px, batch {given.batch}, {given.images} images, {os.cpu_count()} cores: images/s, median of rounds")
    for name, rows in rates.items():
        print(
            f"  {name:8} first {statistics.median(r[0] for r in rows):6.1f}   later {statistics.median(r[1] for r in rows):6.1f}   {rows}"
        )
    ratios = sorted(ours[1] / bare[1] for ours, bare in zip(rates["edgecnn"], rates["bare"], strict=True))
    print(f"  edgecnn / bare, later epochs, round by round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


def edgecnn_loop(given: argparse.Namespace) -> tuple[float, float]:
    """By `fit`; what it does beside training (judging a few choice images, a checkpoint) is in the time."""
    from edgecnn.data import load_data
    from edgecnn.models import TimmModel, load_model
    from edgecnn.screen import Screen
    from edgecnn.sources import ImageFolder
    from edgecnn.stages.base import Context
    from edgecnn.train import Fit, fit

    data = load_data(ImageFolder(source="imagefolder", path=str(given.folder)), 0, Screen(quiet=True))
    rows = np.random.default_rng(0).permutation(len(data.train))[: given.images]
    data = replace(data, train=data.train.subset(rows), choice=data.choice.subset(range(10)))
    model = load_model(TimmModel(source="timm", name=given.model, input={"size": given.size}), data.outputs, data.names, trains=True)
    how = Fit(given.epochs, given.batch, 1e-3, "adamw", 0.02, 0, None, 0.0, 0.0, 0.0, "standard")
    ends: list[float] = []

    class Told(Screen):
        def tell(self, kind: str, **facts: object) -> None:
            if "top1" in facts:
                ends.append(time.monotonic())

    with tempfile.TemporaryDirectory() as work:
        begun = time.monotonic()
        fit(model, how, Context(data, 0, Path(work), Told(quiet=True)))
    return rates_of(begun, ends, given)


def bare_loop(given: argparse.Namespace) -> tuple[float, float]:
    """As in PyTorch's ImageNet example, without what only logs."""
    import timm
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    train = given.folder / "train"
    crop = transforms.RandomResizedCrop(given.size, scale=(0.35, 1.0))
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    images = datasets.ImageFolder(str(train if train.is_dir() else given.folder), transforms.Compose(steps))
    rows = np.random.default_rng(0).permutation(len(images))[: given.images]
    loader = DataLoader(
        Subset(images, rows.tolist()), given.batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True, persistent_workers=True
    )
    model = timm.create_model(given.model, num_classes=len(images.classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    ends, begun = [], time.monotonic()
    for _ in range(given.epochs):
        model.train()
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        ends.append(time.monotonic())
    return rates_of(begun, ends, given)


def rates_of(begun: float, ends: list[float], given: argparse.Namespace) -> tuple[float, float]:
    """Images per second of the first epoch, and of the others together."""
    images = given.images // given.batch * given.batch
    return images / (ends[0] - begun), images * (len(ends) - 1) / (ends[-1] - ends[0])


LOOPS = {"edgecnn": edgecnn_loop, "bare": bare_loop}

if __name__ == "__main__":
    main()
