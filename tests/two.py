"""Run by two processes at once, or by one: trains a network on the tiny images and writes its weights and its losses. See test_ranks.py."""

import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from edgecnn.data import load_data
from edgecnn.ranks import rank
from edgecnn.recipe import load_recipe
from edgecnn.screen import Screen
from edgecnn.stages.base import Context, TorchModel
from edgecnn.train import Fit, fit, seed_all


def network(kind: str) -> nn.Module:
    if kind == "tiny":
        return tiny.network()
    import timm

    module: nn.Module = timm.create_model("mobilenetv3_small_050", num_classes=len(tiny.CLASSES), drop_rate=0.0)
    return module


if __name__ == "__main__":
    recipe, kind, out = sys.argv[1:]
    torch.set_num_threads(1)
    data = load_data(load_recipe(Path(recipe)).data, 0)
    seed_all(0)
    module = network(kind)
    work = Path(out) / str(rank())
    work.mkdir(parents=True)
    # A deep network that was never trained amplifies rounding: at a rate of 0.05 a change of 1e-7 in its first layer grew to 0.06 within
    # 20 steps of one process alone. Only a low rate shows whether two processes do the same sums.
    size, rate = (tiny.SIZE, 0.05) if kind == "tiny" else (96, 0.0001)
    # 48 images and 12 a step: 20 steps are 5 epochs. Every step counts: the weights compared are those after the last.
    how = Fit(5, 12, rate, "sgd", 0.0005, 1, None, 0.2, 0.5, 0.1, "standard")
    spec = replace(tiny.SPEC, height=size, width=size, resize=size)
    model = TorchModel(module.eval(), spec, tiny.CLASSES)
    fit(model, how, Context(data, 0, work, Screen(quiet=True)))
    if rank() == 0:
        last = torch.load(work / "checkpoint.pt", weights_only=True)
        save_file({name: tensor.contiguous() for name, tensor in last["module"].items()}, Path(out) / "weights.safetensors")
