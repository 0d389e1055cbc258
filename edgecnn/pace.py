"""Times networks where it counts: on one runtime, of this machine or of a board over ssh."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecnn.device.bench import share, take_turns
from edgecnn.device.bundle import MANIFEST, write_bundle
from edgecnn.device.runtimes import Runner, open_runner
from edgecnn.device.spec import InputSpec, Manifest, read_manifest
from edgecnn.errors import ModelError
from edgecnn.measure import identity_of, in_turns, latencies, place
from edgecnn.networks import first_words
from edgecnn.remote import on
from edgecnn.screen import hushed
from edgecnn.targets.onnx import export_onnx
from edgecnn.torch_model import TorchModel

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Pace:
    """Times fp32 networks, one image at a time.

    Attributes:
        runtime: onnxruntime or openvino.
        threads: of the runtime.
        spec: the networks' input.
        device: the board's address or name; None is this machine.
        seconds: spent on each comparison, half of it for each of the two.
    """

    runtime: str
    threads: int
    spec: InputSpec
    device: str | None = None
    seconds: float = 0.5

    @property
    def where(self) -> str:
        """For people: the machine, the runtime and its threads."""
        return f"{place(self.device)}, {self.runtime}, {self.threads} thread{'s' * (self.threads > 1)}"

    def inputs(self) -> dict[str, Any]:
        """What decides the times, JSON-able."""
        return {"machine": identity_of(self.device), "runtime": self.runtime, "threads": self.threads}

    @contextmanager
    def against(self, whole: nn.Module) -> Iterator[Callable[[nn.Module], float]]:
        """A function that tells what another network takes of the latency of `whole`, the two taking turns.

        Both are exported the quick way: a final check is for `p50`, which uses the export that ships.
        """
        with tempfile.TemporaryDirectory() as work:
            first, second = Path(work) / "whole", Path(work) / "other"
            self._quickly_exported(whole, first)
            with self._in_turns_with(first) as timed:

                def share_of(module: nn.Module) -> float:
                    self._quickly_exported(module, second)
                    return timed(second)

                yield share_of

    def p50(self, models: Mapping[str, TorchModel], *, processes: int, seed: int) -> dict[str, float]:
        """Seconds of each network as it ships, in fresh processes that take turns."""
        with tempfile.TemporaryDirectory() as work:
            bundles = {name: Path(work) / name for name in models}
            for name, model in models.items():
                onnx = Path(work) / f"{name}.onnx"
                export_onnx(model, onnx)
                self._bundle(onnx, bundles[name])
            with on(self.device) as board:
                results = latencies(bundles, threads=self.threads, processes=processes, seconds=0.3, seed=seed, board=board)
        return {name: float(np.median([np.median(result.samples_s) for result in each])) for name, each in results.items()}

    @contextmanager
    def _in_turns_with(self, whole: Path) -> Iterator[Callable[[Path], float]]:
        """A function that tells what another bundle takes of the latency of `whole`."""
        if self.device is None:
            x = np.zeros((1, *self.spec.shape), np.float32)
            with self._open(whole) as runner:

                def here(bundle: Path) -> float:
                    with self._open(bundle) as other:
                        return share(*take_turns([(other, x), (runner, x)], self.seconds))

                yield here
        else:
            with on(self.device) as board:
                yield lambda bundle: in_turns(bundle, whole, threads=self.threads, seconds=self.seconds, board=board)

    def _open(self, bundle: Path) -> Runner:
        return open_runner(bundle, read_manifest(bundle / MANIFEST), threads=self.threads)

    def _quickly_exported(self, module: nn.Module, folder: Path) -> None:
        import torch

        onnx = folder.with_suffix(".onnx")
        try:
            with hushed():
                warnings.simplefilter("ignore", DeprecationWarning)  # of the old exporter, which is the quick one, a line for every width
                torch.onnx.export(module, (torch.zeros(1, *self.spec.shape),), str(onnx), dynamo=False, opset_version=17)
        except Exception as fault:  # the exporter raises whatever its many layers raise
            raise ModelError(f"stages: prune: latency: this network cannot be exported ({first_words(fault)}). Prune by macs.") from None
        self._bundle(onnx, folder)

    def _bundle(self, onnx: Path, folder: Path) -> None:
        """Write a bundle of the file, as the runners and the board's bench want it."""
        options = {"INFERENCE_PRECISION_HINT": "f32"} if self.runtime == "openvino" else {}
        manifest = Manifest(
            name=folder.name,
            runtime=self.runtime,
            precision="fp32",
            candidate="fp32",
            files={"model": "model.onnx"},
            digests={},
            input=self.spec,
            labels=(),
            options=options,
        )
        write_bundle(folder, manifest, {"model.onnx": onnx})
