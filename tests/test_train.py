"""Training is a function of the recipe and the seed: interrupted, resumed or loaded by many processes, the weights are the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from edgecnn import train
from edgecnn.data import Data, load_data, pack
from edgecnn.device.packed import open_packed
from edgecnn.device.preprocess import normalise
from edgecnn.errors import ModelError
from edgecnn.recipe import load_recipe
from edgecnn.screen import Screen
from edgecnn.stages.base import Context, TorchModel
from edgecnn.train import Fit, fit, predict, seed_all

HOW = Fit(
    epochs=4,
    batch=8,
    lr=0.01,
    optimizer="adamw",
    weight_decay=0.02,
    warmup_epochs=1,
    ema=None,
    mixup=0,
    cutmix=0,
    label_smoothing=0.1,
    augment="light",
)
VARIANTS = {
    "plain": HOW,
    "sgd": replace(HOW, optimizer="sgd", augment="standard"),
    "ema": replace(HOW, ema=0.9),
    "mixup": replace(HOW, mixup=0.2, cutmix=0.5, augment="strong"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    recipe = load_recipe(tiny.write_recipe(tmp_path_factory.mktemp("data")))
    return load_data(recipe.data, 0)


def fresh() -> TorchModel:
    seed_all(0)
    return TorchModel(tiny.network().eval(), tiny.SPEC, tiny.CLASSES)


def trained(how: Fit, data: Data, work: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    work.mkdir(exist_ok=True)
    model = fresh()
    fit(model, how, Context(data, seed, work, Screen(quiet=True)))
    assert not model.module.training
    return model.module.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_seed_decides(data: Data, tmp_path: Path) -> None:
    """The same seed gives the same weights, bit for bit, and another seed gives others."""
    torch.manual_seed(1)
    first = trained(HOW, data, tmp_path / "a")
    torch.manual_seed(2)
    assert same(first, trained(HOW, data, tmp_path / "b"))
    assert not same(first, trained(HOW, data, tmp_path / "c", seed=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_is_unbroken(data: Data, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of an epoch and run again, the weights are those of an unbroken run, bit for bit."""
    how = VARIANTS[variant]
    whole = trained(how, data, tmp_path / "whole")
    batches = train._batches

    def stop_in_the_third(images, how, spec, seed, epoch, steps):  # type: ignore[no-untyped-def]
        for step, batch in enumerate(batches(images, how, spec, seed, epoch, steps)):
            if epoch == 2 and step == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(train, "_batches", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        trained(how, data, tmp_path / "broken")
    monkeypatch.setattr(train, "_batches", batches)
    assert torch.load(tmp_path / "broken/checkpoint.pt", weights_only=True)["epoch"] == 1
    assert same(whole, trained(how, data, tmp_path / "broken"))


def test_it_learns_and_keeps_the_best(data: Data, tmp_path: Path) -> None:
    """The loss falls, the weights kept are those of the best epoch by the choice images, and it says which."""
    model = fresh()
    choice = pack(data.choice, tiny.SPEC, tmp_path / "choice")
    before = float((predict(copy.deepcopy(model.module), choice, tiny.SPEC).argmax(1) == choice.labels).mean())
    fitted = fit(model, replace(HOW, epochs=12, lr=0.02, augment="none"), Context(data, 0, tmp_path, Screen(quiet=True)))
    after = float((predict(model.module, choice, tiny.SPEC).argmax(1) == choice.labels).mean())
    assert after == fitted.top1 > before
    assert 1 <= fitted.epoch <= 12


def test_loss_that_is_not_finite(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite ends training with epoch and cure, and the last good checkpoint stays."""
    epoch_of = train._epoch

    def broken(*args):  # type: ignore[no-untyped-def]
        if args[4] == 2:
            with torch.no_grad():
                args[0].head.weight.fill_(float("nan"))
        return epoch_of(*args)

    monkeypatch.setattr(train, "_epoch", broken)
    with pytest.raises(ModelError, match=r"the loss is nan in epoch 3, step 1. Lower lr \(now 0.01\)"):
        trained(HOW, data, tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in kept["module"].values())


def test_weights_spoiled_by_the_last_step(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not finite are never kept, not even from the last epoch, whose losses all were."""
    epoch_of = train._epoch

    def spoiling(*args):  # type: ignore[no-untyped-def]
        loss = epoch_of(*args)
        with torch.no_grad():
            args[0].head.weight[0, 0] = float("inf") if args[4] == HOW.epochs - 1 else args[0].head.weight[0, 0]
        return loss

    monkeypatch.setattr(train, "_epoch", spoiling)
    with pytest.raises(ModelError, match="weights are not finite in epoch 4"):
        trained(HOW, data, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 2


def test_augmentation_does_not_depend_on_processes(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded in this process or in several, an epoch's batches are the same, byte by byte; another epoch's differ."""

    def epoch(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(train._batches(data.train, replace(HOW, augment="strong"), tiny.SPEC, 0, number, 3))

    here = epoch(0)
    monkeypatch.setattr(train, "MANY_IMAGES", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    elsewhere = epoch(0)
    assert len(here) == len(elsewhere) == 3
    for (a, la), (b, lb) in zip(here, elsewhere, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(la, lb)
    assert not np.array_equal(here[0][0], epoch(1)[0][0])


def test_every_image_once_an_epoch(data: Data) -> None:
    """An epoch takes no image twice and leaves out only the last, short batch."""
    how = replace(HOW, batch=5, augment="none")
    steps = len(data.train) // 5
    order = np.concatenate([labels for _, labels in train._batches(data.train, how, tiny.SPEC, 0, 0, steps)])
    pixels = np.concatenate([p for p, _ in train._batches(data.train, how, tiny.SPEC, 0, 0, steps)])
    assert len(order) == steps * 5 > 0
    assert len({p.tobytes() for p in pixels}) == len(pixels)


def test_evaluation_uses_the_boards_preprocessing(data: Data, tmp_path: Path) -> None:
    """predict feeds the network exactly what the board's half would: packed pixels through device.preprocess, bit for bit."""
    fed: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            fed.append(x.clone())
            return x.mean((2, 3))

    pack(data.evaluation, tiny.SPEC, tmp_path / "e")
    packed = open_packed(tmp_path / "e")
    logits = predict(Spy(), packed, tiny.SPEC, batch=7)
    assert logits.shape == (24, 3)
    assert np.array_equal(torch.cat(fed).numpy(), normalise(packed.images[:], tiny.SPEC))


def test_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails half way leaves the old checkpoint as it was."""
    path = tmp_path / "c.pt"
    train.save_checkpoint({"x": 1}, path)

    def fail(state: object, out) -> None:  # type: ignore[no-untyped-def]
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        train.save_checkpoint({"x": 2}, path)
    assert torch.load(path, weights_only=True) == {"x": 1}
