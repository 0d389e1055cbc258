"""distil: train on the images with a teacher beside the labels, which is how a pruned network gets its accuracy back.

The loss is `(1 - alpha) * cross-entropy + alpha * distance to the teacher`. Teacher and student see the same crops, mixup included; the
loop, the checkpoints and the settings are those of train. Teacher: `before-pruning`, the model as it was before the first prune stage, or
any model a recipe can name, with weights for the same classes and an input of the same size.
Losses: kl (Hinton et al. 2015, arXiv:1503.02531), dist (Huang et al. 2022, arXiv:2205.10536; for a teacher much stronger than its student).

When: after prune, or to train a small network from a large one. Cost: that of train, and a forward pass of the teacher for every
batch. Limits: labelled images, logits only (no feature hints), one process, one device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgecnn.device.spec import InputSpec
from edgecnn.errors import ModelError
from edgecnn.losses import dist_loss, kl_loss
from edgecnn.models import ModelConfig, load_model, model_digest
from edgecnn.stages.base import Context, TorchModel, Training
from edgecnn.train import Criterion, cross_entropy, fit

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

    def inputs(self) -> dict[str, Any]:
        return {} if self.teacher == "before-pruning" else {"teacher": model_digest(self.teacher)}

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        teacher = self._teacher(model, ctx)
        fitted = fit(model, self.how(), ctx, self._criterion(teacher, model.input))
        note = f"best epoch {fitted.epoch} of {self.epochs}: top-1 {fitted.top1:.2%} on the choice images"
        ctx.screen.say(f"  {note}")
        return replace(model, origin={**model.origin, "distilled": self.settings()}, notes=(note,))

    def _teacher(self, model: TorchModel, ctx: Context) -> TorchModel:
        if self.teacher == "before-pruning":
            if ctx.unpruned is None:
                raise ModelError("stages: distil: teacher: before-pruning: nothing was pruned before. Put it after a prune stage.")
            return ctx.unpruned()
        teacher = load_model(self.teacher, len(model.labels), dict(enumerate(model.labels)), trains=False)
        if teacher.input.shape != model.input.shape:
            raise ModelError(
                f"stages: distil: teacher: its input is {' x '.join(map(str, teacher.input.shape))}, the student's "
                f"{' x '.join(map(str, model.input.shape))}; both see the same crops. Set teacher.input.size, or model.input.size."
            )
        return teacher

    def _criterion(self, teacher: TorchModel, student: InputSpec) -> Criterion:
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
            return (1 - self.alpha) * labelled(x, logits, target) + self.alpha * distance(logits, wanted, self.temperature)

        return loss


def _renormalised(student: InputSpec, teacher: InputSpec) -> tuple[Tensor, Tensor]:
    """Factor and summand, 1 x C x 1 x 1, that turn the student's normalised images into the teacher's."""
    import torch

    mean, std = torch.tensor(student.mean), torch.tensor(student.std)
    other_mean, other_std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    return (std / other_std).view(1, -1, 1, 1), ((mean - other_mean) / other_std).view(1, -1, 1, 1)
