"""Grad-CAM (Selvaraju et al., ICCV 2017): where in an image the evidence for a class lies, in the float model and in the exported file.

The float model's map is ReLU(sum of a_k A_k), enlarged to the image, over the channels A_k of the last feature map with at least
`LEAST` rows and columns; a_k is the mean over all places of the gradient of the class's logit, by backpropagation.

A quantized file has no gradients: its outputs are steps. There the map is found by asking the file itself: each place of the feature map
is set to zero, all channels at once, and what the logit loses is what that place is worth; ReLU of that, enlarged alike. For a head of
average pooling and one linear layer this is exactly Grad-CAM, up to the file's rounding. For other heads it is a finite difference where
Grad-CAM is a gradient (that of HiResCAM, Draelos and Carin, arXiv:2011.08891): the same kind of map, not the same number. So what the
report compares is always made one way: `by_places` for the float model (`torch_halves`) and for the file (`halves.halves`), with the
float model's Grad-CAM proper beside them where it differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgecnn.errors import ModelError
from edgecnn.trust.halves import AT_ONCE, Halves

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAST = 4

Map = npt.NDArray[np.float32]


def grad_cam(module: nn.Module, x: Tensor, output: int) -> Map:
    """Grad-CAM of one image for one output, as large as the image, from 0 to 1.

    Args:
        module: in eval mode; left as it was.
        x: 1 x C x H x W as the model takes it.
        output: index of the class.
    """
    import torch

    with torch.enable_grad():
        # The image asks for a gradient, so that frozen weights do not matter.
        logits, features, _ = _seen(module, x.detach().clone().requires_grad_())
        (gradient,) = torch.autograd.grad(logits[0, output], features)
    weights = gradient[0].mean((1, 2)).numpy()
    return _map(np.tensordot(weights, features[0].detach().numpy(), 1), (x.shape[2], x.shape[3]))


def by_places(parts: Halves, x: np.ndarray, output: int, size: tuple[int, int]) -> Map:
    """What each place of the feature map is worth to one output.

    Args:
        parts: of the model, cut with `LEAST`.
        x: one image as the model takes it.
        output: index of the class.
        size: height and width of the image.
    """
    features = parts.front(x)
    rows, columns = features.shape[2:]
    places = rows * columns
    worth = np.empty(places, np.float32)
    logit = parts.tail(features)[0, output]
    for start in range(0, places, AT_ONCE):
        some = np.arange(start, min(start + AT_ONCE, places))
        without = np.repeat(features, len(some), axis=0)
        without[np.arange(len(some)), :, some // columns, some % columns] = 0
        worth[some] = logit - parts.tail(without)[:, output]
    return _map(worth.reshape(rows, columns), size)


def torch_halves(module: nn.Module) -> Halves:
    """A torch model cut like a file, by running it whole with its feature map replaced; for one image at a time, `front` first."""
    import torch

    last: list[Tensor] = []

    def front(x: np.ndarray) -> np.ndarray:
        last[:] = [torch.from_numpy(x)]
        with torch.no_grad():
            features: np.ndarray = _seen(module, last[0])[1].numpy().copy()
            return features

    def tail(maps: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            _, _, layer = _seen(module, last[0])
            hook = layer.register_forward_hook(lambda *_: torch.from_numpy(maps))
            try:
                logits: np.ndarray = module(last[0].expand(len(maps), -1, -1, -1)).numpy().copy()
                return logits
            finally:
                hook.remove()

    return Halves(front, tail)


def _seen(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, nn.Module]:
    """Logits, the last feature map with at least `LEAST` rows and columns, and the layer that gave it."""
    import torch

    maps: list[tuple[Tensor, nn.Module]] = []

    def keep(layer: nn.Module, _given: object, out: object) -> None:
        if isinstance(out, torch.Tensor) and out.ndim == 4 and min(out.shape[2:]) >= LEAST:
            maps.append((out, layer))

    hooks = [layer.register_forward_hook(keep) for layer in module.modules() if not any(layer.children())]
    try:
        logits = module(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise ModelError(f"no layer of {type(module).__name__} gives a feature map of at least {LEAST} x {LEAST}.")
    return logits, *maps[-1]


def inside(seen: Map, box: tuple[int, int, int, int]) -> float:
    """Share of the map's energy (its sum) inside `box`: top, left, bottom, right in pixels. NaN where the map is empty."""
    top, left, bottom, right = box
    whole = float(seen.sum())
    return float(seen[top:bottom, left:right].sum()) / whole if whole > 0 else float("nan")


def likeness(a: Map, b: Map) -> float:
    """Cosine of two maps: 1 the same, 0 nothing in common; NaN where one is empty."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norm if norm > 0 else float("nan")


def _map(worth: np.ndarray, size: tuple[int, int]) -> Map:
    from PIL import Image

    seen = np.maximum(worth, 0).astype(np.float32)
    peak = float(seen.max())
    if peak > 0:
        seen /= peak
    large = Image.fromarray(seen, "F").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(large, np.float32)
