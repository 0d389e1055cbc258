"""distil: train on the images with a teacher beside the labels, which is how a pruned network gets its accuracy back.

The loss is `(1 - alpha) * cross-entropy + alpha * distance to the teacher`. Teacher and student see the same crops, mixup included; the
loop, the checkpoints and the settings are those of train. Teacher: `before-pruning`, the model as it was before the first prune stage, or
any model a recipe can name, with weights for the same classes and an input of the same size.
Losses: kl (Hinton et al. 2015, arXiv:1503.02531), dist (Huang et al. 2022, arXiv:2205.10536; for a teacher much stronger than its student).

`hints` adds where layers of the teacher look (attention transfer, Zagoruyko and Komodakis 2017, arXiv:1612.03928), and `unlabelled` a
folder of images that only the teacher says something about.

When: after prune, or to train a small network from a large one. Cost: that of train, and a forward pass of the teacher for every
batch. Limits: with several processes dist compares the images of one process's part of a batch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from edgecnn.data import ImageSet
from edgecnn.device.files import sha256_file
from edgecnn.device.preprocess import open_image
from edgecnn.device.spec import InputSpec
from edgecnn.errors import DataError, ModelError
from edgecnn.losses import dist_loss, hint_loss, kl_loss
from edgecnn.models import ModelConfig, load_model, model_digest
from edgecnn.stages.base import Context, TorchModel, Training
from edgecnn.train import UNLABELLED, Criterion, cross_entropy, fit

if TYPE_CHECKING:
    from torch import Tensor, nn

LOSSES = {"kl": kl_loss, "dist": dist_loss}


class Distil(Training):
    """Train with a teacher."""

    stage: Literal["distil"]
    teacher: Literal["before-pruning"] | ModelConfig = Field(
        "before-pruning", description="`before-pruning`, or a model as under `model:`, with weights for the same classes."
    )
    loss: Literal["kl", "dist"] = Field("kl", description="Distance to the teacher: kl of softened predictions, or dist, of correlations.")
    alpha: float = Field(0.9, gt=0, le=1, description="Weight of the teacher; the labels get the rest.")
    temperature: float = Field(4.0, gt=0, le=100, description="Softens both predictions before they are compared.")

    hints: dict[str, str] = Field({}, description="Layer of the student: layer of the teacher, whose maps of attention it learns too.")
    hint_weight: float = Field(1.0, gt=0, description="Weight of the hints beside the rest of the loss.")
    unlabelled: str | None = Field(None, min_length=1, description="A folder of images without classes, which the teacher labels.")

    @model_validator(mode="after")
    def _teacher_labels(self) -> Distil:
        if self.unlabelled and (self.mixup or self.cutmix):
            raise ValueError("unlabelled images have no label to mix: leave out mixup and cutmix, or unlabelled")
        return self

    def inputs(self) -> dict[str, Any]:
        with _said_of_the_teacher():
            teacher = {} if self.teacher == "before-pruning" else {"teacher": model_digest(self.teacher)}
        return {**teacher, "unlabelled": [sha256_file(path) for path in image_files(self.unlabelled)]} if self.unlabelled else teacher

    def check(self, load: Callable[[], TorchModel]) -> None:
        if self.unlabelled:
            image_files(self.unlabelled)
        if self.teacher == "before-pruning" and not self.hints:
            return
        import torch

        student = load()
        teacher = student if self.teacher == "before-pruning" else _loaded(self.teacher, student)
        with torch.no_grad(), _hinted(student.module, teacher.module, self.hints):
            for each in (student, teacher):
                each.module(torch.zeros(1, *each.input.shape))

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        teacher = self._teacher(model, ctx)
        if self.unlabelled:
            ctx = replace(ctx, data=replace(ctx.data, train=_with_unlabelled(ctx.data.train, image_files(self.unlabelled))))
        with _hinted(model.module, teacher.module, self.hints) as hint:
            fitted = fit(model, self.how(), ctx, self._criterion(teacher, model.input, hint))
        note = f"best epoch {fitted.epoch} of {self.epochs}: top-1 {fitted.top1:.2%} on the choice images"
        ctx.screen.say(f"  {note}")
        return replace(model, origin={**model.origin, "distilled": self.settings()}, notes=(note,))

    def _teacher(self, model: TorchModel, ctx: Context) -> TorchModel:
        if self.teacher == "before-pruning":
            if ctx.unpruned is None:
                raise ModelError("stages: distil: teacher: before-pruning: nothing was pruned before. Put it after a prune stage.")
            return ctx.unpruned()
        return _loaded(self.teacher, model)

    def _criterion(self, teacher: TorchModel, student: InputSpec, hint: Callable[[], Tensor | float] = lambda: 0.0) -> Criterion:
        """The whole loss, from images as the student takes them, its logits, and its target: labels N or shares N x classes."""
        import torch

        module: nn.Module = teacher.module.eval().requires_grad_(False)
        distance, labelled, placed = LOSSES[self.loss], cross_entropy(self.label_smoothing), False
        scale, shift = _renormalised(student, teacher.input)

        def loss(x: Tensor, logits: Tensor, target: Tensor) -> Tensor:
            nonlocal placed, scale, shift
            if not placed:
                module.to(x.device).to(memory_format=torch.channels_last)
                scale, shift, placed = scale.to(x.device), shift.to(x.device), True
            with torch.no_grad():
                wanted = module(x * scale + shift)
            told = self.alpha * distance(logits, wanted, self.temperature) + self.hint_weight * hint()
            return told if self.alpha == 1 else told + (1 - self.alpha) * labelled(x, logits, target)

        return loss


def _loaded(config: ModelConfig, student: TorchModel) -> TorchModel:
    """The model that a recipe names as teacher.

    Raises:
        ModelError: it cannot be loaded, or is no teacher for this student.
    """
    classes = len(student.labels)
    with _said_of_the_teacher():
        # As if it were to be trained: the advice for a head of other classes is not the same for a teacher.
        teacher = load_model(config, classes, dict(enumerate(student.labels)), trains=True)
    if "weights" in teacher.origin and teacher.origin["head"] == "new":
        raise ModelError(
            f"stages: distil: teacher: the weights of {config.title} are not for the {classes} classes of the data. "
            "Train it on these images first, in a recipe of its own, and give the weights it ends with as teacher.checkpoint."
        )
    if teacher.input.shape != student.input.shape:
        raise ModelError(
            f"stages: distil: teacher: its input is {' x '.join(map(str, teacher.input.shape))}, the student's "
            f"{' x '.join(map(str, student.input.shape))}; both see the same crops. Set teacher.input.size, or model.input.size."
        )
    return teacher


@contextmanager
def _said_of_the_teacher() -> Iterator[None]:
    """What is wrong with a model is said of `teacher`, not of `model`."""
    try:
        yield
    except ModelError as fault:
        said = str(fault)
        place = said.removeprefix("model") if said.startswith(("model:", "model.")) else f": {said}"
        raise ModelError(f"stages: distil: teacher{place}") from None


@contextmanager
def _hinted(student: nn.Module, teacher: nn.Module, hints: Mapping[str, str]) -> Iterator[Callable[[], Tensor | float]]:
    """A function that gives the hints' loss for the images that both networks have just seen.

    Raises:
        ModelError: a layer of that name is not there, or gives no maps.
    """
    seen: dict[tuple[bool, str], Tensor] = {}
    hooks = []
    for is_teacher, module, names in ((False, student, hints.keys()), (True, teacher, hints.values())):
        there = dict(module.named_modules())
        for name in names:
            if name not in there:
                near = ", ".join(get_close_matches(name, list(there), 3)) or ", ".join(key for key, _ in module.named_children())
                raise ModelError(
                    f"stages: distil: hints: the {'teacher' if is_teacher else 'student'} has no layer {name!r}; it has {near}."
                )

            def keep(
                layer: nn.Module, given: Any, output: Tensor, key: tuple[bool, str] = (is_teacher, name), root: nn.Module = module
            ) -> None:
                if output.ndim != 4:
                    raise ModelError(
                        f"stages: distil: hints: {key[1]} gives {output.ndim} dimensions, not maps. Choose a layer before pooling."
                    )
                if key[0] or root.training:  # not while it is judged
                    seen[key] = output

            hooks.append(there[name].register_forward_hook(keep))
    try:
        yield lambda: sum((hint_loss(seen[False, own].float(), seen[True, theirs].float()) for own, theirs in hints.items()), 0.0)
    finally:
        for hook in hooks:
            hook.remove()


def image_files(folder: str) -> list[Path]:
    """Every file below the folder, in order.

    Raises:
        DataError: there is none.
    """
    found = sorted(path for path in Path(folder).expanduser().rglob("*") if path.is_file() and not path.name.startswith("."))
    if not found:
        raise DataError(f"stages: distil: unlabelled: {folder}: no files in it. Give a folder of images, or leave the key out.")
    return found


def _with_unlabelled(train: ImageSet, files: list[Path]) -> ImageSet:
    """The labelled images and then the others, each checked to decode."""
    for path in files:
        open_image(path)
    known = len(train)
    return ImageSet(
        (*train.ids, *(f"unlabelled/{path}" for path in files)),
        np.concatenate([train.labels, np.full(len(files), UNLABELLED, np.int64)]),
        lambda i: train.read(i) if i < known else open_image(files[i - known]),
    )


def _renormalised(student: InputSpec, teacher: InputSpec) -> tuple[Tensor, Tensor]:
    """Factor and summand, 1 x C x 1 x 1, that turn the student's normalised images into the teacher's."""
    import torch

    mean, std = torch.tensor(student.mean), torch.tensor(student.std)
    other_mean, other_std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    return (std / other_std).view(1, -1, 1, 1), ((mean - other_mean) / other_std).view(1, -1, 1, 1)
