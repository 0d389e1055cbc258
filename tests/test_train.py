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
from edgecnn.batches import Augment, augmenter, batches, kept_in_memory
from edgecnn.checkpoint import load_weights
from edgecnn.data import Data, load_data, pack
from edgecnn.device.packed import open_packed
from edgecnn.device.preprocess import normalise
from edgecnn.errors import ModelError, ResourceError
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

    def stop_in_the_third(*args, **kwargs):  # type: ignore[no-untyped-def]
        for step, batch in enumerate(batches(*args, **kwargs)):
            if kwargs["epoch"] == 2 and step == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(train, "batches", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        trained(how, data, tmp_path / "broken")
    monkeypatch.setattr(train, "batches", batches)
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
        if args[2] == 2:
            with torch.no_grad():
                args[0].module.head.weight.fill_(float("nan"))
        return epoch_of(*args)

    monkeypatch.setattr(train, "_epoch", broken)
    with pytest.raises(
        ModelError, match=r"the loss is nan in epoch 3, step 1. Lower lr \(now 0.01\).* are in (/.*)checkpoint.pt, "
    ) as told:
        trained(HOW, data, tmp_path)
    assert str(tmp_path / "checkpoint.pt") in str(told.value)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in kept["module"].values())
    weights = load_weights(tmp_path / "checkpoint.pt")
    assert weights.keys() == kept["weights"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept["weights"].items())


def test_weights_spoiled_by_the_last_step(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not finite are never kept, not even from the last epoch, whose losses all were."""
    epoch_of = train._epoch

    def spoiling(*args):  # type: ignore[no-untyped-def]
        loss = epoch_of(*args)
        with torch.no_grad():
            args[0].module.head.weight[0, 0] *= float("inf") if args[2] == HOW.epochs - 1 else 1
        return loss

    monkeypatch.setattr(train, "_epoch", spoiling)
    with pytest.raises(ModelError, match="weights are not finite in epoch 4"):
        trained(HOW, data, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 2


def epoch_of(data: Data, augment: Augment, number: int = 0, batch: int = 8, **how: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(batches(data.train, tiny.SPEC, augment, batch, seed=0, epoch=number, **how))


@pytest.mark.parametrize("augment", ["light", "shift", "standard", "strong"])
def test_augmentation_does_not_depend_on_processes(data: Data, augment: Augment) -> None:
    """Loaded in this process or in several, from files or from memory, a batch is the same, byte by byte; another epoch's differs."""
    here, elsewhere = epoch_of(data, augment), epoch_of(data, augment, workers=2)
    kept = kept_in_memory(data.train, 3)
    assert kept is not None
    assert len(here) == len(elsewhere) == len(data.train) // 8 > 3
    for (a, la), (b, lb), (c, _) in zip(here, elsewhere, batches(kept, tiny.SPEC, augment, 8, seed=0, epoch=0), strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
        assert np.array_equal(la, lb)
    assert not np.array_equal(here[0][0], epoch_of(data, augment, 1)[0][0])


def test_training_processes_share_a_batch(data: Data) -> None:
    """Two processes get, between them, the images that one would, each with its mirror image's place in the batch, which mixup mixes."""
    whole, parts = epoch_of(data, "strong"), [epoch_of(data, "strong", rank=rank, ranks=2) for rank in (0, 1)]
    for (pixels, labels), *halves in zip(whole, *parts, strict=True):
        first, second = (half[0] for half in halves)
        assert np.array_equal(np.concatenate([first[:2], second, first[2:]]), pixels)
        assert np.array_equal(np.concatenate([halves[0][1][:2], halves[1][1], halves[0][1][2:]]), labels)


def test_images_too_many_for_memory_are_read_again(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images stay in memory up to a bound, and are not kept above it."""
    monkeypatch.setattr("edgecnn.batches.KEPT_BYTES", len(data.train) * 16 * 16 * 3 - 1)
    assert kept_in_memory(data.train, 3) is None
    monkeypatch.setattr("edgecnn.batches.KEPT_BYTES", len(data.train) * 16 * 16 * 3)
    assert kept_in_memory(data.train, 3) is not None


def test_every_image_once_an_epoch(data: Data) -> None:
    """An epoch takes no image twice and leaves out only the last, short batch."""
    steps = len(data.train) // 5
    labels = np.concatenate([labels for _, labels in epoch_of(data, "none", batch=5)])
    pixels = np.concatenate([p for p, _ in epoch_of(data, "none", batch=5)])
    assert len(labels) == steps * 5 > 0
    assert len({p.tobytes() for p in pixels}) == len(pixels)


def test_shift_moves_and_mirrors() -> None:
    """shift gives the image itself, moved by at most an eighth and mirrored half of the time, black where nothing is."""
    from PIL import Image

    pixels = np.arange(1, 257, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    augment = augmenter("shift", tiny.SPEC)
    torch.manual_seed(0)
    found = {
        (bool(p[8, 8, 0] > p[8, 9, 0]), int((p.max((1, 2)) == 0).sum())) for p in (augment(Image.fromarray(pixels)) for _ in range(200))
    }
    assert found == {(mirrored, rows) for mirrored in (False, True) for rows in (0, 1, 2)}


def test_bf16_is_not_float32(data: Data, tmp_path: Path) -> None:
    """precision: bf16 computes with 8 bits of mantissa and keeps float32 weights that differ a little from those of fp32."""
    whole, half = (trained(replace(HOW, epochs=1, precision=p), data, tmp_path / p) for p in ("fp32", "bf16"))
    assert not same(whole, half)
    for name, tensor in half.items():
        assert tensor.dtype == whole[name].dtype
        assert torch.allclose(tensor.float(), whole[name].float(), atol=0.1), name


def test_tensorboard_reads_the_log(data: Data, tmp_path: Path) -> None:
    """With tensorboard on, its own reader finds the loss, and the top-1 of each epoch; the weights are those without."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = trained(replace(HOW, epochs=2), data, tmp_path / "a")
    assert same(plain, trained(replace(HOW, epochs=2, tensorboard=True), data, tmp_path / "b"))
    read = EventAccumulator(str(tmp_path / "b" / "tensorboard")).Reload()
    assert [e.step for e in read.Scalars("choice_top1")] == [len(data.train) // 8, 2 * (len(data.train) // 8)]
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_no_space_for_a_checkpoint(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends training with the epoch, the file and the cure, and the checkpoint before stays."""
    save, saved = torch.save, []

    def full(state: object, out) -> None:  # type: ignore[no-untyped-def]
        if saved:
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
        saved.append(1)
        save(state, out)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ResourceError, match=r"checkpoint of epoch 2 cannot be written .* MiB free.*free some space"):
        trained(HOW, data, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 0


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
