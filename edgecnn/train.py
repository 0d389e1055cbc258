"""The one training loop, and evaluation of a torch model.

Everything random is seeded from (seed, epoch, step or image), never from what ran before. So the same seed gives the same weights on a CPU,
a run that was killed goes on as if it had not been, and the number of loading processes changes nothing.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgecnn.data import ImageSet, pack
from edgecnn.device.files import fsync_folder
from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise, to_mode, to_pixels
from edgecnn.device.spec import InputSpec
from edgecnn.errors import ModelError
from edgecnn.screen import Bar
from edgecnn.torch_model import Context, TorchModel

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

Augment = Literal["none", "light", "standard", "strong"]
Criterion = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""A loss from the images as the model takes them, its logits, and its target: labels N, or shares N x classes where images were mixed."""
# Decoding costs a process only where images are files; below this many an epoch is over before the processes are up.
MANY_IMAGES = 4096


@dataclass(frozen=True)
class Fit:
    """How to train. Rates are per image or per step as torch and timm define them."""

    epochs: int
    batch: int
    lr: float
    optimizer: str
    weight_decay: float
    warmup_epochs: float
    ema: float | None
    mixup: float
    cutmix: float
    label_smoothing: float
    augment: Augment


@dataclass(frozen=True)
class Fitted:
    """What training gave: the best weights are in the model; `top1` is theirs on the choice images."""

    epoch: int
    top1: float


def fit(model: TorchModel, how: Fit, ctx: Context, criterion: Criterion | None = None) -> Fitted:
    """Train `model.module` in place and leave it with the weights of its best epoch, in eval mode on the CPU.

    The best epoch is the one with the highest top-1 on the choice images, which are not trained on and not reported.
    A checkpoint of each epoch is kept in `ctx.work`; with one there, training goes on from it.

    Args:
        model: its module is trained.
        how: the settings.
        ctx: images, seed, folder and screen.
        criterion: another loss than cross-entropy with `how.label_smoothing`.

    Raises:
        ModelError: the loss is not finite; the last good checkpoint stays.
    """
    import torch
    from timm.optim import create_optimizer_v2
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.utils import ModelEmaV3

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = model.module.to(device).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(module, opt=how.optimizer, lr=how.lr, weight_decay=how.weight_decay)
    steps = max(1, len(ctx.data.train) // how.batch)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=how.epochs * steps,
        warmup_t=round(how.warmup_epochs * steps),
        warmup_lr_init=how.lr / 100,
        lr_min=how.lr / 1000,
        t_in_epochs=False,
    )
    ema = ModelEmaV3(module, decay=how.ema, use_warmup=True) if how.ema else None
    target_of = _targets(how, len(model.labels))
    criterion = criterion or cross_entropy(how.label_smoothing)
    checkpoint = ctx.work / "checkpoint.pt"
    best = Fitted(-1, -1.0)
    best_weights: dict[str, torch.Tensor] = {}
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        best, best_weights, start = Fitted(*state["best"]), state["best_weights"], state["epoch"] + 1
        ctx.screen.say(f"  goes on after epoch {start} of {how.epochs}")
    choice = pack(ctx.data.choice, model.input, ctx.work / "choice")
    with ctx.screen.bar("train", how.epochs * steps) as bar:
        for epoch in range(start, how.epochs):
            schedule.step_update(epoch * steps)
            loss = _epoch(module, how, ctx, model.input, epoch, steps, optimizer, schedule, ema, target_of, criterion, device, bar, best)
            # The last step of an epoch can spoil the weights, and no loss after it would tell.
            if not all(bool(torch.isfinite(weight).all()) for weight in module.state_dict().values()):
                raise _diverged("weights are not finite", epoch, steps, how)
            judged = ema.module if ema is not None else module
            top1 = float((predict(judged, choice, model.input).argmax(1) == choice.labels).mean())
            # A later epoch wins a tie: it has seen more.
            if top1 >= best.top1:
                best = Fitted(epoch + 1, top1)
                best_weights = {k: v.detach().cpu().clone() for k, v in judged.state_dict().items()}
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best": [best.epoch, best.top1],
                "best_weights": best_weights,
                "epoch": epoch,
            }
            save_checkpoint(state if ema is None else {**state, "ema": ema.state_dict()}, checkpoint)
            ctx.screen.note(f"epoch {epoch + 1}: loss {loss:.4f}, top-1 on the choice images {top1:.4f}")
    module.to("cpu").to(memory_format=torch.contiguous_format)
    module.load_state_dict(best_weights)
    module.eval()
    return best


def _epoch(
    module: nn.Module,
    how: Fit,
    ctx: Context,
    spec: InputSpec,
    epoch: int,
    steps: int,
    optimizer: Any,
    schedule: Any,
    ema: Any,
    target_of: Any,
    criterion: Criterion,
    device: torch.device,
    bar: Bar,
    best: Fitted,
) -> float:
    """Train one epoch; returns the mean loss.

    Raises:
        ModelError: a loss is not finite.
    """
    import torch

    module.train()
    total, begun = 0.0, time.monotonic()
    for step, (pixels, labels) in enumerate(_batches(ctx.data.train, how, spec, ctx.seed, epoch, steps)):
        seed_all(ctx.seed, epoch, step)
        x = torch.from_numpy(normalise(pixels, spec)).to(device, memory_format=torch.channels_last)
        x, target = target_of(x, torch.from_numpy(labels).to(device))
        loss = criterion(x, module(x), target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _diverged(f"the loss is {value}", epoch, step + 1, how)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done = epoch * steps + step + 1
        schedule.step_update(done)
        if ema is not None:
            ema.update(module, step=done)
        total += value
        rate = (step + 1) * how.batch / (time.monotonic() - begun)
        told = f"  top-1 {best.top1:.1%}" if best.epoch > 0 else ""
        bar(done, f"epoch {epoch + 1}/{how.epochs}  loss {total / (step + 1):.3f}{told}  {rate:.0f} images/s")
    return total / steps


def _diverged(what: str, epoch: int, step: int, how: Fit) -> ModelError:
    return ModelError(
        f"stages: train: {what} in epoch {epoch + 1}, step {step}. Lower lr (now {how.lr:g}) or lengthen warmup_epochs, "
        "then run again: the recipe has changed, so training starts over."
    )


def cross_entropy(label_smoothing: float) -> Criterion:
    """The loss of supervised training; mixup has smoothed its own targets already."""
    from torch.nn.functional import cross_entropy

    return lambda x, logits, target: cross_entropy(logits, target, label_smoothing=0.0 if target.ndim == 2 else label_smoothing)


def predict(module: nn.Module, images: Packed, spec: InputSpec, batch: int = 64) -> np.ndarray:
    """Logits N x classes, float32, of every image of the set, in its order; leaves `module` in eval mode."""
    import torch

    module.eval()
    device = next(module.parameters()).device
    with torch.inference_mode():
        parts = [
            module(torch.from_numpy(normalise(images.images[i : i + batch], spec)).to(device)).float().cpu().numpy()
            for i in range(0, len(images.labels), batch)
        ]
    return np.concatenate(parts)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """At any instant `path` is absent, old or new, never half."""
    import torch

    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def seed_all(*parts: int) -> None:
    """Seed torch and numpy from the numbers given."""
    import torch

    word = np.random.SeedSequence(parts).generate_state(1)[0]
    torch.manual_seed(int(word))
    np.random.seed(word)


def _targets(how: Fit, classes: int) -> Any:
    """A function from (images, labels) to (images, target): mixup and cutmix where asked for."""
    if not (how.mixup or how.cutmix):
        return lambda x, labels: (x, labels)
    from timm.data import Mixup

    return Mixup(mixup_alpha=how.mixup, cutmix_alpha=how.cutmix, label_smoothing=how.label_smoothing, num_classes=classes)


def _batches(images: ImageSet, how: Fit, spec: InputSpec, seed: int, epoch: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches of (uint8 N x H x W x C, labels N); the last, short one is left out, as batch norm wants it."""
    from torch.utils.data import DataLoader

    order = np.random.default_rng([seed, epoch]).permutation(len(images))[: steps * how.batch]
    workers = min(4, os.cpu_count() or 1) if len(order) >= MANY_IMAGES else 0
    loader: DataLoader[Any] = DataLoader(
        _Samples(images, order, augmenter(how.augment, spec), seed, epoch),  # type: ignore[arg-type]
        batch_size=how.batch,
        num_workers=workers,
        collate_fn=_stack,
    )
    yield from loader


def _stack(samples: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([pixels for pixels, _ in samples]), np.array([label for _, label in samples])


class _Samples:
    """The epoch's images in order, each augmented from a seed of its own."""

    def __init__(self, images: ImageSet, order: np.ndarray, augment: Any, seed: int, epoch: int) -> None:
        self._images, self._order, self._augment, self._seed, self._epoch = images, order, augment, seed, epoch

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        import torch

        i = int(self._order[position])
        torch.manual_seed(int(np.random.SeedSequence([self._seed, self._epoch, i]).generate_state(1)[0]))
        return self._augment(self._images.read(i)), int(self._images.labels[i])


def augmenter(augment: Augment, spec: InputSpec) -> Any:
    """A function from a PIL image to uint8 H x W x C, drawing from torch's generator.

    none: as in evaluation. light: small turns, shifts and zooms, no mirroring (digits, signs). standard: random crop and mirroring.
    strong: standard with TrivialAugment (Müller and Hutter 2021, arXiv:2103.10158).
    """
    from torchvision.transforms import InterpolationMode, v2

    mode = InterpolationMode(spec.interpolation)
    if augment in ("none", "light"):
        affine = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.85, 1.15), interpolation=InterpolationMode.BILINEAR)

        def small(image: Image.Image) -> np.ndarray:
            pixels = to_pixels(image, spec)
            return pixels if augment == "none" else _pixels(affine(_image(pixels)), spec)

        return small
    steps: list[Any] = [v2.RandomResizedCrop((spec.height, spec.width), scale=(0.35, 1.0), interpolation=mode), v2.RandomHorizontalFlip()]
    if augment == "strong":
        steps.append(v2.TrivialAugmentWide())
    transform = v2.Compose(steps)
    return lambda image: _pixels(transform(to_mode(image, spec.channels)), spec)


def _image(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _pixels(image: Image.Image, spec: InputSpec) -> np.ndarray:
    return np.asarray(image, np.uint8).reshape(spec.height, spec.width, spec.channels)
