"""Which tensors of an exported graph are whose weights, batch norm folded in, and how trained ones get back into the torch module.

The exporter keeps the names of weights and folds a batch norm that follows a convolution into it. A trained, folded weight goes back into
the convolution and leaves its batch norm nothing to do, or, where the convolution has no bias, only that to add: so the module keeps its
architecture, and its names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = ("Conv", "Gemm")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, in the graph and in the module.

    Attributes:
        weight: initializer of the graph.
        bias: initializer, or None where the graph has none.
        owner: name of the module's layer.
        norm: name of the batch norm that is folded into it, or None.
    """

    weight: str
    bias: str | None
    owner: str
    norm: str | None


def layers_of(module: nn.Module, shape: tuple[int, int, int], graph: Path) -> list[Layer]:
    """The layers of the exported `graph` that can be trained; one whose weight the exporter computed from others is left out."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(graph)).graph
    values = {i.name: numpy_helper.to_array(i) for i in model.initializer}
    norms, modules = _norms(module, shape), dict(module.named_modules())
    found = []
    for node in model.node:
        if node.op_type not in LAYERS or node.input[1] not in values:
            continue
        weight, bias = node.input[1], node.input[2] if len(node.input) > 2 and node.input[2] else None
        owner, _, last = weight.rpartition(".")
        if last != "weight" or owner not in modules or (bias is not None and bias not in values):
            continue
        own = modules[owner].weight.detach().numpy()
        if own.shape != values[weight].shape:
            continue
        norm, added = norms.get(owner), modules[owner].bias
        same_bias = bias is None or (added is not None and np.allclose(added.detach().numpy(), values[bias], rtol=1e-4, atol=1e-7))
        if same_bias and np.allclose(own, values[weight], rtol=1e-4, atol=1e-7):
            found.append(Layer(weight, bias, owner, None))
        elif norm is not None and np.allclose(own * _gain(modules[norm], own.ndim), values[weight], rtol=1e-3, atol=1e-6):
            found.append(Layer(weight, bias, owner, norm))
    once = {layer.weight: layer for layer in found}
    return [layer for layer in once.values() if sum(layer.weight == other.weight for other in found) == 1]


def put_back(module: nn.Module, layers: Sequence[Layer], values: Mapping[str, Tensor]) -> None:
    """Give the module, in place, the weights and biases that `values` holds by the graph's names."""
    import torch

    modules = dict(module.named_modules())
    with torch.no_grad():
        for layer in layers:
            owner = modules[layer.owner]
            owner.weight.copy_(values[layer.weight])
            bias = values[layer.bias] if layer.bias else None
            if layer.norm is None:
                if bias is not None:
                    owner.bias.copy_(bias)
                continue
            norm = modules[layer.norm]
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1)
            norm.bias.zero_()
            # In the layer's own bias where it has one: the exporter names the folded bias after it.
            added = norm.bias if owner.bias is None else owner.bias
            added.copy_(bias if bias is not None else torch.zeros_like(added))


def _norms(module: nn.Module, shape: tuple[int, int, int]) -> dict[str, str]:
    """The batch norm, if any, that takes each layer's output and no other's, by name."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    names = {layer: name for name, layer in module.named_modules()}
    made: list[tuple[nn.Module, Tensor]] = []
    found: dict[str, str] = {}

    def after(layer: nn.Module, _: object, output: Tensor) -> None:
        made.append((layer, output))

    def before(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for layer, output in made:
            if output is inputs[0] and norm.affine:
                found[names[layer]] = names[norm]

    hooks = [layer.register_forward_hook(after) for layer in names if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    hooks += [norm.register_forward_pre_hook(before) for norm in names if isinstance(norm, _BatchNorm)]
    with torch.no_grad():
        module.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return found


def _gain(norm: Any, ndim: int) -> np.ndarray:
    """What the batch norm multiplies each channel by, shaped to multiply a weight."""
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
    shaped: np.ndarray = gain.reshape(-1, *[1] * (ndim - 1))
    return shaped
