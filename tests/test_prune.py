"""Pruning removes what it says, computes what it should, and can be built again from numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Tiny, trained, write_recipe
from torch import nn

from edgecnn.data import load_data
from edgecnn.errors import ModelError, UsageError
from edgecnn.floats import Run, float_models
from edgecnn.latency_table import NOISE, Row, plans, widths_for
from edgecnn.models import PythonModel, load_model
from edgecnn.narrow import METADATA, changes, narrow
from edgecnn.networks import build, head_names, skeleton
from edgecnn.pace import Pace
from edgecnn.pipeline import compress
from edgecnn.pruning import Group, _squared_gradients, cut, groups_of
from edgecnn.recipe import load_recipe
from edgecnn.screen import Screen
from edgecnn.stages.base import Context, TorchModel
from edgecnn.stages.prune import Prune
from edgecnn.store import Store
from edgecnn.zoo import count_macs

QUICK = ["mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small", "regnetx_002", "convnext_atto", "tv squeezenet1_1"]
SLOW = [
    "mobilenetv1_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "mnasnet_100",
    "resnet18",
    "resnet50",
    "densenet121",
    "repvit_m0_9",
    "tv googlenet",
    "tv vgg16_bn",
]
SHAPE = (3, 64, 64)


def origin_of(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if "googlenet" in name else {}
    if "vit" in name:
        options["img_size"] = [64, 64]
    source = "torchvision" if name.startswith("tv ") else "timm"
    return {"source": source, "name": name.removeprefix("tv "), "in_chans": 3, "num_classes": 10, "options": options}


def lively(module: nn.Module) -> nn.Module:
    """Batch norm as after training: at its first values many networks compute next to nothing of their blocks."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor, 0, 0.2)
    return module


def forward(module: nn.Module, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits: torch.Tensor = module.eval()(x)
    return logits


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_zoo_networks_prune_and_are_built_again(name: str) -> None:
    """At ratio 0.3 and 0.5 the MACs left are near the square of what stays, and zoo + numbers + weights give the same logits."""
    torch.manual_seed(0)
    origin = origin_of(name)
    module = lively(build(origin))
    groups = groups_of(module, SHAPE, head_names(origin), "magnitude")
    assert len(groups) > 8
    for ratio in (0.3, 0.5):
        widths = {g.root: g.nearest(g.channels * (1 - ratio), 8) for g in groups}
        pruned = cut(module, SHAPE, groups, widths)
        left = count_macs(pruned, SHAPE) / count_macs(module, SHAPE)
        assert (1 - ratio) ** 2 - 0.04 < left < (1 - ratio) ** 2 + 0.12
        layers = json.loads(json.dumps(changes(pruned, skeleton(origin))))
        again = build({**origin, "pruned": {"layers": layers}})
        again.load_state_dict(pruned.state_dict())
        assert torch.equal(forward(again), forward(pruned))
        for group in groups:
            layer = pruned.get_submodule(group.root)
            assert getattr(layer, "out_channels", getattr(layer, "out_features", None)) == widths[group.root]


def test_pruning_channels_that_do_nothing_changes_nothing() -> None:
    """Where the least important channels are at zero, the pruned network computes what the whole one does."""
    torch.manual_seed(0)
    origin = origin_of("mobilenetv2_100")
    module = lively(build(origin))
    block = module.get_submodule("blocks.2.1")
    dead = torch.randperm(192)[:96].tolist()
    with torch.no_grad():
        for name in ("conv_pw", "bn1", "conv_dw", "bn2"):
            for tensor in block.get_submodule(name).parameters(recurse=False):
                tensor[dead] = 0
        block.get_submodule("conv_pwl").weight[:, dead] = 0  # type: ignore[index, operator]
    groups = groups_of(module, SHAPE, head_names(origin), "magnitude")
    [name] = [g.root for g in groups if g.root.startswith("blocks.2.1.") and g.channels == 192]
    pruned = cut(module, SHAPE, groups, {name: 96})
    assert torch.allclose(forward(pruned), forward(module), atol=1e-5)
    assert not torch.allclose(forward(cut(module, SHAPE, groups, {name: 88})), forward(module), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        ("tv shufflenet_v2_x1_0", "dependency graph"),
        pytest.param("ghostnet_100", "blocks.", marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", "attn.qkv", marks=pytest.mark.slow),
    ],
)
def test_what_the_library_cuts_wrongly_is_refused(name: str, blamed: str) -> None:
    """GhostNet, attention and channel shuffles are refused, and the message names the layer or the reason."""
    origin = origin_of(name)
    module = lively(build(origin))

    def halved() -> None:
        groups = groups_of(module, SHAPE, head_names(origin), "magnitude")
        cut(module, SHAPE, groups, {g.root: g.nearest(g.channels * 0.5, 8) for g in groups})

    with pytest.raises(ModelError, match=blamed) as told:
        halved()
    assert "\n" not in str(told.value)


class Rolled(nn.Module):
    """Adds to each channel its neighbour, which a dependency graph of layers takes for an addition of equals."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.second(torch.relu(x + x.roll(1, 1)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_cut_of_the_wrong_channels_is_found() -> None:
    """A network that still runs after the cut, with channels that belong to other ones, is refused."""
    torch.manual_seed(0)
    module = Rolled().eval()
    groups = groups_of(module, (3, 16, 16), {"head.weight"}, "magnitude")
    with pytest.raises(ModelError, match="first"):
        cut(module, (3, 16, 16), groups, {g.root: g.channels // 2 for g in groups if g.root == "first"})


def test_grouped_channels_lose_as_many_in_each_part() -> None:
    """Of a convolution in 4 groups, each group loses its own share, and widths are whole numbers of channels a group."""
    group = Group("x", 32, 4, tuple(range(8)))
    assert group.nearest(20, 8) == 20
    assert group.nearest(1, 8) == 4
    assert group.removed(24) == [0, 1, 8, 9, 16, 17, 24, 25]


def test_no_layer_is_emptied() -> None:
    """The narrowest width is one `round_to` (or the layer itself where it has fewer), whatever is asked for."""
    assert Group("x", 64, 1, tuple(range(64))).nearest(0.1, 8) == 8
    assert Group("x", 6, 1, tuple(range(6))).nearest(0.1, 8) == 6
    assert Group("x", 64, 1, tuple(range(64))).nearest(21, 8) == 24


def test_importances_rank_as_their_papers_say() -> None:
    """magnitude, bn_scale, taylor and hessian put the channel first that has small weights, scales, or gradients; random is seeded."""
    torch.manual_seed(0)
    origin = {"source": "python", "name": "tiny:network", "in_chans": 3, "num_classes": 4, "options": {}}
    shape = (3, 16, 16)

    def first(module: nn.Module, importance: Any, batches: Any = ()) -> int:
        groups = groups_of(module, shape, head_names(origin), importance, batches)
        assert [g.channels for g in groups] == [24]
        return groups[0].order[0]

    small = Tiny(4, 3).eval()
    with torch.no_grad():
        for name, tensor in small.named_parameters():
            if tensor.shape[0] == 24:
                tensor[5] *= 1e-3
            if name in ("block.3.weight", "head.weight"):
                tensor[:, 5] *= 1e-3
    assert first(small, "magnitude") == 5
    scaled = lively(Tiny(4, 3)).eval()
    for layer in scaled.modules():
        if isinstance(layer, nn.BatchNorm2d):
            with torch.no_grad():
                layer.weight[7] = 0.01
    assert first(scaled, "bn_scale") == 7
    unused = Tiny(4, 3).eval()
    with torch.no_grad():  # nothing comes out of it, however large its weights are
        unused.head.weight[:, 3] = 0
        unused.block[3].weight[:, 3] = 0  # type: ignore[operator]
        unused.stem[0].weight[3] *= 100  # type: ignore[operator]
    batch = [(torch.randn(16, *shape), torch.arange(16) % 4)]
    assert first(unused, "taylor", batch) == 3
    assert first(unused, "hessian", batch) == 3
    assert first(unused, "magnitude") != 3
    orders = set()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.add(groups_of(small, shape, head_names(origin), "random")[0].order)
    assert len(orders) == 2


def test_hessian_counts_every_image() -> None:
    """The curvature of two images is the sum of each one's alone; torch-pruning's own counting forgets all but the last."""
    torch.manual_seed(0)
    module = Tiny(4, 3).eval()
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    both, counts = _squared_gradients(module, [(x, labels)])
    alone = [_squared_gradients(module, [(x[i : i + 1], labels[i : i + 1])])[0] for i in (0, 1)]
    assert set(counts.values()) == {2}
    for parameter, total in both.items():
        assert torch.allclose(total, alone[0][parameter] + alone[1][parameter])


def test_a_pruned_network_takes_another_head() -> None:
    """The record of what was pruned leaves the number of classes free."""
    origin = origin_of("mobilenetv3_small_100")
    module = build(origin)
    groups = groups_of(module, SHAPE, head_names(origin), "magnitude")
    pruned = cut(module, SHAPE, groups, {g.root: g.nearest(g.channels * 0.5, 8) for g in groups})
    whole = {**origin, "pruned": {"layers": changes(pruned, skeleton(origin))}}
    assert head_names(whole) == head_names(origin) == {"classifier.weight", "classifier.bias"}
    assert forward(build({**whole, "num_classes": 3})).shape == (2, 3)


@pytest.mark.parametrize(
    "layers",
    [
        {"conv_stem": {"out_channels": 17}},
        {"conv_stem": {"out_channels": 0}},
        {"conv_stem": {"out_channels": True}},
        {"conv_stem": {"forward": 8}},
        {"conv_stem": {"__class__": 8}},
        {"conv_stem": {"weight": [8, 3]}},
        {"conv_stem": {"weight": [1 << 40, 3, 3, 3]}},
        {"conv_stem": {"weight": "8"}},
        {"nowhere": {"out_channels": 8}},
    ],
)
def test_a_record_that_is_not_a_narrower_network_is_refused(layers: Mapping[str, Any]) -> None:
    """Numbers that grow a layer, name what is not there, or are none, do not reach the module."""
    module = build(origin_of("mobilenetv3_small_100"))
    before = {name: tensor.shape for name, tensor in module.state_dict().items()}
    with pytest.raises(ModelError, match="another architecture, or damaged"):
        narrow(module, layers)
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == before


def named_model(checkpoint: str) -> TorchModel:
    shape = {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"source": "python", "entry": "tiny:network", "input": shape, "checkpoint": checkpoint}
    return load_model(PythonModel.model_validate(config), 4, {}, trains=False)


@pytest.mark.parametrize("record", ["{", "[]", '{"layers": {}}', '{"layers": [], "steps": []}', '{"layers": {"a": 1}, "steps": []}'])
def test_a_damaged_record_in_a_checkpoint_is_refused(record: str, tmp_path: Path) -> None:
    """A header that is not a record of pruning is named, and the file is not used."""
    save_file(Tiny(4, 3).state_dict(), tmp_path / "x.safetensors", {METADATA: record})
    with pytest.raises(ModelError, match="record of what was pruned is damaged"):
        named_model(str(tmp_path / "x.safetensors"))
    save_file(Tiny(4, 3).state_dict(), tmp_path / "y.safetensors", {METADATA: '{"layers": {"head": {"in_features": 99}}, "steps": []}'})
    with pytest.raises(ModelError, match="another architecture, or damaged"):
        named_model(str(tmp_path / "y.safetensors"))


# ---- widths by latency


def test_plans_take_the_most_saved_for_the_least_harm_first() -> None:
    """Each plan is the one before with one group narrower; noise is never a reason to cut."""
    rows = [Row("a", 16, 0.1, 0.01), Row("a", 8, 0.2, 0.5), Row("b", 16, 0.1, 0.1), Row("c", 8, NOISE / 2, 0.0), Row("d", 8, -0.1, 0.0)]
    assert plans(rows) == [{"a": 16}, {"a": 16, "b": 16}, {"a": 8, "b": 16}]


class ByMacs(Pace):
    """Stands for a runtime whose time is the MACs, so that no test hangs on a clock."""

    @contextmanager
    def against(self, whole: nn.Module) -> Iterator[Callable[[nn.Module], float]]:
        yield lambda module: count_macs(module, self.spec.shape) / count_macs(whole, self.spec.shape)


def test_the_path_is_followed_only_as_far_as_the_aim() -> None:
    """The network chosen meets the aim, one step less does not, and an aim out of reach is refused with how far it got."""
    small = (3, 32, 32)
    origin = origin_of("mobilenetv2_100")
    module = build(origin)
    groups = groups_of(module, small, head_names(origin), "magnitude")
    spec = trained().input
    pace = ByMacs("onnxruntime", 1, replace(spec, height=32, width=32))
    whole = count_macs(module, small)

    def cutter(widths: Mapping[str, int]) -> nn.Module:
        return cut(module, small, groups, widths)

    rows = [
        Row(g.root, w, 1 - count_macs(cutter({g.root: w}), small) / whole, 0.1) for g in groups for w in (g.nearest(g.channels / 2, 8),)
    ]
    path = plans(rows)
    assert len(path) > 10
    widths, share = widths_for(0.6, rows, module, cutter, pace, Screen(quiet=True))
    assert share == count_macs(cutter(widths), small) / whole <= 0.6
    assert count_macs(cutter(path[path.index(widths) - 1]), small) / whole > 0.6
    with pytest.raises(ModelError, match=r"0\.10 of the present one was asked for; the least that was measured is 0\.2"):
        widths_for(0.1, rows, module, cutter, pace, Screen(quiet=True))


# ---- the stage


def stage(**settings: Any) -> Prune:
    return Prune(stage="prune", **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchModel, Context]:
    folder = tmp_path_factory.mktemp("prune")
    recipe = load_recipe(write_recipe(folder))
    return trained(), Context(load_data(recipe.data, 0), 0, folder, Screen(quiet=True))


@pytest.mark.parametrize("aim", ["macs", "parameters"])
def test_a_size_is_met_and_not_overshot(aim: str, run: tuple[TorchModel, Context]) -> None:
    """At most the share asked for stays, and no more goes than one step of `round_to` makes."""
    model, ctx = run
    before = {"macs": count_macs(model.module, model.input.shape), "parameters": sum(p.numel() for p in model.module.parameters())}
    pruned = stage(**{aim: 0.6, "round_to": 1}).run(model, ctx)
    after = {"macs": count_macs(pruned.module, model.input.shape), "parameters": sum(p.numel() for p in pruned.module.parameters())}
    assert 0.53 < after[aim] / before[aim] <= 0.6
    with pytest.raises(ModelError, match="at its narrowest"):
        stage(**{aim: 0.01, "round_to": 8}).run(model, ctx)


def test_the_stage_leaves_its_model_alone(run: tuple[TorchModel, Context]) -> None:
    """The teacher before-pruning is the very model that was pruned, unchanged; what was done is in the origin and in the notes."""
    model, ctx = run
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    pruned = stage(ratio=0.5).run(model, ctx)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert pruned.origin["pruned"]["steps"][0]["widths"] == {root: [24, 16] for root in _roots(pruned)}
    assert any("24 to 16" in note for note in pruned.notes)
    twice = stage(ratio=0.5).run(pruned, ctx)
    again = build(twice.origin)
    again.load_state_dict(twice.module.state_dict())
    assert len(twice.origin["pruned"]["steps"]) == 2
    assert torch.equal(forward(again, (3, 16, 16)), forward(twice.module, (3, 16, 16)))


def _roots(model: TorchModel) -> list[str]:
    return list(model.origin["pruned"]["steps"][0]["widths"])


def test_kept_layers_stay_whole(run: tuple[TorchModel, Context]) -> None:
    """`keep` names layers or patterns; one that fits nothing, or leaves nothing to prune, is refused."""
    model, ctx = run
    with pytest.raises(ModelError, match="none of the layers"):
        stage(ratio=0.5, keep=("sten.*",)).run(model, ctx)
    with pytest.raises(ModelError, match="nothing to prune"):
        stage(ratio=0.5, keep=("*",)).run(model, ctx)


def test_one_aim_is_given(tmp_path: Path) -> None:
    """No aim, two aims, and a ratio that is all of a layer are refused where the recipe is read."""
    path = write_recipe(tmp_path)
    text = path.read_text()
    for wrong, said in (("{stage: prune}", "here is none"), ("{stage: prune, ratio: 0.5, macs: 0.5}", "here are macs and ratio")):
        path.write_text(text.replace("targets:", f"  - {wrong}\ntargets:", 1))
        with pytest.raises(UsageError, match=said):
            load_recipe(path)
    for wrong, said in (
        ("macs: 0.5, device: ssh://pi@pi", "the aim is macs: leave out device, or aim at latency"),
        ("latency: 0.5, device: ssh://pi:secret@pi", r"tiny.yaml:\d+: stages\[1\]\.device: 'ssh://.*a password never: use a key"),
        ("latency: 0.5, device: nobodys", r"stages\[1\]\.device: 'nobodys' is no board"),
    ):
        path.write_text(text.replace("targets:", f"  - {{stage: prune, {wrong}}}\ntargets:", 1))
        with pytest.raises(UsageError, match=said):
            load_recipe(path)
    path.write_text(text.replace("targets:", "  - {stage: prune, ratio: 1.0}\ntargets:", 1))
    with pytest.raises(UsageError, match="ratio"):
        load_recipe(path)


def test_another_aim_finds_the_table_measured(tmp_path: Path) -> None:
    """What channels cost on this machine is measured once for a run folder, whatever the aim; for another rounding it is not the same."""
    path = write_recipe(tmp_path)
    text = path.read_text().replace("precision: int8", "precision: fp32")
    for aim, tables in (("latency: 0.7", 1), ("latency: 0.8", 1), ("latency: 0.8, round_to: 4", 2)):
        path.write_text(text.replace("targets:", f"  - {{stage: prune, {aim}}}\ntargets:", 1))
        with suppress(ModelError):  # so small a network may not get faster
            float_models(Run(load_recipe(path), load_data(load_recipe(path).data, 0), Store(tmp_path / "out"), Screen(quiet=True)))
        assert len(list((tmp_path / "out" / "store").glob("latency-table-*"))) == tables


def test_a_pruned_network_goes_to_its_bundle(tmp_path: Path) -> None:
    """train, prune, distil and deliver: MACs fall, drops count from the whole network, notes say what went, a second run redoes nothing.

    The controls are trained as the pruned network was, and each says whether it was beaten, or why there is none.
    """
    path = write_recipe(tmp_path)
    stages = "  - {stage: prune, ratio: 0.4}\n  - {stage: distil, epochs: 6, batch: 8, lr: 0.01, augment: none}\n"
    text = path.read_text().replace("targets:", stages + "targets:", 1)
    lines = [line for line in text.splitlines() if "nuc" not in line and "orin" not in line]
    path.write_text("\n".join(lines).replace("precision: int8", "precision: fp32") + "\ncontrols: true\n")
    recipe = load_recipe(path)
    result = compress(recipe, path.read_text(), tmp_path / "out", "edgecnn compress", Screen(quiet=True))
    _load, trained_row, pruned, distilled = result["stages"]
    assert pruned["macs"] < 0.7 * trained_row["macs"]
    assert distilled["macs"] == pruned["macs"]
    assert any("24 to 16" in note for note in pruned["notes"])
    assert result["baseline"]["macs"] == trained_row["macs"]
    assert distilled["top1"] > 0.5
    assert result["targets"][0]["agreement"] > 0.5
    without, uniform, nearest = result["controls"]
    assert (without["name"], without["macs"]) == ("no-teacher", pruned["macs"])
    assert uniform["macs"] < trained_row["macs"]
    assert nearest["verdict"] == "not made"
    for control in (without, uniform):
        assert control["ours_top1"] == distilled["top1"]
        assert ("did not beat it" in control["verdict"]) == (control["top1"] >= distilled["top1"])
    assert compress(recipe, path.read_text(), tmp_path / "out", "edgecnn compress", Screen(quiet=True))["resumed"]
    _same_from_its_file(tmp_path, path)


def _same_from_its_file(folder: Path, path: Path) -> None:
    """The stored weights are a checkpoint for another recipe: narrow, with the same predictions, and no pickle."""
    stored = list((folder / "out" / "store").glob("stage-*/weights.safetensors"))
    assert len(stored) == 3
    [last] = [file for file in stored if "distilled" in json.loads((file.parent / "done.json").read_text())["facts"]["origin"]]
    model = named_model(f"{last}")
    whole = sum(p.numel() for p in Tiny(4, 3).parameters())
    assert sum(p.numel() for p in model.module.parameters()) < 0.7 * whole
    assert model.origin["pruned"]["steps"][0]["ratio"] == 0.4
    assert torch.equal(model.module.state_dict()["head.weight"], load_file(last)["head.weight"])
