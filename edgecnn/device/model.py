"""A bundle in a program of your own:

from edgecnn.device.model import Model

with Model.open("bundles/pi") as model:
    for label, probability in model.predict("photo.jpg"):
        print(f"{probability:6.1%}  {label}")
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgecnn.device.bundle import verify_bundle
from edgecnn.device.evaluate import softmax
from edgecnn.device.preprocess import open_image, to_input, to_pixels
from edgecnn.device.runtimes import Runner, open_runner
from edgecnn.device.spec import Manifest
from edgecnn.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Model:
    """A verified bundle, loaded. Not for several threads at once; close it, or use it in a `with`."""

    manifest: Manifest
    runner: Runner
    _closed: bool = field(default=False, init=False)

    @staticmethod
    def open(bundle: str | os.PathLike[str], *, threads: int = 1, provider: str | None = None) -> Model:
        """Verify and load.

        Args:
            bundle: its folder.
            threads: of the runtime.
            provider: execution provider (onnxruntime) or device (OpenVINO); None is the CPU, or the GPU for TensorRT.

        Raises:
            IntegrityError: a file is not as it was made.
            DeviceError: the runtime or the provider is not there.
            UsageError: `threads` is not a whole number above 0.
        """
        _refuse_but_above_0(threads=threads)
        folder = Path(bundle)
        manifest = verify_bundle(folder)
        return Model(manifest, open_runner(folder, manifest, threads=threads, provider=provider))

    def predict(self, image: str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8], top: int = 5) -> list[tuple[str, float]]:
        """The `top` best classes as (label, probability), the best first.

        Args:
            image: a file, a Pillow image, or uint8 H x W x C (H x W where the model is grey) of any size, RGB as Pillow has it.
            top: at most that many.

        Raises:
            DataError: not an image.
            UsageError: the model is closed, or `top` is not a whole number above 0.
        """
        _refuse_but_above_0(top=top)
        probabilities = softmax(self.logits(image))
        best = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.manifest.labels[i], float(probabilities[i])) for i in best]

    def logits(self, image: str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The model's outputs for one image, one a class. Raises as `predict` does."""
        if self._closed:
            raise UsageError(f"{self.manifest.name}: this Model is closed. Open the bundle again with Model.open.")
        opened = _opened(image)
        try:
            pixels = to_pixels(opened, self.manifest.input)
        except DataError as fault:
            if isinstance(image, (str, os.PathLike)):
                raise DataError(f"{os.fspath(image)}: {fault}") from None
            raise
        outputs: npt.NDArray[np.float32] = self.runner.infer(to_input(pixels[None], self.manifest.input, self.runner.takes))[0].copy()
        return outputs

    def close(self) -> None:
        """Free what the runtime holds; the model cannot be used any more."""
        if not self._closed:
            self._closed = True
            self.runner.__exit__(None, None, None)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _opened(image: str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        return open_image(Path(image))
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise DataError(f"a {type(image).__name__} is not an image. Give a file's name, a Pillow image, or a uint8 array.")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)) or not image.size:
        raise DataError(f"an array {image.dtype} {image.shape} is not an image. Give uint8, height x width x 3 (RGB) or height x width.")
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def _refuse_but_above_0(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
            raise UsageError(f"{name}={number!r}: give a whole number above 0.")
