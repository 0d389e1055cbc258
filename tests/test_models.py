"""The recipe's model: named, loaded, fed and headed as asked, or refused with what to do."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import nn

from edgecnn.errors import ModelError
from edgecnn.models import ModelConfig, load_model, model_digest
from edgecnn.networks import build, head_names
from edgecnn.simple_cnn import SimpleCNN
from edgecnn.stages.base import TorchModel
from edgecnn.zoo import count_macs, count_parameters, find_models

SHARED = Path(__file__).parent.parent.parent / "shared" / "models"
RECIPE: TypeAdapter[Any] = TypeAdapter(ModelConfig)
SMALL = {"source": "timm", "name": "mobilenetv3_small_050", "input": {"size": 32}}
NAMES = {i: f"kind {i}" for i in range(4)}


def load(settings: dict[str, Any], outputs: int | None = 4, names: dict[int, str] = NAMES, trains: bool = True) -> TorchModel:
    return load_model(RECIPE.validate_python(settings), outputs, names, trains)


def saved(folder: Path, settings: dict[str, Any], classes: int, name: str = "w.safetensors") -> str:
    """A checkpoint of the model with `classes` outputs; returns its path."""
    module = load(settings, classes, {}).module
    save_file(module.state_dict(), folder / name)
    return str(folder / name)


# ---- loading ----


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "timm", "name": "mobilenetv2_035", "input": {"size": 32}},
        {"source": "timm", "name": "vit_tiny_patch16_224", "input": {"size": 64}},
        {"source": "torchvision", "name": "mobilenet_v3_small", "input": {"size": 64}},
        {"source": "torchvision", "name": "regnet_x_400mf", "input": {"size": 32}},
        {"source": "torchvision", "name": "googlenet", "input": {"size": 64}},
        {"source": "torchvision", "name": "squeezenet1_1", "input": {"size": 64}},
        {"source": "edgecnn", "name": "simple_cnn"},
        {"source": "edgecnn", "name": "simple_cnn", "input": {"height": 20, "width": 12}},
    ],
    ids=lambda s: s["name"],
)
@pytest.mark.parametrize("chans", [1, 3])
def test_every_source_gives_one_logit_a_class_and_can_be_built_again(settings: dict[str, Any], chans: int) -> None:
    """A model takes its input's shape, has one label an output, is in eval mode, and `origin` rebuilds it for the same weights."""
    model = load({**settings, "in_chans": chans})
    x = torch.rand(2, *model.input.shape)
    assert model.input.channels == chans == len(model.input.mean) == len(model.input.std)
    assert model.labels == tuple(NAMES.values())
    assert not model.module.training
    assert model.module(x).shape == (2, 4)
    again = build(json.loads(json.dumps(model.origin)))
    again.load_state_dict(model.module.state_dict())
    assert torch.equal(again(x), model.module(x))


def test_simple_cnn_is_the_one_of_the_textbook() -> None:
    """Two 3x3 convolutions 16/32 with padding 1, two 2x2 poolings, 128 units, dropout 0.5, on 32 x 32: the counts by hand."""
    module = SimpleCNN(10)
    assert count_parameters(module) == (3 * 9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 8 * 8 + 1) * 128 + 129 * 10
    assert count_macs(module, (3, 32, 32)) == 3 * 9 * 16 * 32 * 32 + 16 * 9 * 32 * 16 * 16 + 2048 * 128 + 128 * 10
    assert [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)] == [0.5]


def test_counting_leaves_the_module_as_it_was() -> None:
    """Counting MACs changes neither the mode nor batch norm's statistics."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert count_macs(module, (3, 8, 8)) == 6 * 6 * 4 * 27 + 4 * 4 * 4 * 9
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_random_weights_follow_the_seed_alone() -> None:
    """The same seed gives the same weights, also where a checkpoint of another model was looked at in between."""

    torch.manual_seed(5)
    one = next(load(SMALL).module.parameters())
    torch.manual_seed(5)
    head_names({"source": "torchvision", "name": "regnet_x_400mf", "in_chans": 3, "options": {}})
    assert torch.equal(one, next(load(SMALL).module.parameters()))


def test_transformers_are_built_for_the_recipes_size() -> None:
    """A network whose weights depend on the input's size is built for the size that was asked, in both zoos."""
    for settings in ({"source": "torchvision", "name": "vit_b_32"}, {"source": "timm", "name": "vit_tiny_patch16_224"}):
        origin = RECIPE.validate_python({**settings, "input": {"size": 64}}).architecture().origin
        with torch.device("meta"):
            assert build(origin)(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


# ---- preprocessing ----


def test_timm_preprocessing_is_timms() -> None:
    """Size, margin, interpolation, mean and std are what timm's own evaluation uses."""
    import timm

    seen = 0
    for name in (
        "mobilenetv3_small_100",
        "efficientnet_lite0",
        "mobilenetv4_conv_small",
        "tf_efficientnet_lite0",
        "convnext_atto",
        "ghostnet_100",
    ):
        config = RECIPE.validate_python({"source": "timm", "name": name})
        spec, published = config.architecture().input, timm.data.resolve_data_config({}, model=timm.create_model(name))
        transform = timm.data.create_transform(**published)
        assert spec.shape == published["input_size"]
        assert spec.resize == transform.transforms[0].size
        assert (spec.interpolation, spec.mean, spec.std) == (published["interpolation"], published["mean"], published["std"])
        assert spec.fit == "crop"
        seen += 1
    assert seen == 6


def test_torchvision_preprocessing_is_the_weights_own() -> None:
    """Size, margin, interpolation, mean and std are those of the named weights, the default ones where none are named."""
    v1 = RECIPE.validate_python({"source": "torchvision", "name": "mobilenet_v2", "weights": "IMAGENET1K_V1"}).architecture().input
    v2 = RECIPE.validate_python({"source": "torchvision", "name": "mobilenet_v2"}).architecture().input
    assert (v1.resize, v2.resize, v1.height, v1.interpolation) == (256, 232, 224, "bilinear")
    assert v1.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ModelError, match="it has IMAGENET1K_V1, IMAGENET1K_V2"):
        RECIPE.validate_python({"source": "torchvision", "name": "mobilenet_v2", "weights": "V3"}).architecture()


def test_googlenet_preprocessing_is_what_torchvision_does_inside_it() -> None:
    """GoogLeNet's published weights renormalise inside the model; ours do so in the preprocessing: the same numbers."""
    from torchvision.models import googlenet

    spec = RECIPE.validate_python({"source": "torchvision", "name": "googlenet"}).architecture().input
    with torch.device("meta"):
        theirs = googlenet(weights=None, transform_input=True, aux_logits=False, init_weights=False)
    pixels = torch.rand(2, 3, 8, 8)

    def normal(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    published = normal((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(theirs._transform_input(published), normal(spec.mean, spec.std), atol=1e-5)


def test_the_recipes_preprocessing_wins() -> None:
    """Every key of `input` replaces the published value, and nothing else changes."""
    wish = {"size": 48, "resize": 60, "fit": "squash", "interpolation": "nearest", "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    spec = load({"source": "timm", "name": "mobilenetv3_small_050", "input": wish}).input
    assert (spec.height, spec.width, spec.resize, spec.fit, spec.interpolation) == (48, 48, 60, "squash", "nearest")
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (1, 2, 3))


def test_a_size_without_resize_has_no_margin() -> None:
    """Another size takes the whole shorter side, not the published margin; the published size keeps it."""
    specs = {size: RECIPE.validate_python({**SMALL, "input": {"size": size}}).architecture().input for size in (32, 224)}
    assert (specs[32].resize, specs[224].resize) == (32, 256)
    oblong = RECIPE.validate_python({**SMALL, "input": {"height": 32, "width": 64}}).architecture().input
    assert (oblong.height, oblong.width, oblong.resize) == (32, 64, 64)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"input": {"size": 32, "height": 32, "width": 32}}, "either size, or height and width"),
        ({"input": {"height": 32}}, "both height and width"),
        ({"input": {"size": 32, "resize": 16}}, "smaller than the input"),
        ({"input": {"mean": [0.5]}}, "1 numbers, in_chans is 3"),
        ({"in_chans": 1, "input": {"std": [0.5, 0.5, 0.5]}}, "3 numbers, in_chans is 1"),
        ({"input": {"std": [0.5, 0.0, 0.5]}}, "above 0"),
        ({"pretrained": True, "checkpoint": "x"}, "give one of them"),
        ({"in_chans": 4}, "1 or 3"),
        ({"head": "new"}, "auto"),
        ({"pretrained": "yes"}, "boolean"),
        ({"size": 3}, "Extra inputs"),
    ],
)
def test_contradictions_are_found_in_the_recipe(settings: dict[str, Any], says: str) -> None:
    """What cannot be meant is refused when the recipe is read."""
    with pytest.raises(ValidationError, match=says):
        RECIPE.validate_python({"source": "timm", "name": "resnet18", **settings})


def test_preprocessing_that_is_not_ours_must_be_chosen() -> None:
    """A model evaluated with a squashed and then cut image is refused until the recipe chooses a fit."""
    settings = {"source": "timm", "name": "dm_nfnet_f0"}
    with pytest.raises(ModelError, match=r"model\.input\.fit: crop or squash"):
        RECIPE.validate_python(settings).architecture()
    assert RECIPE.validate_python({**settings, "input": {"fit": "squash"}}).architecture().input.fit == "squash"


def test_resize_below_the_published_size_is_refused() -> None:
    """A resize that leaves fewer pixels than the model's own input is refused."""
    with pytest.raises(ModelError, match=r"model\.input\.resize: 100 is smaller"):
        RECIPE.validate_python({"source": "timm", "name": "resnet18", "input": {"resize": 100}}).architecture()


# ---- checkpoints and heads ----


@pytest.mark.parametrize(
    "source",
    [SMALL, {"source": "torchvision", "name": "shufflenet_v2_x0_5", "input": {"size": 32}}, {"source": "edgecnn", "name": "simple_cnn"}],
)
def test_the_head_is_kept_or_made_anew(tmp_path: Path, source: dict[str, Any]) -> None:
    """auto keeps a head of the right size and replaces another; everything under the head is loaded; nothing is replaced untrained."""
    path = saved(tmp_path, source, 6)
    kept = load({**source, "checkpoint": path}, 6, {})
    anew = load({**source, "checkpoint": path}, 4)
    own = load({**source, "checkpoint": path}, None, {5: "five"}, trains=False)
    assert (kept.origin["head"], anew.origin["head"], own.origin["head"]) == ("kept", "new", "kept")
    assert own.labels == ("class 0", "class 1", "class 2", "class 3", "class 4", "five")
    x = torch.rand(2, *kept.input.shape)
    assert torch.equal(kept.module(x), own.module(x))
    head = head_names(kept.origin)
    body = [name for name in kept.module.state_dict() if name not in head]
    assert 1 <= len(head) <= 2
    assert len(body) > 4
    assert all(torch.equal(kept.module.state_dict()[name], anew.module.state_dict()[name]) for name in body)
    with pytest.raises(ModelError, match=r"6 outputs and the data has 4 classes.*stage that trains"):
        load({**source, "checkpoint": path}, 4, trains=False)
    with pytest.raises(ModelError, match="has 6 outputs, the data has 4 classes"):
        load({**source, "checkpoint": path, "head": "keep"}, 4)
    with pytest.raises(ModelError, match="resize needs a number of classes"):
        load({**source, "checkpoint": path, "head": "resize"}, None, {})


def test_resize_makes_a_new_head_of_the_same_size(tmp_path: Path) -> None:
    """head: resize replaces a head that has the right size but other classes."""
    path = saved(tmp_path, SMALL, 4)
    kept, anew = load({**SMALL, "checkpoint": path}), load({**SMALL, "checkpoint": path, "head": "resize"})
    name = next(name for name in head_names(kept.origin) if name.endswith("weight"))
    assert not torch.equal(kept.module.state_dict()[name], anew.module.state_dict()[name])


def test_an_output_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    """class_index may not name an output beyond the head."""
    with pytest.raises(ModelError, match=r"has 6 outputs, the data names output 6 \('six'\)"):
        load({**SMALL, "checkpoint": saved(tmp_path, SMALL, 6)}, None, {6: "six"})


def test_colour_weights_on_grey_images_compute_the_same(tmp_path: Path) -> None:
    """The first layer's three channels are summed: a grey image gives what it gave as three equal channels."""
    seen = 0
    for source in (
        SMALL,
        {"source": "torchvision", "name": "mobilenet_v2", "input": {"size": 32}},
        {"source": "edgecnn", "name": "simple_cnn"},
    ):
        path = saved(tmp_path, source, 4)
        colour, grey = load({**source, "checkpoint": path}), load({**source, "checkpoint": path, "in_chans": 1})
        x = torch.rand(2, 1, 32, 32)
        assert torch.allclose(colour.module(x.expand(2, 3, 32, 32)), grey.module(x), atol=1e-4)
        seen += 1
    assert seen == 3


def test_another_architecture_is_named_where_it_is_likely(tmp_path: Path) -> None:
    """A checkpoint of the other zoo's model of the same name is recognised, and the two settings to change are given."""
    path = saved(tmp_path, {"source": "torchvision", "name": "mobilenet_v2"}, 4)
    with pytest.raises(ModelError, match=r"does not fit timm mobilenetv2_100: .* source: torchvision, name: mobilenet_v2\.$"):
        load({"source": "timm", "name": "mobilenetv2_100", "checkpoint": path})
    wide = saved(tmp_path, {"source": "timm", "name": "mobilenetv3_small_075"}, 4, "mobilenetv3_small_075_best.safetensors")
    with pytest.raises(ModelError, match=r"in the file, .* in the model.*It fits timm's mobilenetv3_small_075"):
        load({**SMALL, "checkpoint": wide})


def test_densenets_old_names_are_read(tmp_path: Path) -> None:
    """torchvision's DenseNet files call their layers norm.1 and conv.2; they load."""
    source = {"source": "torchvision", "name": "densenet121", "input": {"size": 32}}
    model = load(source)
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor for name, tensor in model.module.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    again = load({**source, "checkpoint": str(tmp_path / "w.pth")})
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.module(x), again.module(x))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_models_that_ask_for_a_file_version_load_from_both_formats(tmp_path: Path, suffix: str) -> None:
    """MnasNet refuses state dicts without torch's version metadata, which safetensors has not; both formats load all the same."""
    source = {"source": "torchvision", "name": "mnasnet0_5", "input": {"size": 32}}
    state, path = load(source).module.state_dict(), tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert load({**source, "checkpoint": str(path)}).origin["head"] == "kept"


def test_an_input_that_the_model_cannot_take_is_refused() -> None:
    """Too few pixels end in one line that names the key to change."""
    with pytest.raises(ModelError, match=r"cannot take an input of 3 x 8 x 8 .*model\.input\.size"):
        load({"source": "torchvision", "name": "alexnet", "input": {"size": 8}})
    with pytest.raises(ModelError, match="too small"):
        load({"source": "edgecnn", "name": "simple_cnn", "input": {"size": 3}})


# ---- names ----


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("timm", "mobilnetv2_35", "nearest: mobilenetv2_035"),
        ("timm", "MobileNetV3-Small-100", "nearest: mobilenetv3_small_100"),
        ("timm", "mobilenet_v2", "mobilenet_v2 in torchvision: set source: torchvision"),
        ("torchvision", "mobilenetv2_100", "mobilenetv2_100 in timm: set source: timm"),
        ("torchvision", "resnet-18", "nearest: resnet18"),
        ("timm", "qqqqqqqq", "edgecnn models PATTERN"),
        ("timm", "mobilenetv3_small_100.lamb", r"it has mobilenetv3_small_100\.lamb_in1k"),
        ("timm", "hf-hub:someone/something", "has no model"),
        ("timm", "local-dir:/tmp", "has no model"),
        ("torchvision", "fasterrcnn_resnet50_fpn", "has no model"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(source: str, name: str, says: str) -> None:
    """Misspelt, of the other zoo, with a wrong tag, or not a classification model: the message helps on."""
    with pytest.raises(ModelError, match=says):
        load({"source": source, "name": name})


def test_search_finds_both_zoos_with_true_counts() -> None:
    """Names match as part or pattern, in any case; parameters and MACs are the published ones."""
    found = {(f.source, f.name): f for f in find_models("MobileNet*v2*", 40)}
    theirs, timms = found["torchvision", "mobilenet_v2"], found["timm", "mobilenetv2_100"]
    assert theirs.parameters == timms.parameters == 3_504_872
    assert theirs.macs == timms.macs == 300_774_272
    assert theirs.input == (3, 224, 224)
    assert theirs.pretrained
    assert not found["timm", "mobilenetv2_035"].pretrained
    assert find_models("resnet18", 1)[0].name == "resnet18"
    assert len(find_models("resnet", 3)) == 3
    assert find_models("no such model") == []
    regnet = find_models("regnet_x_400mf", 1)[0]  # cannot be built without memory
    assert regnet.macs is not None
    assert 0.4e9 < regnet.macs < 0.45e9


# ---- published weights ----


@pytest.mark.parametrize(
    "settings", [{"source": "timm", "name": "mobilenetv3_small_050"}, {"source": "torchvision", "name": "mobilenet_v3_small"}]
)
def test_a_failed_download_says_what_to_give_instead(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no way to the network, one line says so and offers checkpoint:."""
    import socket

    from huggingface_hub import constants

    def cut(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", cut)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ModelError, match=rf"published weights of {settings['source']} .* could not be downloaded .*give checkpoint:"
    ) as fault:
        load({**settings, "pretrained": True})
    assert "\n" not in str(fault.value)


def test_weights_that_were_downloaded_before_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the hub's or torch's cache is used as it is; its head is kept or replaced like a checkpoint's."""
    import socket

    import timm
    from huggingface_hub import constants

    def cut(*_: Any, **__: Any) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", cut)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--timm--mobilenetv3_small_050.lamb_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    published = timm.create_model("mobilenetv3_small_050")
    save_file(published.state_dict(), snapshot / "model.safetensors")
    model = load({**SMALL, "pretrained": True})
    assert torch.equal(model.module.state_dict()["conv_stem.weight"], published.state_dict()["conv_stem.weight"])
    assert (len(model.labels), model.origin["head"], model.origin["weights"]) == (
        4,
        "new",
        {"published": "mobilenetv3_small_050.lamb_in1k"},
    )
    whole = load({**SMALL, "pretrained": True}, None, {3: "cat"}, trains=False)
    assert (len(whole.labels), whole.labels[3]) == (1000, "cat")

    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    theirs = squeezenet1_1()
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name)
    ours = load({"source": "torchvision", "name": "squeezenet1_1", "pretrained": True}, None, {}, trains=False)
    x = torch.rand(1, 3, 224, 224)
    assert torch.equal(ours.module(x), theirs.eval()(x))


def test_a_model_without_published_weights_says_so() -> None:
    """pretrained: true of an architecture nobody published is refused, not trained from scratch."""
    with pytest.raises(ModelError, match="has no published weights"):
        load({"source": "timm", "name": "mobilenetv2_035", "pretrained": True})


# ---- the user's own code ----

OWN = """
    from torch import nn

    def plain(num_classes, in_chans=3):
        return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    def fixed():
        return plain(7)

    def free(**settings):
        return plain(settings["num_classes"], settings["in_chans"])

    def broken():
        return 1 / 0

    def number():
        return 3

    def two(num_classes):
        class Two(nn.Module):
            def forward(self, x):
                return x, x
        return Two()
"""
PIXELS = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of the user's in the current folder; returns its name, another one for every test."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    return name


def test_users_code_is_called_with_what_it_takes(own: str) -> None:
    """num_classes and in_chans are given where the function takes them; a checkpoint and its head work as elsewhere."""
    for function in ("plain", "free"):
        settings = {"source": "python", "entry": f"{own}:{function}", "input": PIXELS}
        model = load(settings)
        assert model.module(torch.rand(1, 3, 16, 16)).shape == (1, 4)
        path = saved(Path.cwd(), settings, 6)
        assert load({**settings, "checkpoint": path}).origin["head"] == "new"
        assert len(load({**settings, "checkpoint": path}, None, {}).labels) == 6
    grey = {"source": "python", "entry": f"{own}:plain", "in_chans": 1, "input": {"size": 16, "mean": [0.5], "std": [0.5]}}
    assert load(grey).module(torch.rand(1, 1, 16, 16)).shape == (1, 4)
    assert len(load({"source": "python", "entry": f"{own}:fixed", "input": PIXELS}, None, {}).labels) == 7


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("fixed", "has 7 outputs, the data has 4 classes"),
        ("broken", r"failed at .*\.py:\d+ \(ZeroDivisionError"),
        ("number", "returned int, not a torch.nn.Module"),
        ("two", "returns tuple for 2 images"),
        ("plian", "has no function 'plian'; nearest: plain"),
    ],
)
def test_faults_in_users_code_are_one_line(own: str, function: str, says: str) -> None:
    """What the user's code does wrong is said in one line that names the place."""
    with pytest.raises(ModelError, match=says) as fault:
        load({"source": "python", "entry": f"{own}:{function}", "input": PIXELS})
    assert "\n" not in str(fault.value)


def test_users_code_that_is_not_there() -> None:
    """A module that cannot be found is named with the folder that was searched; preprocessing must be given."""
    with pytest.raises(ModelError, match="no module 'not_there'"):
        load({"source": "python", "entry": "not_there:f", "input": PIXELS})
    with pytest.raises(ValidationError, match=r"give input\.size, input\.std"):
        RECIPE.validate_python({"source": "python", "entry": "a:b", "input": {"mean": [0.5] * 3}})


# ---- the key ----


def test_the_digest_follows_what_decides_the_model(tmp_path: Path, own: str) -> None:
    """Settings, the checkpoint's content and the user's code change the digest; where the checkpoint lies does not."""

    def digest(settings: dict[str, Any]) -> str:
        return json.dumps(model_digest(RECIPE.validate_python(settings)), sort_keys=True)

    (tmp_path / "a.pt").write_bytes(b"one")
    (tmp_path / "b.pt").write_bytes(b"one")
    (tmp_path / "c.pt").write_bytes(b"two")
    a, b, c = (digest({**SMALL, "checkpoint": str(tmp_path / f"{name}.pt")}) for name in "abc")
    assert a == b
    assert len({a, c, digest(SMALL), digest({**SMALL, "in_chans": 1}), digest({**SMALL, "input": {"size": 48}})}) == 5
    python = {"source": "python", "entry": f"{own}:plain", "input": PIXELS}
    before = digest(python)
    assert before == digest(python)
    (tmp_path / f"{own}.py").write_text("def plain(): ...\n")
    assert before != digest(python)
    with pytest.raises(ModelError, match="no such file"):
        digest({**SMALL, "checkpoint": str(tmp_path / "none.pt")})


# ---- real checkpoints ----


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no measuring data beside the checkout (../shared/models)")
def test_real_checkpoints_load_with_their_own_heads() -> None:
    """The published torchvision file and five CIFAR-10 safetensors files load untrained, head kept."""
    files = sorted(SHARED.glob("*_cifar10_64px.safetensors"))
    for file in files:
        name = file.name.removesuffix("_cifar10_64px.safetensors")
        model = load({"source": "timm", "name": name, "checkpoint": str(file), "input": {"size": 64}}, 10, {}, trains=False)
        assert (len(model.labels), model.origin["head"]) == (10, "kept")
    assert len(files) == 5
    settings = {"source": "torchvision", "name": "mobilenet_v2", "checkpoint": str(SHARED / "mobilenet_v2_imagenet.pth")}
    assert len(load(settings, None, {0: "tench"}, trains=False).labels) == 1000
    with pytest.raises(ModelError, match="set source: torchvision, name: mobilenet_v2"):
        load({**settings, "source": "timm", "name": "mobilenetv2_100"})
