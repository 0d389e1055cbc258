"""Channels that can only be removed together, which of them matter least, and their removal.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900) finds what hangs together: a residual stream, a depthwise
convolution and the layers around it, a squeeze-and-excite gate and what it scales. It does not understand every network, and
where it does not, it may remove the wrong channels without a word. So every cut is held against a law here: a network without some
channels computes what the whole one computes with those channels at zero.
And every layer must have as many left as it was to have.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgecnn.errors import ModelError
from edgecnn.screen import hushed

if TYPE_CHECKING:
    from torch import Tensor, nn

Importance = Literal["magnitude", "bn_scale", "taylor", "hessian", "random"]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Group:
    """Channels of one layer, and of all that must follow it.

    Attributes:
        root: the layer's name; the group is called by it.
        channels: its output channels.
        parts: the groups of a grouped convolution that the channels run through; each loses as many.
        order: indices within a part, 0 to channels / parts, least important first.
    """

    root: str
    channels: int
    parts: int
    order: tuple[int, ...]

    def removed(self, width: int) -> list[int]:
        """The channels that go when `width`, a multiple of `parts`, of them stay."""
        size = self.channels // self.parts
        gone = self.order[: size - width // self.parts]
        return sorted(part * size + i for part in range(self.parts) for i in gone)

    def nearest(self, wanted: float, round_to: int) -> int:
        """The width nearest to `wanted` that is a multiple of `round_to` (and of `parts`), at least one such and at most `channels`."""
        # A grouped convolution keeps whole numbers of channels in each part, and 8 in each is more than most have.
        step = self.parts if self.parts > 1 else round_to
        return min(self.channels, max(step, round(wanted / step) * step))


def groups_of(module: nn.Module, shape: Shape, head: Collection[str], importance: Importance, batches: Sequence[Any] = ()) -> list[Group]:
    """Everything that can be made narrower, in the order the dependency graph finds it.

    Args:
        module: in eval mode; not changed.
        shape: C, H, W of its input.
        head: names of tensors whose layers keep their outputs: the classifier.
        importance: how channels are ranked; random draws from torch's global generator.
        batches: (images N x C x H x W, labels N) tensors, for taylor and hessian.

    Raises:
        ModelError: the dependency graph cannot be drawn.
    """
    import torch
    import torch_pruning as tp

    module = copy.deepcopy(module)
    score: Any = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
        "random": tp.importance.RandomImportance,
    }[importance]()
    if importance == "taylor":
        for x, labels in batches:
            torch.nn.functional.cross_entropy(module(x), labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    if importance == "hessian":
        score._accu_grad, score._counter = _squared_gradients(module, batches)
    found = []
    with _library("draw its dependency graph"):
        graph = _graph(module, shape)
        names = {layer: name for name, layer in module.named_modules()}
        for group in graph.get_all_groups(ignored_layers=_layers(module, head), root_module_types=[torch.nn.Conv2d, torch.nn.Linear]):
            root = group[0].dep.target.module
            channels = graph.get_out_channels(root)
            parts = _parts(graph, group)
            scores = score(group)
            if scores is None or channels % parts:
                continue
            ranked = scores.view(parts, -1).mean(0).argsort().tolist()
            if len(ranked) * parts == channels:
                found.append(Group(names[root], channels, parts, tuple(ranked)))
    return found


def cut(module: nn.Module, shape: Shape, groups: Sequence[Group], widths: Mapping[str, int]) -> nn.Module:
    """A narrower copy of `module`.

    Args:
        module: in eval mode; not changed.
        shape: C, H, W of its input.
        groups: of this very module.
        widths: group name to the channels that stay; groups not named stay whole.

    Raises:
        ModelError: the library cannot cut it, or cuts the wrong channels; names the layer.
    """
    whole = _traced(module, shape)
    try:
        return _cut(module, shape, groups, widths, whole)
    except _WrongCut as fault:
        guilty = _guilty(module, shape, groups, widths, whole)
        raise ModelError(
            f"prune: torch-pruning cannot make this network narrower at {guilty[0] if guilty else 'all these layers together'} "
            f"({fault}). "
            + (f"Leave whole what it cannot cut, with keep: [{', '.join(guilty)}], or choose" if guilty else "Choose")
            + " another model."
        ) from None


def _squared_gradients(module: nn.Module, batches: Sequence[Any]) -> tuple[dict[Any, Tensor], dict[Any, int]]:
    """Each parameter's squared gradient, summed over the images: the diagonal of the loss's curvature; and their number.

    Counted here, because torch-pruning 1.6's own accumulate_grad keeps the last image's only.
    """
    import torch

    module.requires_grad_(True)
    squared = {parameter: torch.zeros_like(parameter) for parameter in module.parameters()}
    for x, labels in batches:
        for i in range(len(x)):
            module.zero_grad()
            torch.nn.functional.cross_entropy(module(x[i : i + 1]), labels[i : i + 1]).backward()  # type: ignore[no-untyped-call]
            for parameter, total in squared.items():
                if parameter.grad is not None:
                    total += parameter.grad.square()
    return squared, dict.fromkeys(squared, sum(len(labels) for _, labels in batches))


class _WrongCut(Exception):
    """The cut network does not run, or does not compute what it should."""


def _cut(module: nn.Module, shape: Shape, groups: Sequence[Group], widths: Mapping[str, int], x: Tensor) -> nn.Module:
    import torch

    narrow, masked = copy.deepcopy(module), copy.deepcopy(module)
    try:
        with hushed():
            graph, whole = _graph(narrow, shape), _graph(masked, shape)
            for group in groups:
                if group.root not in widths or widths[group.root] >= group.channels:
                    continue
                removed = group.removed(widths[group.root])
                # Indices behind a concatenation move when channels before them go: what to mask is read from the whole network.
                _mask(_coupled(whole, masked, group.root, removed))
                coupled = _coupled(graph, narrow, group.root, removed)
                if not graph.check_pruning_group(coupled):
                    raise _WrongCut(f"{group.root} would be left without channels")
                coupled.prune()
            with torch.no_grad():
                got, wanted = narrow(x), masked(x)
    except _WrongCut:
        raise
    except Exception as fault:  # the library fails in any way on a network that it does not understand
        raise _WrongCut(f"{type(fault).__name__}: {' '.join(str(fault).split())[:120]}") from None
    for group in groups:
        root, meant = narrow.get_submodule(group.root), widths.get(group.root, group.channels)
        left = getattr(root, "out_channels", None) or getattr(root, "out_features", None)
        if left != meant:
            raise _WrongCut(f"{group.root} has {left} channels left where {meant} were to stay")
    # Held against how the logits differ from image to image: a constant in them, such as the classifier's bias, is not computed.
    allowed = 1e-3 * float((wanted[0] - wanted[1]).abs().max()) + 1e-5 * float(wanted.abs().max())
    if not _mixes_channels(module) and float((got - wanted).abs().max()) > allowed:
        raise _WrongCut("what it computes then is not the whole network with those channels at zero")
    return narrow.eval()


def _guilty(module: nn.Module, shape: Shape, groups: Sequence[Group], widths: Mapping[str, int], x: Tensor) -> list[str]:
    """The groups that cannot be cut even alone."""
    found = []
    for group in groups:
        if widths.get(group.root, group.channels) < group.channels:
            try:
                _cut(module, shape, groups, {group.root: widths[group.root]}, x)
            except _WrongCut:
                found.append(group.root)
    return found


def _coupled(graph: Any, module: nn.Module, root: str, channels: list[int]) -> Any:
    """These channels of one layer and all that must go with them."""
    layer = module.get_submodule(root)
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, channels)


def _mask(coupled: Any) -> None:
    """Set to zero, in the whole network, what the cut removes as an output."""
    import torch

    with torch.no_grad():
        for dep, channels in coupled:
            if "out_channels" in dep.handler.__name__:
                for tensor in (getattr(dep.target.module, "weight", None), getattr(dep.target.module, "bias", None)):
                    if isinstance(tensor, torch.Tensor):
                        tensor[list(channels)] = 0


def _mixes_channels(module: nn.Module) -> bool:
    """Whether a normalisation takes its statistics over channels, so that channels at zero are not the same as no channels."""
    return any(
        "norm" in type(layer).__name__.lower() and "batchnorm" not in type(layer).__name__.lower() and list(layer.parameters(False))
        for layer in module.modules()
    ) or any(type(layer).__name__ == "GlobalResponseNorm" for layer in module.modules())


def _graph(module: nn.Module, shape: Shape) -> Any:
    import torch
    import torch_pruning as tp

    module.requires_grad_(True)
    with torch.enable_grad():
        return tp.DependencyGraph().build_dependency(module, example_inputs=torch.zeros(1, *shape))


def _layers(module: nn.Module, tensors: Collection[str]) -> list[nn.Module]:
    return [module.get_submodule(name) for name in sorted({tensor.rpartition(".")[0] for tensor in tensors})]


def _parts(graph: Any, group: Any) -> int:
    """The largest number of groups of the grouped convolutions that these channels run through; depthwise ones do not count."""
    import torch

    parts = 1
    for dep, _ in group:
        layer = dep.target.module
        if isinstance(layer, torch.nn.Conv2d) and layer.groups in (1, layer.out_channels):
            continue
        pruner = graph.get_pruner_of_module(layer)
        count = pruner.get_out_channel_groups if graph.is_out_channel_pruning_fn(dep.handler) else pruner.get_in_channel_groups
        parts = max(parts, count(layer))
    return parts


def _traced(module: nn.Module, shape: Shape) -> Tensor:
    """Two images of noise, the same every time."""
    import torch

    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def _library(what: str) -> Iterator[None]:
    try:
        with hushed():
            yield
    except Exception as fault:
        raise ModelError(
            f"prune: torch-pruning cannot {what} ({type(fault).__name__}: {' '.join(str(fault).split())[:160]}). Choose another model."
        ) from None
