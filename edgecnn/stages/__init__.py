"""The stages; this union is the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from edgecnn.stages.distil import Distil
from edgecnn.stages.prune import Prune
from edgecnn.stages.qat import Qat
from edgecnn.stages.train import Train

AnyStage = Annotated[Train | Distil | Prune | Qat, Field(discriminator="stage")]
