"""What the qat stage trains is what ships, and impossible orders are refused."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import source, trained, write_recipe

from edgecnn.data import Data, load_data
from edgecnn.errors import UsageError
from edgecnn.fake_quant import FakeQuantized
from edgecnn.floats import int8_forms
from edgecnn.folding import layers_of, put_back
from edgecnn.pipeline import compress
from edgecnn.recipe import load_recipe
from edgecnn.screen import Screen
from edgecnn.stages.base import Context
from edgecnn.stages.qat import Qat
from edgecnn.targets.calibration import ranges
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.onnx import export_onnx
from edgecnn.targets.qdq import kept_in_float, left_in_float, ranges_of, write_qdq

QUIET = Screen(quiet=True)
STAGE = Qat.model_validate({"stage": "qat", "epochs": 2, "batch": 8, "lr": 0.001, "augment": "none"})


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Any]:
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("qat")))
    return load_data(recipe.data, 0), int8_forms(recipe)


def test_trained_weights_go_back_into_the_module(tiny_folder: Path) -> None:
    """Every layer is found; folded weights put back give the module's own outputs, and changed ones change them."""
    model, x = trained(), torch.randn(8, 3, 16, 16)
    layers = layers_of(model.module, model.input.shape, tiny_folder / "model.onnx")
    assert [layer.owner for layer in layers] == ["stem.0", "block.0", "block.3", "head"]
    assert [layer.norm for layer in layers] == ["stem.1", "block.1", "block.4", None]
    import onnx
    from onnx import numpy_helper

    values = {
        i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in onnx.load(str(tiny_folder / "model.onnx")).graph.initializer
    }
    before = model.module(x).detach()
    put_back(model.module, layers, values)
    assert torch.allclose(model.module(x), before, atol=1e-4)
    put_back(model.module, layers, {name: value * 1.5 for name, value in values.items() if value.is_floating_point()})
    assert not torch.allclose(model.module(x), before, atol=1e-2)


def test_a_convolution_with_a_bias_and_a_batch_norm_keeps_the_names_of_its_tensors(tmp_path: Path) -> None:
    """ResNet-8 has such: weights that went back are exported under the names that they were trained under."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(8)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    norm.running_mean.uniform_(-1, 1)
    model = replace(trained(), module=module.eval())
    export_onnx(model, tmp_path / "before.onnx")
    layers = layers_of(module, model.input.shape, tmp_path / "before.onnx")
    assert [(layer.owner, layer.norm) for layer in layers] == [("0", "1")]
    graphs = [onnx.load(str(tmp_path / "before.onnx")).graph]
    values = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graphs[0].initializer}
    put_back(module, layers, values)
    export_onnx(model, tmp_path / "after.onnx")
    graphs.append(onnx.load(str(tmp_path / "after.onnx")).graph)
    before, after = ({i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer} for graph in graphs)
    assert set(after) == set(before) >= {layers[0].weight, layers[0].bias}
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-5)


def test_gradients_reach_every_weight_and_scale(tiny_folder: Path, tmp_path: Path, setting: tuple[Data, Any]) -> None:
    """One step of each form moves all weights, and the scales of that form; ranges written to a graph come back from it."""
    _, forms = setting
    assert [form.activations for form in forms] == ["uint8", "uint8", "int8"]
    files = []
    for i, form in enumerate(forms):
        files.append(tmp_path / f"{i}.onnx")
        given = ranges(source(tiny_folder).histograms(), "minmax", symmetric=form.symmetric)
        write_qdq(tiny_folder / "model.onnx", files[-1], given, form)
    layers = layers_of(trained().module, (3, 16, 16), tiny_folder / "model.onnx")
    names = [name for layer in layers for name in (layer.weight, layer.bias) if name]
    simulated = FakeQuantized(tiny_folder / "model.onnx", files, names)
    for i, form in enumerate(forms):
        simulated.zero_grad()
        simulated.form = i
        simulated(torch.randn(8, 3, 16, 16)).square().sum().backward()
        assert all(weight.grad is not None and bool((weight.grad != 0).any()) for weight in simulated.weights)
        assert [bool((log.grad != 0).any()) for log in simulated.log_scales] == [k == i for k in range(len(forms))]
        kept = simulated.ranges(i)
        assert len(kept) >= 4
        given = ranges(source(tiny_folder).histograms(), "minmax", symmetric=form.symmetric)
        write_qdq(tiny_folder / "model.onnx", tmp_path / "again.onnx", {**given, **kept}, form)
        again = FakeQuantized(tiny_folder / "model.onnx", [tmp_path / "again.onnx"], names).ranges(0)
        assert again.keys() == kept.keys()
        assert {name: (kept[name], again[name]) for name in kept if again[name] != pytest.approx(kept[name], rel=2e-3)} == {}


class _Killed(Screen):
    """Dies in the second epoch."""

    @contextmanager
    def bar(self, title: str, total: int) -> Any:
        def line(done: int, text: str) -> None:
            if text.startswith("epoch 2/"):
                raise KeyboardInterrupt

        yield line


def test_an_interrupted_run_ends_the_same(setting: tuple[Data, Any], tmp_path: Path) -> None:
    """Stopped in its second epoch and started again, it ends with the weights and ranges of a run that was not."""
    data, forms = setting
    folders = [tmp_path / name for name in ("whole", "part")]
    for folder in folders:
        folder.mkdir()
    whole = STAGE.run(trained(), Context(data, 0, folders[0], QUIET, forms=forms))
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(trained(), Context(data, 0, folders[1], _Killed(quiet=True), forms=forms))
    resumed = STAGE.run(trained(), Context(data, 0, folders[1], QUIET, forms=forms))
    assert resumed.origin == whole.origin
    for i, form in enumerate(forms):  # what was simulated has the first layer in float where the file that ships has
        graph = onnx.load(str(folders[0] / f"form-{i}.onnx")).graph
        first = next(node for node in graph.node if node.op_type == "Conv")
        assert (first.input[1] in {each.name for each in graph.initializer}) == form.float_stem
    assert [form.float_stem for form in forms] == [True, False, False]
    assert len(whole.origin["quantized"]) == len(forms) == 3
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], tensor), name


def test_each_form_takes_the_ranges_learned_for_it(setting: tuple[Data, Any], tiny_folder: Path, tmp_path: Path) -> None:
    """onnxruntime's and OpenVINO's are both of uint8, and differ in whether a convolution is rounded before an addition."""
    _, forms = setting
    start = ranges(source(tiny_folder).histograms(), "minmax", symmetric=False)
    learned = [
        {"form": asdict(form), "ranges": {name: (low * (i + 1), high * (i + 1)) for name, (low, high) in start.items()}}
        for i, form in enumerate(forms)
    ]
    given = replace(source(tiny_folder), learned=learned)
    for i, form in enumerate(forms):
        fit_qdq(given, tmp_path / "q.onnx", form, methods=["minmax"], correct=False)
        found = ranges_of(tmp_path / "q.onnx", form)
        first = next(iter(found))
        assert found[first][1] == pytest.approx(learned[i]["ranges"][first][1], rel=0.02), form


def test_every_target_is_offered_the_trained_model(tmp_path: Path) -> None:
    """Train, then qat: each target measures files with and without it and ships one; the second run finds all done."""
    path = write_recipe(tmp_path)
    text = path.read_text().replace("targets:\n", "  - {stage: qat, epochs: 1, batch: 8, lr: 0.001, augment: none}\ntargets:\n")
    path.write_text(text)
    recipe = load_recipe(path)
    result = compress(recipe, text, tmp_path / "out", "edgecnn compress", QUIET)
    assert [row["stage"] for row in result["stages"]] == ["load", "train", "qat"]
    told = [note for note in result["stages"][-1]["notes"] if "with the simulated class" in note]
    assert [note.partition("'s form")[0] for note in told] == ["onnxruntime", "openvino", "tensorrt"]
    assert all("run in onnxruntime" in note for note in told)
    for target in result["targets"]:
        names = [c["name"] for c in target["candidates"]]
        twins = [c for c in target["candidates"] if c["name"].endswith("-qat") and c["file_sha256"]]
        assert len(twins) == 1, names  # what was simulated, and no sister of it
        assert all(c["choice_top1"] > 0.5 for c in twins)
        assert sum(c["chosen"] for c in target["candidates"]) == 1
    assert compress(recipe, text, tmp_path / "out", "edgecnn compress", QUIET)["resumed"]


def test_layers_pinned_to_float_are_simulated_in_float(tmp_path: Path, tiny_folder: Path) -> None:
    """A target's `keep_float` is its form's, so that two targets that differ in it are trained for and take their own ranges."""
    text = write_recipe(tmp_path).read_text()
    plain, pinned = text.split("targets:\n")[1].splitlines()[0], ", keep_float: [Gemm]}"
    assert plain.endswith("}")
    (tmp_path / "pinned.yaml").write_text(text.replace(plain, f"{plain}\n{plain[:-1].replace('name: ', 'name: other-')}{pinned}"))
    form, other = list(int8_forms(load_recipe(tmp_path / "pinned.yaml")))[:2]
    assert form != other == replace(form, keep_float=("Gemm",))
    model = tiny_folder / "model.onnx"
    assert set(left_in_float(model, other)) - set(left_in_float(model, form)) == set(kept_in_float(model, ["Gemm"]))


@pytest.mark.parametrize(
    ("stages", "targets", "said"),
    [
        ("[{stage: train, epochs: 1}, {stage: qat, epochs: 1}, {stage: prune, ratio: 0.3}]", None, "stages[2]: comes after stages[1], qat"),
        ("[{stage: train, epochs: 1}, {stage: qat, epochs: 1}, {stage: train, epochs: 1}]", None, "Put qat last"),
        (
            "[{stage: train, epochs: 1}, {stage: qat, epochs: 1}]",
            "[{name: a, runtime: onnxruntime, precision: fp32}]",
            "no target may ship int8",
        ),
        ("[{stage: train, epochs: 1}, {stage: qat, epochs: 0}]", None, "epochs"),
    ],
)
def test_impossible_orders_are_refused(tmp_path: Path, stages: str, targets: str | None, said: str) -> None:
    """Each is refused by the recipe check, with the reason."""
    wrong = [f"stages={stages}", *([f"targets={targets}"] if targets else [])]
    with pytest.raises(UsageError) as refused:
        load_recipe(write_recipe(tmp_path), wrong)
    assert said in str(refused.value)


def test_random_weights_are_refused(tmp_path: Path) -> None:
    """A model with neither weights nor a stage before qat that trains it has no ranges to start from."""
    wrong = ["model={source: edgecnn, name: simple_cnn}", "stages=[{stage: qat, epochs: 1}]"]
    with pytest.raises(UsageError, match="ranges of random weights"):
        load_recipe(write_recipe(tmp_path), wrong)
