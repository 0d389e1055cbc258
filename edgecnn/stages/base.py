"""What every stage is."""

from __future__ import annotations

from typing import Any, ClassVar

from edgecnn.config import Config
from edgecnn.torch_model import Context, TorchModel

__all__ = ["Context", "Stage", "TorchModel"]


class Stage(Config):
    """A step on the torch model. Subclasses add `stage: Literal["name"]` and their settings."""

    stage: str
    compresses: ClassVar[bool] = False  # accuracy drops are counted from the model before the first stage that does
    trains: ClassVar[bool] = False  # learns from the training images
    prunes: ClassVar[bool] = False  # makes the network narrower

    def inputs(self) -> dict[str, Any]:
        """What decides the result besides the settings, the model, the data and the seed, JSON-able: the content of files, the machine."""
        return {}

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the changed model; `model` itself may be modified."""
        raise NotImplementedError
