"""What every stage is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgecnn.batches import Augment
from edgecnn.config import Config
from edgecnn.torch_model import Context, TorchModel
from edgecnn.train import Fit, Precision

__all__ = ["Context", "Stage", "TorchModel", "Training"]


class Stage(Config):
    """A step on the torch model. Subclasses add `stage: Literal["name"]` and their settings."""

    stage: str
    compresses: ClassVar[bool] = False  # accuracy drops are counted from the model before the first stage that does
    trains: ClassVar[bool] = False  # learns from the training images
    prunes: ClassVar[bool] = False  # makes the network narrower
    quantizes: ClassVar[bool] = False  # trains for the targets' int8 forms; the model before it is offered to them too

    def inputs(self) -> dict[str, Any]:
        """What decides the result besides the settings, the model, the data and the seed, JSON-able: the content of files, the machine."""
        return {}

    def missing(self) -> str | None:
        """What it needs and is not there, as a sentence, or None."""
        return None

    def check(self, load: Callable[[], TorchModel]) -> None:
        """Refuse, before anything long, what cannot be done with the model that the recipe names, which `load` gives."""

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the changed model; `model` itself may be modified."""
        raise NotImplementedError


class Training(Stage):
    """A stage that learns from the training images, by `edgecnn.train.fit`."""

    trains: ClassVar[bool] = True

    epochs: int = Field(ge=1, le=100_000, description="Passes over the training images.")
    batch: int = Field(64, ge=2, description="Images a step, over all processes.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate; it falls along a cosine.")
    optimizer: Literal["adamw", "sgd", "nadamw", "lion", "rmsprop"] = Field("adamw", description="timm's optimizer of that name.")
    weight_decay: float = Field(0.02, ge=0, description="Decoupled weight decay.")
    warmup_epochs: float = Field(1, ge=0, description="Epochs over which the learning rate rises from a hundredth.")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an exponential moving average of the weights, such as 0.999; left out, none."
    )
    mixup: float = Field(0.0, ge=0, description="Alpha of mixup; 0 is off.")
    cutmix: float = Field(0.0, ge=0, description="Alpha of cutmix; 0 is off.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the labels' target spread over all classes.")
    augment: Augment = Field(
        "standard",
        description="none; light: small turns and shifts; shift: an eighth, and mirroring; standard: random crop and mirroring; "
        "strong: and TrivialAugment.",
    )
    precision: Precision = Field("auto", description="bf16 or fp32; auto: bf16 on GPUs that have it, fp32 elsewhere.")
    tensorboard: bool = Field(False, description="Write what TensorBoard reads to `tensorboard` in the run folder.")

    @model_validator(mode="after")
    def _mixes_pairs(self) -> Training:
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise ValueError(f"mixup and cutmix mix pairs: batch {self.batch} is odd, make it even")
        return self

    def how(self) -> Fit:
        """The settings of the training loop."""
        return Fit(**{name: getattr(self, name) for name in Fit.__dataclass_fields__})

    def settings(self) -> dict[str, Any]:
        """What decides the result, for the model's origin."""
        return self.model_dump(mode="json", exclude={"stage", "tensorboard"})
