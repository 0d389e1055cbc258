"""A stage takes a torch model and returns a torch model. Its config *is* the stage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgecnn.config import Config
from edgecnn.device.spec import InputSpec
from edgecnn.screen import Screen

if TYPE_CHECKING:
    from torch import nn

    from edgecnn.data import Data


@dataclass(frozen=True)
class TorchModel:
    """A float model and everything needed to feed it, name its outputs and make it again.

    Attributes:
        module: in eval mode, on the CPU; takes float32 N x C x H x W, returns logits N x len(labels).
        input: its preprocessing.
        labels: one name an output.
        origin: zoo name and what was done to it, JSON-able: enough to rebuild the module, then load safetensors.
    """

    module: nn.Module
    input: InputSpec
    labels: tuple[str, ...]
    origin: dict[str, Any] = field(default_factory=dict)

    def with_module(self, module: nn.Module) -> TorchModel:
        return replace(self, module=module)


@dataclass(frozen=True)
class Context:
    """What a stage may use besides the model.

    Attributes:
        data: the recipe's images, split.
        seed: of everything random.
        work: a folder of this stage alone, kept between interrupted runs; checkpoints go here.
        screen: where progress is shown.
    """

    data: Data
    seed: int
    work: Path
    screen: Screen


class Stage(Config):
    """A step on the torch model. Subclasses add `stage: Literal["name"]` and their settings."""

    stage: str
    compresses: ClassVar[bool] = False  # accuracy drops are counted from the model before the first stage that does

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the changed model; `model` itself may be modified."""
        raise NotImplementedError
