"""A float model, and what may be used to change it. Below the stages, because loading and training need it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecnn.device.spec import InputSpec
from edgecnn.screen import Screen

if TYPE_CHECKING:
    from torch import nn

    from edgecnn.data import Data
    from edgecnn.targets.qdq import Form

Make = Callable[[Path], dict[str, Any]]
"""Makes something, with a folder for its files, and returns what it found, JSON-able."""


@dataclass(frozen=True)
class TorchModel:
    """A float model and everything needed to feed it, name its outputs and make it again.

    Attributes:
        module: in eval mode, on the CPU; takes float32 N x C x H x W, returns logits N x len(labels).
        input: its preprocessing.
        labels: one name an output.
        origin: zoo name and what was done to it, JSON-able: enough to rebuild the module, then load safetensors.
        notes: what the stage that made it has to say, a line each, for the report.
    """

    module: nn.Module
    input: InputSpec
    labels: tuple[str, ...]
    origin: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
        unpruned: loads the model as it was before the first stage that prunes; None where none has.
        forms: in which the recipe's int8 targets take a QDQ graph, and the runtime of each.
        logs: a folder for TensorBoard; None puts it into `work`.
        once: makes, for this model and these images, what other settings of the stage can use too, or finds it made; None has no shelf.
    """

    data: Data
    seed: int
    work: Path
    screen: Screen
    unpruned: Callable[[], TorchModel] | None = None
    logs: Path | None = None
    forms: Mapping[Form, str] = field(default_factory=dict)
    once: Callable[[str, dict[str, Any], Make], dict[str, Any]] | None = None

    def kept(self, kind: str, inputs: dict[str, Any], make: Make) -> dict[str, Any]:
        """What `make` returns, made once for these inputs where there is a shelf."""
        return make(self.work) if self.once is None else self.once(kind, inputs, make)
