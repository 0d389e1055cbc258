"""The model a recipe names: from timm, torchvision, edgecnn or the user's own code, with its weights and its preprocessing.

Preprocessing is the one the published weights were evaluated with (timm's pretrained config, torchvision's default weights),
and what the recipe says under `model.input` wins. Two rules where the recipe changes the published setting:

* `size` without `resize`: the shorter side is resized to `size` itself. The published margin (resize 256, cut out 224)
  belongs to photos at the published size; at 32 pixels it would only cut the object's edge off.
* `in_chans: 1`: mean and std are the average of the three channels', and three-channel weights of the first layer are summed,
  which is what a colour model computes on a grey image.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from edgecnn.checkpoint import differences, fit_weights, load_weights
from edgecnn.config import Config
from edgecnn.device.files import sha256_file
from edgecnn.device.spec import Fit, InputSpec, Interpolation
from edgecnn.errors import ModelError
from edgecnn.narrow import record_in
from edgecnn.networks import build, first_words, head_names, here_on_path, skeleton, users_code
from edgecnn.torch_model import TorchModel
from edgecnn.untrusted import read_weights
from edgecnn.zoo import nearest, zoo_names

if TYPE_CHECKING:
    from torch import Tensor, nn

Head = Literal["auto", "keep", "resize"]


class InputConfig(Config):
    """What the recipe changes in the model's own preprocessing."""

    size: int | None = Field(None, ge=1, le=4096, description="Height and width of the input, in pixels.")
    height: int | None = Field(None, ge=1, le=4096, description="Height, where the input is not square; give width too.")
    width: int | None = Field(None, ge=1, le=4096, description="Width, where the input is not square; give height too.")
    resize: int | None = Field(None, ge=1, le=8192, description="The image's shorter side is resized to this before the centre is cut out.")
    fit: Fit | None = Field(None, description="`crop` cuts out the centre; `squash` resizes both sides at once.")
    interpolation: Interpolation | None = None
    mean: list[float] | None = Field(None, description="Subtracted from pixel / 255, one number a channel.")
    std: list[float] | None = Field(None, description="Divided by after the mean, one number a channel.")

    @model_validator(mode="after")
    def _sizes_agree(self) -> InputConfig:
        if self.size is not None and (self.height is not None or self.width is not None):
            raise ValueError("give either size, or height and width")
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or size for a square")
        height, width = self.pixels or (0, 0)
        if self.resize is not None and self.fit != "squash" and self.resize < max(height, width):
            raise ValueError(f"resize {self.resize} is smaller than the input of {height} x {width} that is cut out of it")
        if self.std is not None and any(value <= 0 for value in self.std):
            raise ValueError("every std must be above 0")
        return self

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Height and width, or None where the model's own stay."""
        if self.size is not None:
            return self.size, self.size
        return (self.height, self.width) if self.height is not None and self.width is not None else None


class _Model(Config):
    """What every source has."""

    checkpoint: str | None = Field(None, description="File of weights: .safetensors, or a .pt or .pth state dict.")
    head: Head = Field(
        "auto",
        description="The last layer: `keep` the weights' own, `resize` to the data's classes (then it must be trained), `auto` as needed.",
    )
    in_chans: Literal[1, 3] = Field(3, description="3 for colour, 1 for grey.")
    input: InputConfig | None = Field(None, description="Changes the model's own preprocessing.")

    @model_validator(mode="after")
    def _parts_agree(self) -> _Model:
        for key, values in (("mean", self.input.mean), ("std", self.input.std)) if self.input else ():
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"input.{key} has {len(values)} numbers, in_chans is {self.in_chans}: give one a channel")
        if self.checkpoint is not None and getattr(self, "pretrained", False):
            raise ValueError("pretrained and checkpoint both give the weights: give one of them")
        return self

    @property
    def has_weights(self) -> bool:
        """Whether the model starts from weights that were trained before."""
        return self.checkpoint is not None

    @property
    def title(self) -> str:
        """How messages call the model."""
        raise NotImplementedError

    def architecture(self) -> Architecture:
        """The network without its weights."""
        raise NotImplementedError


class _Zoo(_Model):
    """A published architecture, whose published weights can be downloaded."""

    name: str = Field(min_length=1, max_length=200)
    pretrained: bool = Field(False, description="Download the published weights.")

    @property
    def has_weights(self) -> bool:
        return self.pretrained or self.checkpoint is not None


class TimmModel(_Zoo):
    """A model of timm, by the name timm gives it: `mobilenetv3_small_100`, or with the weights' tag, `mobilenetv3_small_100.lamb_in1k`."""

    source: Literal["timm"]

    @property
    def title(self) -> str:
        return f"timm {self.name}"

    def architecture(self) -> Architecture:
        return _timm(self)


class TorchvisionModel(_Zoo):
    """A classification model of torchvision."""

    source: Literal["torchvision"]
    weights: str | None = Field(
        None,
        description="Which published weights, such as IMAGENET1K_V1: decides preprocessing and download. Default: torchvision's.",
    )

    @property
    def title(self) -> str:
        return f"torchvision {self.name}"

    def architecture(self) -> Architecture:
        return _torchvision(self)


class EdgecnnModel(_Model):
    """A network that edgecnn brings."""

    source: Literal["edgecnn"]
    name: Literal["simple_cnn", "resnet8"] = Field(description="A textbook's two convolutions, or MLPerf Tiny's ResNet-8.")

    @property
    def title(self) -> str:
        return f"edgecnn {self.name}"

    def architecture(self) -> Architecture:
        return _edgecnn(self)


class PythonModel(_Model):
    """Your own code: a function that returns a `torch.nn.Module`.

    It is imported with the current folder on the path, and called with `num_classes=` and `in_chans=` if it takes them.
    """

    source: Literal["python"]
    entry: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="`module:function`.")
    input: InputConfig = Field(description="The preprocessing: size, mean and std at least.")

    @model_validator(mode="after")
    def _input_is_whole(self) -> PythonModel:
        lacking = [key for key, value in (("size", self.input.pixels), ("mean", self.input.mean), ("std", self.input.std)) if value is None]
        if lacking:
            raise ValueError(f"source: python has no preprocessing of its own: give input.{', input.'.join(lacking)}")
        return self

    @property
    def has_weights(self) -> bool:
        return True  # the function may well load its own; only it knows

    @property
    def title(self) -> str:
        return f"python {self.entry}"

    def architecture(self) -> Architecture:
        return _python(self)


ModelConfig = Annotated[TimmModel | TorchvisionModel | EdgecnnModel | PythonModel, Field(discriminator="source")]


@dataclass(frozen=True)
class Architecture:
    """A network without its weights.

    Attributes:
        origin: what `build` needs, JSON-able.
        outputs: of the published weights, or None where nothing is published.
        input: preprocessing, the recipe's changes included.
        published: downloads the published weights, or None where there are none.
        tag: which published weights these are, by the zoo's own name for them.
        renamed: the present name of a tensor of an old file, or None for one that is not used.
    """

    origin: dict[str, Any]
    outputs: int | None
    input: InputSpec
    published: Callable[[], Mapping[str, Tensor]] | None = None
    tag: str = ""
    renamed: Callable[[str], str | None] | None = None


def load_model(config: ModelConfig, outputs: int | None, names: Mapping[int, str], trains: bool) -> TorchModel:
    """Build the model a recipe names and load its weights; random weights come from torch's global generator.

    Args:
        outputs: number of classes of the data, or None where the data names the model's own outputs (a class_index file).
        names: of the outputs the data has; the others are called `class 17`.
        trains: whether a stage will train the model, without which a new head is worth nothing.

    Raises:
        ModelError: unknown name, unusable checkpoint, a head that does not fit the data, an input the model cannot take.
    """
    arch = config.architecture()
    origin = dict(arch.origin)
    weights: Mapping[str, Tensor] | None = None
    if config.checkpoint is not None:
        path = Path(config.checkpoint).expanduser()
        read = read_weights(path)
        weights = read.tensors
        origin["weights"] = {"checkpoint": path.name, "sha256": read.sha256}
        if (record := record_in(path, read.metadata)) is not None:
            origin["pruned"] = record
    elif isinstance(config, TimmModel | TorchvisionModel) and config.pretrained:
        if arch.published is None:
            raise ModelError(
                f"model: {config.title} has no published weights. Set pretrained: false, or give checkpoint: with a file of weights."
            )
        weights = arch.published()
        origin["weights"] = {"published": arch.tag}
    if weights is not None and arch.renamed is not None:
        weights = _renamed(weights, arch.renamed)

    head = head_names(arch.origin) if weights is not None else frozenset()
    own = _outputs_of(weights, head) if weights is not None else arch.outputs
    count, fresh = _head(config, own, outputs, trains)
    origin["num_classes"] = count
    try:
        module = build(origin)
    except (RuntimeError, ValueError, AssertionError, TypeError) as fault:  # such as a transformer whose patches do not divide the size
        shape = " x ".join(map(str, arch.input.shape))
        raise ModelError(
            f"model: {config.title} cannot be built for an input of {shape} ({first_words(fault)}). Change model.input.size."
        ) from None
    if weights is not None:
        if config.in_chans == 1:
            weights = _grey(weights, module)
        skip = head if fresh else frozenset()
        try:
            fit_weights(module, weights, skip, config.title)
        except ModelError as fault:
            raise ModelError(f"model.checkpoint: {fault}{_fitting(config, weights)}") from None
    origin["head"] = "new" if weights is None or (fresh and head) else "kept"
    count = _check_forward(module, arch.input, config.title)
    if outputs is not None and count != outputs:
        raise ModelError(
            f"model: {config.title} has {count} outputs, the data has {outputs} classes. "
            "Set head: resize and a stage that trains, or give data.class_index, which says which output each folder is."
        )
    if names and max(names) >= count:
        raise ModelError(
            f"model: {config.title} has {count} outputs, the data names output {max(names)} ({names[max(names)]!r}). Mend data.class_index."
        )
    return TorchModel(module.eval(), arch.input, tuple(names.get(i, f"class {i}") for i in range(count)), origin)


def model_digest(config: ModelConfig) -> dict[str, Any]:
    """What decides the loaded model, JSON-able: the settings, and the content of the files they name.

    The checkpoint counts by its content, not by where it lies. Of `source: python` the named module's file counts; what it
    imports does not.
    """
    parts: dict[str, Any] = config.model_dump(mode="json", exclude={"checkpoint"})
    if config.checkpoint is not None:
        path = Path(config.checkpoint).expanduser()
        if not path.is_file():
            load_weights(path)  # says what is wrong with it
        parts["checkpoint_sha256"] = sha256_file(path)
    if isinstance(config, PythonModel):
        with here_on_path(), users_code(config.entry):
            spec = importlib.util.find_spec(config.entry.partition(":")[0])
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            parts["code_sha256"] = sha256_file(Path(spec.origin))
    return parts


# ---- the head ----


def _outputs_of(weights: Mapping[str, Tensor], head: frozenset[str]) -> int | None:
    """Number of outputs of the weights' own head; None where they have no head of this name."""
    sizes = [weights[name].shape[0] for name in sorted(head) if name in weights and weights[name].ndim]
    return sizes[0] if sizes else None


def _head(config: ModelConfig, own: int | None, outputs: int | None, trains: bool) -> tuple[int | None, bool]:
    """Number of outputs to build the model with, and whether its head starts anew on top of loaded weights."""
    if not (config.checkpoint is not None or getattr(config, "pretrained", False)):  # all of it is new
        return (own if config.head == "keep" or outputs is None else outputs), False
    if config.head == "keep" or (config.head == "auto" and (outputs is None or outputs == own)):
        return own, False
    if own is None and outputs is not None:  # headless weights, or another architecture's, which the comparison of names will say
        return outputs, trains
    if outputs is None:
        raise ModelError(
            "model.head: resize needs a number of classes, and data.class_index leaves that to the model. Leave one of them out."
        )
    if not trains:
        raise ModelError(
            f"model: the weights of {config.title} have {own} outputs and the data has {outputs} classes; a new head must be trained. "
            "Add a stage that trains, or give data.class_index, which says which output each folder is."
        )
    return outputs, True


def _check_forward(module: nn.Module, spec: InputSpec, title: str) -> int:
    """Run two grey images through the model; returns its number of outputs."""
    import torch

    shape = " x ".join(map(str, spec.shape))
    try:
        with torch.inference_mode():
            logits = module(torch.zeros(2, *spec.shape))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as fault:
        raise ModelError(
            f"model: {title} cannot take an input of {shape} ({first_words(fault)}). Change model.input.size or in_chans."
        ) from None
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[0] != 2 or not logits.shape[1]:
        found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(f"model: {title} returns {found} for 2 images, not one row of logits each. Choose a classification model.")
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"model: {title} returns NaN or infinity for a grey image. Its weights are damaged; take another checkpoint.")
    return int(logits.shape[1])


def _grey(weights: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """Sum a three-channel first convolution over its channels, where the module takes one and the weights take three."""
    changed = {
        name: weights[name].sum(1, keepdim=True)
        for name, tensor in module.state_dict().items()
        if name in weights and tensor.ndim == 4 and tensor.shape[1] == 1 and weights[name].shape == (tensor.shape[0], 3, *tensor.shape[2:])
    }
    return {**weights, **changed} if len(changed) == 1 else weights


# ---- preprocessing ----


def _input(
    config: _Model, height: int, width: int, resize: int, fit: Fit | None, interpolation: str, mean: list[float], std: list[float]
) -> InputSpec:
    """The published preprocessing with the recipe's changes.

    Args:
        fit: None where the published one is none of ours, so that the recipe must choose.
    """
    wish = config.input or InputConfig.model_validate({})
    if wish.pixels is not None and wish.pixels != (height, width):
        height, width = wish.pixels
        resize = max(height, width)
    chosen = wish.fit or fit
    if chosen is None:
        raise ModelError(
            f"model: {config.title} was evaluated with borders around the image or on a squashed and cut one; edgecnn does neither. "
            "Choose model.input.fit: crop or squash."
        )
    resize = wish.resize or resize
    if chosen == "crop" and resize < max(height, width):
        raise ModelError(
            f"model.input.resize: {resize} is smaller than the {height} x {width} cut out of it. Set {max(height, width)} or up."
        )
    chosen_interpolation = wish.interpolation or interpolation
    if chosen_interpolation not in ("nearest", "bilinear", "bicubic", "lanczos"):
        raise ModelError(f"model: {config.title} was published with {chosen_interpolation} interpolation. Set model.input.interpolation.")
    if config.in_chans == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    return InputSpec(
        channels=config.in_chans,
        height=height,
        width=width,
        resize=resize,
        fit=chosen,
        interpolation=chosen_interpolation,  # type: ignore[arg-type]  # checked above
        mean=tuple(wish.mean or mean),
        std=tuple(wish.std or std),
    )


# ---- the sources ----


def _timm(config: TimmModel) -> Architecture:
    import timm

    base, _, tag = config.name.partition(".")
    if not timm.is_model(base):
        raise _unknown("timm", config.name)
    if tag and config.name not in (known := timm.list_pretrained(f"{base}.*")):
        near = ", ".join(difflib.get_close_matches(config.name, known, 5, 0)) or "none"
        raise ModelError(f"model.name: timm's {base} has no weights tagged {tag!r}; it has {near}.")
    published: Any = timm.get_pretrained_cfg(config.name)  # every architecture has one
    _, height, width = published.input_size
    pixels = config.input.pixels if config.input else None
    options: dict[str, Any] = {"img_size": list(pixels)} if pixels and pixels != (height, width) and published.fixed_input_size else {}
    whole = published.crop_pct == 1.0
    fit: Fit | None = {"center": "crop", "squash": "squash" if whole else None}.get(published.crop_mode)
    spec = _input(
        config,
        height,
        width,
        math.floor(max(height, width) / published.crop_pct),
        fit if height == width else None,
        published.interpolation,
        list(published.mean),
        list(published.std),
    )

    def download() -> Mapping[str, Tensor]:
        with _downloading(config.title):
            file = _in_hub_cache(published.hf_hub_id)
            # timm shapes the first layer and the position embedding to the input; the head is ours to choose
            module = timm.create_model(
                config.name, pretrained=True, pretrained_cfg_overlay={"file": file} if file else None, in_chans=config.in_chans, **options
            )
        weights: Mapping[str, Tensor] = module.state_dict()
        return weights

    origin = {"source": "timm", "name": config.name, "in_chans": config.in_chans, "options": options}
    return Architecture(origin, published.num_classes or None, spec, download if published.has_weights else None, f"{base}.{published.tag}")


def _in_hub_cache(repository: str | None) -> str | None:
    """The weights' file, where an earlier run downloaded it; else make sure the hub answers, which otherwise fails a minute later."""
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if repository is None:
        return None
    file = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(file, str):
        return file
    get_session().head(constants.ENDPOINT, timeout=10)
    return None


def _torchvision(config: TorchvisionModel) -> Architecture:
    from torchvision import models

    if config.name not in models.list_models(module=models):
        raise _unknown("torchvision", config.name)
    choices = models.get_model_weights(config.name)
    if config.weights is not None and config.weights not in choices.__members__:
        raise ModelError(f"model.weights: torchvision's {config.name} has no {config.weights!r}; it has {', '.join(choices.__members__)}.")
    weights = choices[config.weights or "DEFAULT"]
    how = weights.transforms()
    mean, std = list(how.mean), list(how.std)
    options: dict[str, Any] = {}
    if config.name in ("googlenet", "inception_v3"):
        # Their published weights turn ImageNet's mean and std into 0.5 inside the model; that belongs into the preprocessing.
        # The extra outputs that help training are left out: they are not in the exported model either.
        mean, std = [0.5] * 3, [0.5] * 3
        options = {"aux_logits": False, "init_weights": True}
    size = how.crop_size[0]
    pixels = config.input.pixels if config.input else None
    if config.name.startswith("vit_") and pixels and pixels != (size, size):
        if pixels[0] != pixels[1]:
            raise ModelError(f"model.input: torchvision's {config.name} takes square images only. Give size.")
        options = {"image_size": pixels[0]}
    elif config.name.startswith("vit_") and size != 224:
        options = {"image_size": size}
    spec = _input(config, size, size, how.resize_size[0], "crop", how.interpolation.value, mean, std)

    def download() -> Mapping[str, Tensor]:
        import torch

        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        if not file.is_file():
            digest = re.search(r"-([0-9a-f]{8,})\.", file.name)
            with _downloading(config.title):
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(weights.url, str(file), hash_prefix=digest and digest[1], progress=False)
        return load_weights(file)

    origin = {"source": "torchvision", "name": config.name, "in_chans": config.in_chans, "options": options}
    return Architecture(origin, len(weights.meta["categories"]), spec, download, weights.name, _torchvision_name)


def _torchvision_name(name: str) -> str | None:
    """The present name of a tensor of a published file: DenseNet's were `norm.1` for `norm1`; extra training outputs are not used."""
    if name.startswith(("aux1.", "aux2.", "AuxLogits.")):
        return None
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _edgecnn(config: EdgecnnModel) -> Architecture:
    spec = _input(config, 32, 32, 32, "crop", "bilinear", [0.5] * 3, [0.5] * 3)
    if min(spec.height, spec.width) < 4:
        raise ModelError(
            f"model.input: {config.title} halves its input twice; {spec.height} x {spec.width} is too small. Give 4 pixels or more."
        )
    # Only simple_cnn's first layer of units has a size that follows the image's.
    options = {"height": spec.height, "width": spec.width} if config.name == "simple_cnn" else {}
    origin = {"source": "edgecnn", "name": config.name, "in_chans": config.in_chans, "options": options}
    return Architecture(origin, None, spec)


def _python(config: PythonModel) -> Architecture:
    height, width = config.input.pixels or (0, 0)  # the recipe was checked to give them, and mean and std
    spec = _input(config, height, width, max(height, width), "crop", "bilinear", config.input.mean or [], config.input.std or [])
    return Architecture({"source": "python", "name": config.entry, "in_chans": config.in_chans, "options": {}}, None, spec)


@contextmanager
def _downloading(title: str) -> Iterator[None]:
    """Turn a failed download into one line. The model itself was found before, so what fails here is the download."""
    try:
        yield
    except Exception as fault:
        raise ModelError(
            f"model.pretrained: the published weights of {title} could not be downloaded ({type(fault).__name__}: {first_words(fault)}). "
            "Connect this computer, or give checkpoint: with a file of weights that you have."
        ) from None


def _renamed(weights: Mapping[str, Tensor], present: Callable[[str], str | None]) -> Mapping[str, Tensor]:
    new = type(weights)() if hasattr(weights, "_metadata") else {}
    if hasattr(weights, "_metadata"):
        new._metadata = weights._metadata  # type: ignore[attr-defined]
    new.update({after: tensor for name, tensor in weights.items() if (after := present(name)) is not None})  # type: ignore[attr-defined]
    return new


def _unknown(source: str, name: str) -> ModelError:
    zoo = zoo_names()
    near = nearest(name, zoo[source], 5)
    message = f"model.name: {source} has no model {name!r}" + (f"; nearest: {', '.join(near)}." if near else ".")
    for other in zoo:
        if other != source and (there := next((key for key in zoo[other] if key == name.partition(".")[0]), None)):
            return ModelError(f"{message} There is {there} in {other}: set source: {other}.")
    return ModelError(f"{message} `edgecnn models PATTERN` searches both zoos.")


def _fitting(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """Another model whose names and shapes the weights have, as a sentence, or "". Looks at a few likely ones only."""
    if not isinstance(config, TimmModel | TorchvisionModel):
        return ""
    stem = re.sub(r"[^a-z0-9]", "", Path(config.checkpoint or "").name.lower())
    for source, names in zoo_names().items():
        in_file = [key for key in names if len(key) > 5 and stem.startswith(re.sub(r"[^a-z0-9]", "", key))]
        likely = [*sorted(in_file, key=len, reverse=True)[:3], *nearest(config.name, names, 5)]
        for name in dict.fromkeys(likely):
            if (source, name) == (config.source, config.name):
                continue
            module = skeleton({"source": source, "name": name, "in_chans": config.in_chans, "options": {}})
            head = head_names({"source": source, "name": name, "in_chans": config.in_chans, "options": {}})
            if not differences(module, weights, head):
                return f" It fits {source}'s {name}: set source: {source}, name: {name}."
    return ""
