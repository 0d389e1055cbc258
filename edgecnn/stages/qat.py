"""qat: train with the rounding of int8 in place (fake quantization), which wins back what quantization after training loses.

What is trained is what ships: the model is exported, its best post-training ranges are found as the targets find theirs, and the QDQ graph
of each form that the recipe's int8 targets run (uint8 activations for onnxruntime and OpenVINO, symmetric int8 for TensorRT) becomes
a torch module node by node (`edgecnn.fake_quant`). Steps take turns among the forms: one set of weights serves all targets. Batch norm is
folded, its statistics frozen; the scales of activations are learned (LSQ, Esser et al. 2020, arXiv:1902.08153). The loss is
`(1 - alpha) * cross-entropy + alpha * KL to the float model`. Afterwards the weights go back into the float model, and the learned
ranges beside them; each target offers the trained model as a candidate (`-qat`) beside those without training, from the model as it was
before, and the more accurate one ships, measured on the exported files.

When: post-training quantization breaks the promise. Put it last. Cost: epochs x images, about three times a training step, and a forward
pass of the float model. Limits: networks of the operators that `edgecnn.fake_quant` knows; activations per tensor; labelled images.
Sources: Jacob et al. 2018 (arXiv:1712.05877). Libraries: torch's fake quantization kernels, onnxruntime's quantizer for the graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from edgecnn.batches import Augment
from edgecnn.data import pack
from edgecnn.device.evaluate import infer_all
from edgecnn.device.packed import Packed
from edgecnn.device.runtimes.ort import OrtRunner
from edgecnn.device.spec import InputSpec
from edgecnn.errors import ModelError
from edgecnn.folding import layers_of, put_back
from edgecnn.losses import kl_loss
from edgecnn.stages.base import Context, Stage, TorchModel
from edgecnn.targets.base import Source
from edgecnn.targets.calibration import METHODS, collect, ranges
from edgecnn.targets.fit import fit_qdq
from edgecnn.targets.onnx import export_onnx
from edgecnn.targets.qdq import left_in_float, write_qdq
from edgecnn.train import Criterion, Fit, cross_entropy, fit, predict

if TYPE_CHECKING:
    from torch import Tensor

    from edgecnn.fake_quant import FakeQuantized

# A sound simulation and its file differ in images whose classes are nearly tied, by rounding: about one in 300.
APART = 0.05


class Qat(Stage):
    """Train for int8."""

    compresses: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True

    stage: Literal["qat"]
    epochs: int = Field(ge=1, le=100_000, description="Passes over the training images; two or three are usual.")
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the float model as a teacher; the labels get the rest.")
    temperature: float = Field(2.0, gt=0, le=100, description="Softens both predictions before they are compared.")
    batch: int = Field(64, ge=2, description="Images a step.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate, a tenth or less of training's; it falls along a cosine.")
    optimizer: Literal["adamw", "sgd", "nadamw", "lion", "rmsprop"] = Field("adamw", description="timm's optimizer of that name.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    warmup_epochs: float = Field(0.1, ge=0, description="Epochs over which the learning rate rises from a hundredth.")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an exponential moving average of the weights, such as 0.999; left out, none."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the labels' target spread over all classes.")
    augment: Augment = Field(
        "standard", description="none; light: small turns and shifts; standard: random crop and mirroring; strong: and TrivialAugment."
    )

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        from edgecnn.fake_quant import FakeQuantized

        if not ctx.forms:
            raise ModelError("stages: qat: no target takes an int8 graph of ours. Give a target precision: int8, or leave the stage out.")
        graph, calibration = ctx.work / "float.onnx", pack(ctx.data.calibration, model.input, ctx.work / "calibration")
        export_onnx(model, graph)
        layers = layers_of(model.module, model.input.shape, graph)
        if not layers:
            raise ModelError("stages: qat: no layer of the exported graph has the weights of the model's own. Leave the stage out.")
        trained = [name for layer in layers for name in (layer.weight, layer.bias) if name]
        histograms = collect(graph, calibration, model.input)
        source = Source(graph, lambda: graph, model.input, model.labels, calibration, lambda: histograms, ctx.seed)
        files = [ctx.work / f"form-{i}.onnx" for i in range(len(ctx.forms))]
        for (form, runtime), file in zip(ctx.forms.items(), files, strict=True):
            note = fit_qdq(source, file, form, methods=list(METHODS), correct=False, exclude=left_in_float(graph, form))[0]
            ctx.screen.say(f"  {runtime}'s form ({form.activations} activations): starts from {note}")
        simulated = FakeQuantized(graph, files, trained)
        few = ctx.data.choice.subset(range(min(256, len(ctx.data.choice))))
        _compare(simulated, files, pack(few, model.input, ctx.work / "few"), model.input, "before training")

        settings = self.model_dump(mode="json", exclude={"stage"})
        keys = Fit.__dataclass_fields__
        how = Fit(**{key: value for key, value in settings.items() if key in keys}, mixup=0.0, cutmix=0.0, precision="fp32")
        fitted = fit(model.with_module(simulated), how, ctx, self._criterion(model))
        simulated.eval()

        module = copy.deepcopy(model.module)
        put_back(module, layers, dict(zip(trained, (weight.detach() for weight in simulated.weights), strict=True)))
        learned: list[dict[str, Any]] = [
            {"form": asdict(form), "ranges": {**ranges(histograms, "minmax", symmetric=form.symmetric), **simulated.ranges(i)}}
            for i, form in enumerate(ctx.forms)
        ]
        made = replace(model, module=module, origin={**model.origin, "quantized": learned})
        export_onnx(made, ctx.work / "trained.onnx")
        for form, each, file in zip(ctx.forms, learned, files, strict=True):
            write_qdq(ctx.work / "trained.onnx", file, each["ranges"], form, left_in_float(graph, form))
        choice = pack(ctx.data.choice, model.input, ctx.work / "choice-again")
        # The writer widens ranges around additions a little, so what ships is simulated from what was written.
        shipped = FakeQuantized(ctx.work / "trained.onnx", files, trained)
        told = _compare(shipped, files, choice, model.input, "after training")
        notes = [f"best epoch {fitted.epoch} of {self.epochs}: simulated top-1 {fitted.top1:.2%} on the choice images"]
        for (form, runtime), (top1, agreement) in zip(ctx.forms.items(), told, strict=True):
            notes.append(
                f"{runtime}'s form ({form.activations} activations): exported top-1 {top1:.2%} on the {len(choice)} choice images, run in "
                f"onnxruntime; {agreement:.2%} of them with the simulated class"
            )
        for note in notes:
            ctx.screen.say(f"  {note}")
        return replace(made, notes=tuple(notes))

    def _criterion(self, model: TorchModel) -> Criterion:
        """The whole loss, from images, the simulated logits, and labels."""
        teacher = copy.deepcopy(model.module).eval().requires_grad_(False)
        labelled = cross_entropy(self.label_smoothing)

        def loss(x: Tensor, logits: Tensor, target: Tensor) -> Tensor:
            import torch

            from_labels = labelled(x, logits, target)
            if not self.alpha:
                return from_labels
            with torch.no_grad():
                wanted = teacher.to(x.device)(x)
            return (1 - self.alpha) * from_labels + self.alpha * kl_loss(logits, wanted, self.temperature)

        return loss


def _compare(simulated: FakeQuantized, files: Sequence[Path], images: Packed, spec: InputSpec, when: str) -> list[tuple[float, float]]:
    """For each form the exported file's top-1, and the share of images to which simulation and file give the same class.

    Raises:
        ModelError: they differ in more than rounding explains.
    """
    told = []
    for i, file in enumerate(files):
        simulated.form = i
        wanted = predict(simulated, images, spec).argmax(1)
        simulated.form = None
        with OrtRunner(file, threads=1, provider=None, batch=1) as runner:
            found = infer_all(runner, images, spec).argmax(1)
        apart = int((wanted != found).sum())
        if apart > max(2, APART * len(found)):
            raise ModelError(
                f"stages: qat: {when}, the simulated int8 network and its exported file differ on {apart} of {len(found)} images: "
                "training would not train what ships. Leave the stage out, and please report this network."
            )
        told.append((float((found == images.labels).mean()), 1 - apart / len(found)))
    return told
