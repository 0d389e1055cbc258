"""The targets; this union is the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from edgecnn.targets.onnxruntime import Onnxruntime
from edgecnn.targets.openvino import Openvino
from edgecnn.targets.tensorrt import Tensorrt

AnyTarget = Annotated[Onnxruntime | Openvino | Tensorrt, Field(discriminator="runtime")]
