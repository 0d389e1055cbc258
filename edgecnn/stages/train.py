"""train: from scratch or fine-tuning, supervised, on the recipe's training images.

When: the model has no weights yet, or its head is new. Costs: epochs x images forward and backward passes; the progress bar tells.
The best epoch by the choice images is kept. Optimizers, schedule, EMA and mixup are timm's. Limits: one process, one device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from edgecnn.stages.base import Context, Stage, TorchModel
from edgecnn.train import Augment, Fit, fit


class Train(Stage):
    """Train the model."""

    trains: ClassVar[bool] = True
    stage: Literal["train"]
    epochs: int = Field(ge=1, le=100_000, description="Passes over the training images.")
    batch: int = Field(64, ge=2, description="Images a step.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate; it falls along a cosine.")
    optimizer: Literal["adamw", "sgd", "nadamw", "lion", "rmsprop"] = Field("adamw", description="timm's optimizer of that name.")
    weight_decay: float = Field(0.02, ge=0, description="Decoupled weight decay.")
    warmup_epochs: float = Field(1, ge=0, description="Epochs over which the learning rate rises from a hundredth.")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an exponential moving average of the weights, such as 0.999; left out, none."
    )
    mixup: float = Field(0.0, ge=0, description="Alpha of mixup; 0 is off.")
    cutmix: float = Field(0.0, ge=0, description="Alpha of cutmix; 0 is off.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    augment: Augment = Field(
        "standard", description="none; light: small turns and shifts; standard: random crop and mirroring; strong: and TrivialAugment."
    )

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        settings = self.model_dump(exclude={"stage"})
        fitted = fit(model, Fit(**settings), ctx)
        ctx.screen.say(f"  best epoch {fitted.epoch} of {self.epochs}: top-1 {fitted.top1:.2%} on the choice images")
        return replace(model, origin={**model.origin, "trained": settings})
