"""train: from scratch or fine-tuned, supervised, on the recipe's training images.

When: the model has no weights yet, or its head is new. Costs: epochs x images forward and backward passes; the progress bar tells.
The best epoch by the choice images is kept. Optimizers, schedule, EMA and mixup are timm's. On several GPUs or machines: the same command
under `torchrun` or `accelerate launch`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from edgecnn.stages.base import Context, TorchModel, Training
from edgecnn.train import fit


class Train(Training):
    """Train the model."""

    stage: Literal["train"]

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        fitted = fit(model, self.how(), ctx)
        ctx.screen.say(f"  best epoch {fitted.epoch} of {self.epochs}: top-1 {fitted.top1:.2%} on the choice images")
        return replace(model, origin={**model.origin, "trained": self.settings()})
