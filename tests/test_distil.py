"""A student is told what its teacher knows, about the very images it sees itself."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import CLASSES, SPEC, images, network, trained, write_recipe
from torch import Tensor, nn

from edgecnn.data import Data, load_data
from edgecnn.errors import DataError, ModelError, UsageError
from edgecnn.losses import dist_loss, hint_loss, kl_loss
from edgecnn.models import PythonModel
from edgecnn.recipe import load_recipe
from edgecnn.screen import Screen
from edgecnn.stages.base import Context, TorchModel
from edgecnn.stages.distil import Distil, _hinted
from edgecnn.train import UNLABELLED, cross_entropy

QUIET = Screen(quiet=True)


def logits(seed: int = 0) -> Tensor:
    return torch.randn(8, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("loss", [kl_loss, dist_loss])
def test_no_distance_to_oneself(loss: Any) -> None:
    """Both losses are 0 between equal logits, above 0 between different ones, and blind to a constant added to a row."""
    assert float(loss(logits(), logits(), 4.0)) == pytest.approx(0, abs=1e-5)
    assert float(loss(logits(), logits() + 3, 4.0)) == pytest.approx(0, abs=1e-5)
    assert float(loss(logits(), logits(1), 4.0)) > 0.1


def test_kl_is_the_divergence_of_softened_predictions() -> None:
    """kl_loss is T squared times the sum over classes of q log(q / p), averaged over images."""
    p, q = (torch.softmax(logits(seed) / 4, 1) for seed in (0, 1))
    assert float(kl_loss(logits(0), logits(1), 4.0)) == pytest.approx(float(16 * (q * (q / p).log()).sum(1).mean()), rel=1e-4)


def test_dist_asks_for_correlation_only() -> None:
    """dist_loss sees how predictions rank, not how far apart they lie: a student half as sure, image by image, is not told off much."""
    sure = torch.eye(10) * 6
    unsure = torch.log(0.5 * torch.softmax(sure, 1) + 0.05)
    assert float(dist_loss(unsure, sure, 1.0)) == pytest.approx(0, abs=1e-4)
    assert float(kl_loss(unsure, sure, 1.0)) > 0.3


# ---- the stage


def stage(**settings: Any) -> Distil:
    return Distil.model_validate({"stage": "distil", "epochs": 3, "batch": 8, "lr": 0.01, "augment": "standard", **settings})


def student() -> TorchModel:
    torch.manual_seed(5)
    origin = {"source": "python", "name": "tiny:network", "in_chans": 3, "num_classes": 4, "options": {}}
    return TorchModel(network().eval(), SPEC, CLASSES, origin)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load_data(load_recipe(write_recipe(tmp_path_factory.mktemp("distil"))).data, 0)


def context(data: Data, work: Path, screen: Screen = QUIET, teacher: TorchModel | None = None) -> Context:
    return Context(data, 0, work, screen, lambda: teacher or trained())


def test_teacher_and_student_see_the_same_crops() -> None:
    """A teacher with another mean and std is given the student's very pixels in its own normalisation."""
    seen = {}

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen["x"] = x
            return x.mean((2, 3))

    own = replace(SPEC, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = torch.rand(4, 3, 16, 16)
    x = (pixels - torch.tensor(SPEC.mean).view(1, 3, 1, 1)) / torch.tensor(SPEC.std).view(1, 3, 1, 1)
    criterion = stage()._criterion(TorchModel(Looks(), own, CLASSES), SPEC)
    criterion(x, logits()[:4, :3], torch.tensor([0, 1, 2, 0]))
    wanted = (pixels - torch.tensor(own.mean).view(1, 3, 1, 1)) / torch.tensor(own.std).view(1, 3, 1, 1)
    assert torch.allclose(seen["x"], wanted, atol=1e-6)


def test_alpha_weighs_labels_against_the_teacher() -> None:
    """With alpha 1 a student that says what its teacher says has no loss, whatever the label; with less, the label counts."""
    teacher = trained()
    x = torch.randn(4, 3, 16, 16)
    said, wrong = teacher.module(x).detach(), (teacher.module(x).argmax(1) + 1) % 4
    assert float(stage(alpha=1.0)._criterion(teacher, SPEC)(x, said, wrong)) == pytest.approx(0, abs=1e-5)
    part = float(stage(alpha=0.75)._criterion(teacher, SPEC)(x, said, wrong))
    assert part == pytest.approx(0.25 * float(nn.functional.cross_entropy(said, wrong)), rel=1e-4)


def test_a_teacher_is_not_trained(data: Data, tmp_path: Path) -> None:
    """The teacher's weights and its batch norm's statistics are the same after as before; the student's are not."""
    teacher, model = trained(), student()
    before = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    first = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    done = stage(epochs=1).run(model, context(data, tmp_path, teacher=teacher))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.module.state_dict().items())
    assert not torch.equal(done.module.state_dict()["stem.0.weight"], first["stem.0.weight"])


def test_a_student_learns_from_its_teacher_alone(data: Data, tmp_path: Path) -> None:
    """With alpha 1 it never hears a label, and comes to agree with its teacher on images that it was not trained on."""
    done = stage(epochs=15, alpha=1.0, augment="none", lr=0.02).run(student(), context(data, tmp_path))
    x = torch.stack([torch.from_numpy(_pixels(data, i)) for i in range(len(data.evaluation))])
    teacher = trained().module
    with torch.no_grad():
        same = (done.module(x).argmax(1) == teacher(x).argmax(1)).float().mean()
    assert len(x) > 15
    assert float(same) > 0.7


def _pixels(data: Data, i: int) -> Any:
    from edgecnn.device.preprocess import normalise, to_pixels

    return normalise(to_pixels(data.evaluation.read(i), SPEC)[None], SPEC)[0]


class _Killed(Screen):
    """Dies in the second epoch."""

    @contextmanager
    def bar(self, title: str, total: int) -> Any:
        def line(done: int, text: str) -> None:
            if text.startswith("epoch 2/"):
                raise KeyboardInterrupt

        yield line


def test_an_interrupted_run_ends_the_same(data: Data, tmp_path: Path) -> None:
    """Stopped in its second epoch and started again, it ends with the weights of a run that was not, bit for bit."""
    whole = stage(mixup=0.2).run(student(), context(data, _made(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        stage(mixup=0.2).run(student(), context(data, _made(tmp_path / "part"), _Killed(quiet=True)))
    assert (tmp_path / "part" / "checkpoint.pt").exists()
    resumed = stage(mixup=0.2).run(student(), context(data, tmp_path / "part"))
    assert resumed.notes == whole.notes
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], tensor), name


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ---- hints and unlabelled images


def test_hints_compare_where_layers_look() -> None:
    """No distance between a map and itself at twice the strength or with its channels doubled, some between different ones."""
    a, b = (torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert float(hint_loss(a, 2 * a)) == pytest.approx(0, abs=1e-6)
    assert float(hint_loss(torch.cat([a, a], 1), a)) == pytest.approx(0, abs=1e-6)
    assert float(hint_loss(a, b)) > 0.01


def test_hints_bring_the_layers_together() -> None:
    """Following the loss, the student's layer comes to look where its teacher's does; no hook stays behind."""
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher, module = trained(), student().module.train()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    apart = []
    with _hinted(module, teacher.module, {"block": "block"}) as hint:
        criterion = stage(alpha=1.0, hint_weight=10.0)._criterion(teacher, SPEC, hint)
        for _ in range(40):
            loss = criterion(x, module(x), torch.arange(16) % 4)
            apart.append(float(torch.as_tensor(hint()).detach()))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert apart[-1] < 0.8 * apart[0]
    assert not module.get_submodule("block")._forward_hooks


def test_a_hint_for_no_layer_is_refused(data: Data, tmp_path: Path) -> None:
    """The message names the side, the layer and what there is; a layer that gives no maps is refused too."""
    with pytest.raises(ModelError, match=r"the teacher has no layer 'blok'; it has .*block"):
        stage(hints={"block": "blok"}).run(student(), context(data, _made(tmp_path / "a")))
    with pytest.raises(ModelError, match="head gives 2 dimensions"):
        stage(hints={"head": "head"}).run(student(), context(data, _made(tmp_path / "b")))


def test_unlabelled_images_teach_through_the_teacher(data: Data, tmp_path: Path) -> None:
    """Images without classes change the result, the labels' loss does not see them, and an empty folder is refused."""
    folder = _made(tmp_path / "loose")
    with pytest.raises(DataError, match="no files in it"):
        stage(unlabelled=str(folder)).inputs()
    for i, pixels in enumerate(images(24, seed=9)[0]):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    with_them = stage(epochs=1, unlabelled=str(folder)).run(student(), context(data, _made(tmp_path / "a"))).module.state_dict()
    without = stage(epochs=1).run(student(), context(data, _made(tmp_path / "b"))).module.state_dict()
    assert not torch.equal(with_them["head.weight"], without["head.weight"])
    loss = cross_entropy(0.1)
    some, target = logits(), torch.tensor([1, 2, 3, UNLABELLED, 4, UNLABELLED, 5, 6])
    seen = target != UNLABELLED
    assert float(loss(some, some, target)) == pytest.approx(float(loss(some, some[seen], target[seen])), rel=1e-5)
    assert float(loss(some, some[:1], torch.tensor([UNLABELLED]))) == 0


# ---- teachers of one's own


def named(**changes: Any) -> PythonModel:
    shape = {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    return PythonModel.model_validate({"source": "python", "entry": "tiny:network", "input": shape, **changes})


def test_a_named_teacher_is_loaded(data: Data, tmp_path: Path) -> None:
    """A teacher from a file teaches as well as the one from before pruning, and its content is part of what decides the result."""
    weights = tmp_path / "teacher.safetensors"
    save_file(trained().module.state_dict(), weights)
    asked = stage(epochs=1, teacher=named(checkpoint=str(weights)))
    first = asked.inputs()
    by_file = asked.run(student(), context(data, _made(tmp_path / "a")))
    by_chain = stage(epochs=1).run(student(), context(data, _made(tmp_path / "b")))
    for name, tensor in by_chain.module.state_dict().items():
        assert torch.equal(by_file.module.state_dict()[name], tensor), name
    save_file(trained(seed=1).module.state_dict(), weights)
    assert asked.inputs() != first


def test_a_teacher_of_other_classes_or_another_size_is_refused(data: Data, tmp_path: Path) -> None:
    """The message says what both have and what to change, of the teacher and not of the model."""
    weights = tmp_path / "teacher.safetensors"
    save_file(network(7).state_dict(), weights)
    with pytest.raises(
        ModelError, match=r"^stages: distil: teacher: the weights of .* are not for the 4 classes .*as teacher\.checkpoint\.$"
    ):
        stage(teacher=named(checkpoint=str(weights))).run(student(), context(data, tmp_path))
    save_file(network().state_dict(), weights)
    larger = named(checkpoint=str(weights), input={"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3})
    with pytest.raises(ModelError, match=r"its input is 3 x 32 x 32, the student's 3 x 16 x 16.*Set teacher\.input\.size"):
        stage(teacher=larger).run(student(), context(data, tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("teacher: {TINY, checkpoint: HERE/none.safetensors}", r"^stages: distil: teacher: checkpoint .*none\.safetensors"),
        ("teacher: {TINY, checkpoint: HERE/seven.safetensors}", r"^stages: distil: teacher: the weights of .* are not for the 4 classes"),
        (
            "teacher: {TINY, checkpoint: HERE/four.safetensors, input: {size: 32, MEAN}}",
            r"^stages: distil: teacher: its input is 3 x 32 x 32",
        ),
        ("unlabelled: HERE/none", r"^stages: distil: unlabelled: .*none: no files in it"),
        ("hints: {blok: block}", r"^stages: distil: hints: the student has no layer 'blok'"),
        ("hints: {head: head}", r"^stages: distil: hints: head gives 2 dimensions"),
    ],
)
def test_an_impossible_distil_is_refused_before_training(settings: str, said: str, tmp_path: Path) -> None:
    """What distil lacks is said in the first minute, before any stage has run."""
    from edgecnn.pipeline import compress

    for name, classes in (("seven", 7), ("four", 4)):
        save_file(network(classes).state_dict(), tmp_path / f"{name}.safetensors")
    mean = "mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]"
    given = "source: python, entry: 'tiny:network'" + ("" if "MEAN" in settings else f", input: {{size: 16, {mean}}}")
    settings = settings.replace("TINY", given).replace("MEAN", mean).replace("HERE", str(tmp_path))
    path = write_recipe(tmp_path)
    stages = f"  - {{stage: prune, ratio: 0.2}}\n  - {{stage: distil, epochs: 1, {settings}}}\n"
    path.write_text(path.read_text().replace("targets:", stages + "targets:", 1))
    with pytest.raises((ModelError, DataError), match=said):
        compress(load_recipe(path), path.read_text(), tmp_path / "out", "edgecnn compress", QUIET)
    assert not list((tmp_path / "out").glob("*/stage-*"))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            "  - {stage: prune, ratio: 0.2}\n  - {stage: prune, ratio: 0.2}\n",
            r"stages\[2\]: prunes what was pruned just before",
        ),
        ("controls: true\n", r"controls: compares pruning and a train or distil behind it"),
        (
            "  - {stage: prune, ratio: 0.2}\n  - {stage: qat, epochs: 1}\ncontrols: true\n",
            r"controls: compares pruning and a train or distil",
        ),
        ("  - {stage: distil, epochs: 1}\n", r"stages\[1\].teacher: before-pruning, and no stage before this one prunes"),
        ("  - {stage: distil, epochs: 1}\n  - {stage: prune, ratio: 0.5}\n", r"stages\[1\].teacher: before-pruning"),
        (
            "  - {stage: distil, epochs: 1, teacher: {source: timm, name: resnet18}}\n",
            r"stages\[1\].teacher: a teacher with random weights",
        ),
    ],
)
def test_impossible_orders_are_refused_with_the_reason(stages: str, said: str, tmp_path: Path) -> None:
    """Where a stage needs what no stage before it makes, the recipe says which and why."""
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("targets:", stages + "targets:", 1))
    with pytest.raises(UsageError, match=said):
        load_recipe(path)


def test_random_weights_are_not_pruned(tmp_path: Path) -> None:
    """A network without weights must be trained before it is pruned; distillation from a teacher with weights is training too."""
    path = write_recipe(tmp_path)
    text = path.read_text()
    network_of = "model:\n  source: edgecnn\n  name: simple_cnn\n"
    text = network_of + text[text.index("data:") :]
    prune, train = "  - {stage: prune, ratio: 0.5}\n", "  - {stage: train, epochs: 1}\n"
    old = text[text.index("  - {stage: train") : text.index("targets:")]
    path.write_text("name: x\n" + text.replace(old, prune + train))
    with pytest.raises(UsageError, match=r"stages\[0\]: prunes random weights"):
        load_recipe(path)
    path.write_text("name: x\n" + text.replace(old, train + prune))
    assert [s.stage for s in load_recipe(path).stages] == ["train", "prune"]
