"""The one training loop, and evaluation of a torch model.

Everything random is seeded from (seed, epoch, step), never from what ran before: see `edgecnn.batches`. So the same seed gives the same
weights on a CPU, a run that was killed goes on as if it had not been, and the number of processes that load or train changes nothing
(but rounding, where several train; and a loss that compares the images of a batch with each other, as dist does, sees one process's part).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgecnn.batches import Augment, batches, kept_in_memory, loading_processes
from edgecnn.data import pack
from edgecnn.device.packed import Packed
from edgecnn.device.preprocess import normalise
from edgecnn.device.spec import InputSpec
from edgecnn.errors import ModelError, ResourceError
from edgecnn.ranks import apart, device, rank, ranks, shared, together, total
from edgecnn.resume import read_checkpoint, save_checkpoint
from edgecnn.torch_model import Context, TorchModel

if TYPE_CHECKING:
    import torch
    from torch import nn

Criterion = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""A loss from the images as the model takes them, its logits, and its target: labels N, or shares N x classes where images were mixed."""
UNLABELLED = -100  # the label of an image that only a teacher can say something about
Precision = Literal["auto", "fp32", "bf16"]
CPU_PIXELS = 8 * 224 * 224  # of a batch to predict


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
    precision: Precision = "auto"
    tensorboard: bool = False


@dataclass(frozen=True)
class Fitted:
    """What training gave: the best weights are in the model; `top1` is theirs on the choice images."""

    epoch: int
    top1: float
    images_per_s: float = 0.0


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
        ResourceError: no space for a checkpoint; the one before stays.
    """
    import torch
    from timm.optim import create_optimizer_v2
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.utils import ModelEmaV3

    place = device()
    _check_parts(how, len(ctx.data.train))
    module = model.module.to(place).to(memory_format=torch.channels_last)
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
    loop = _Loop(
        module,
        together(module),
        optimizer,
        schedule,
        ema,
        _targets(how, len(model.labels)),
        criterion or cross_entropy(how.label_smoothing),
    )
    checkpoint = ctx.work / "checkpoint.pt"
    best = Fitted(-1, -1.0)
    best_weights: dict[str, torch.Tensor] = {}
    start = 0
    if (state := shared(read_checkpoint(checkpoint) if rank() == 0 else None)) is not None:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        best, best_weights, start = Fitted(*state["best"]), state["weights"], state["epoch"] + 1
        ctx.screen.say(f"  goes on after epoch {start} of {how.epochs}")
    choice = pack(ctx.data.choice, model.input, ctx.work / "choice")
    kept = kept_in_memory(ctx.data.train, model.input.channels)
    feed = _Feed(
        kept or ctx.data.train, how, model.input, ctx.seed, loading_processes(ctx.data.train, kept is not None, place.type == "cpu")
    )
    try:
        with ctx.screen.bar("train", how.epochs * steps) as bar, _logged(how, ctx) as log:
            for epoch in range(start, how.epochs):
                schedule.step_update(epoch * steps)
                begun = time.monotonic()

                def told(step: int, loss: float, epoch: int = epoch, begun: float = begun, best: Fitted = best) -> None:
                    rate = step * how.batch / (time.monotonic() - begun)
                    so_far = f"  top-1 {best.top1:.1%}" if best.epoch > 0 else ""
                    bar(epoch * steps + step, f"epoch {epoch + 1}/{how.epochs}  loss {loss:.3f}{so_far}  {rate:.0f} images/s")
                    if (epoch * steps + step) % max(1, how.epochs * steps // 400) == 0:
                        ctx.screen.tell("curve", done=epoch * steps + step, total=how.epochs * steps, loss=loss)
                    if step % 10 == 0:
                        log({"loss": loss, "lr": optimizer.param_groups[0]["lr"], "images_per_s": rate}, epoch * steps + step)

                loss = _epoch(loop, feed, epoch, steps, told)
                rate = steps * how.batch / (time.monotonic() - begun)
                # The last step of an epoch can spoil the weights, and no loss after it would tell.
                if not all(bool(torch.isfinite(weight).all()) for weight in module.state_dict().values()):
                    raise FloatingPointError(f"weights are not finite in epoch {epoch + 1}, step {steps}")
                judged = ema.module if ema is not None else module
                top1 = _top1(judged, choice, model.input)
                # A later epoch wins a tie: it has seen more.
                if top1 >= best.top1:
                    best = Fitted(epoch + 1, top1, rate)
                    best_weights = {k: v.detach().cpu().clone() for k, v in judged.state_dict().items()}
                state = {
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "best": [best.epoch, best.top1, best.images_per_s],
                    "weights": best_weights,  # a name by which `model.checkpoint` finds them
                    "epoch": epoch,
                }
                if rank() == 0:
                    _keep(state if ema is None else {**state, "ema": ema.state_dict()}, checkpoint)
                log({"choice_top1": top1}, (epoch + 1) * steps)
                ctx.screen.tell("curve", done=(epoch + 1) * steps, total=how.epochs * steps, top1=top1)
                ctx.screen.note(f"epoch {epoch + 1}: loss {loss:.4f}, top-1 on the choice images {top1:.4f}, {rate:.0f} images/s")
    except FloatingPointError as fault:
        reusable = "pruned" not in model.origin and not ctx.forms  # else the file does not tell what network they belong to
        raise _diverged(str(fault), how, checkpoint, reusable) from None
    finally:
        apart(module)
        module.to("cpu").to(memory_format=torch.contiguous_format)
    module.load_state_dict(best_weights)
    module.eval()
    return best


@dataclass(frozen=True)
class _Loop:
    """What an epoch works with: the module itself, and `net`, which is what is called in training."""

    module: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: Any
    target_of: Any
    criterion: Criterion


@dataclass(frozen=True)
class _Feed:
    """Where an epoch's batches come from."""

    images: Any
    how: Fit
    spec: InputSpec
    seed: int
    workers: int

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        how = self.how
        return batches(
            self.images, self.spec, how.augment, how.batch,
            seed=self.seed, epoch=number, workers=self.workers, rank=rank(), ranks=ranks(),
        )  # fmt: skip


def _epoch(loop: _Loop, feed: _Feed, epoch: int, steps: int, told: Callable[[int, float], None]) -> float:
    """Train one epoch; returns the mean loss.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    import torch

    place = device()
    kind = torch.bfloat16 if _half(feed.how.precision, place) else None
    loop.module.train()
    whole = 0.0
    for step, (pixels, labels) in enumerate(feed.epoch(epoch)):
        seed_all(feed.seed, epoch, step)
        x = torch.from_numpy(normalise(pixels, feed.spec)).to(place, memory_format=torch.channels_last)
        x, target = loop.target_of(x, torch.from_numpy(labels).to(place))
        if rank():  # mixing was drawn alike in all processes; what is dropped out must differ
            torch.manual_seed(int(np.random.SeedSequence([feed.seed, epoch, step, rank()]).generate_state(1)[0]))
        with torch.autocast(place.type, kind, enabled=kind is not None):
            logits = loop.net(x)
        loss = loop.criterion(x, logits.float(), target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} in epoch {epoch + 1}, step {step + 1}")
        loop.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        loop.optimizer.step()
        done = epoch * steps + step + 1
        loop.schedule.step_update(done)
        if loop.ema is not None:
            loop.ema.update(loop.module, step=done)
        whole += value
        told(step + 1, whole / (step + 1))
    return whole / steps


def _half(precision: Precision, place: torch.device) -> bool:
    """Whether to compute in bfloat16. Not by itself on a CPU: there it halves the speed of depthwise convolutions."""
    import torch

    return precision == "bf16" or (precision == "auto" and place.type == "cuda" and torch.cuda.is_bf16_supported())


def _check_parts(how: Fit, images: int) -> None:
    if ranks() > 1 and (how.batch % (2 * ranks()) or images < how.batch):
        raise ModelError(
            f"stages: batch: {how.batch} of {images} images cannot be dealt evenly to {ranks()} processes. Use a multiple of {2 * ranks()}."
        )


def _keep(state: dict[str, Any], path: Path) -> None:
    try:
        save_checkpoint(state, path)
    except (OSError, RuntimeError) as fault:  # torch's writer turns a full disk into a RuntimeError
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        raise ResourceError(
            f"{path}: the checkpoint of epoch {state['epoch'] + 1} cannot be written ({str(fault).splitlines()[0]}; "
            f"{free >> 20} MiB free). The one before is whole: free some space, then run the same command again."
        ) from None


def _top1(module: nn.Module, images: Packed, spec: InputSpec) -> float:
    """Share of the images whose class is right; each process looks at its part."""
    mine = slice(rank(), None, ranks())
    right = int((predict(module, images, spec, rows=mine).argmax(1) == images.labels[mine]).sum())
    return total(right) / len(images)


@contextmanager
def _logged(how: Fit, ctx: Context) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Writes figures for TensorBoard where asked to, else nowhere."""
    if not how.tensorboard or rank():
        yield lambda figures, step: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModelError("stages: tensorboard: the package is not installed. pip install tensorboard, or leave the key out.") from None
    with SummaryWriter(str(ctx.logs or ctx.work / "tensorboard")) as writer:

        def log(figures: dict[str, float], step: int) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield log


def _diverged(what: str, how: Fit, checkpoint: Path, reusable: bool) -> ModelError:
    kept = f" The best weights before that are in {checkpoint}{', which model.checkpoint takes' if reusable else ''}."
    return ModelError(
        f"stages: train: {what}. Lower lr (now {how.lr:g}) or lengthen warmup_epochs, "
        f"then run again: the recipe has changed, so training starts over.{kept if checkpoint.exists() else ''}"
    )


def cross_entropy(label_smoothing: float) -> Criterion:
    """The loss of supervised training; mixup has smoothed its own targets already."""
    from torch.nn.functional import cross_entropy

    def loss(x: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.ndim == 2:
            return cross_entropy(logits, target)
        summed = cross_entropy(logits, target, label_smoothing=label_smoothing, ignore_index=UNLABELLED, reduction="sum")
        return summed / (target != UNLABELLED).sum().clamp_min(1)

    return loss


def predict(module: nn.Module, images: Packed, spec: InputSpec, batch: int = 64, rows: slice = slice(None)) -> np.ndarray:
    """Logits N x classes, float32, of every image of the set (or of those of `rows`), in its order; leaves `module` in eval mode.

    `batch` is the most images at once: a CPU gets as many pixels as its caches hold, channels last, three times as fast for MobileNetV2.
    """
    import torch

    module.eval()
    device = next(module.parameters()).device
    pixels = images.images[rows]
    if device.type == "cpu":
        batch = max(1, min(batch, CPU_PIXELS // (pixels.shape[1] * pixels.shape[2])))
    with torch.inference_mode():
        parts = []
        for i in range(0, len(pixels), batch):
            x = torch.from_numpy(normalise(pixels[i : i + batch], spec)).to(device)
            if device.type == "cpu":
                x = x.contiguous(memory_format=torch.channels_last)
            parts.append(module(x).float().cpu().numpy())
    return np.concatenate(parts)


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
