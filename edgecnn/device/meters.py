"""Meters of energy and power that this machine really has: RAPL, hwmon sensors, a Jetson's INA3221 rails, NVIDIA's NVML.

A meter that cannot be read gives None; nothing is estimated from a data sheet. Files and units are those of the
kernel's documentation (power/powercap, hwmon/sysfs-interface, hwmon/ina3221).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from edgecnn.device import nvml

IDLE_S = 2.0  # the idle level is taken that long, before the work
SAMPLE_S = 0.05  # between readings of power: most sensors average over tens of milliseconds

# What works stands out by so many standard errors of the means, each of at least so many intervals.
STANDS_OUT = 4.0
LEAST_INTERVALS = 4

ROOT = Path("/")


@dataclass(frozen=True)
class Meter:
    """One quantity that the hardware measures.

    Attributes:
        name: what is measured, such as "RAPL package-0" or "INA3221 VDD_IN".
        kind: energy counts up, in J; power is of this moment, in W.
        files: their product times `scale` is the value.
        wraps_j: where an energy counter starts again from 0; 0 where the kernel does not say.
    """

    name: str
    kind: Literal["energy", "power"]
    files: tuple[Path, ...]
    scale: float
    wraps_j: float = 0.0

    def read(self) -> float | None:
        """Joules or watts now; None where the files are not readable (RAPL is often root's alone)."""
        value = self.scale
        for path in self.files:
            number = _number(path)
            if number is None:
                return None
            value *= number
        return value

    def spent_j(self, before: float, after: float) -> float | None:
        """Energy between two readings of an energy counter that started again at most once; None where that cannot be told."""
        if after >= before:
            return after - before
        return after - before + self.wraps_j if self.wraps_j else None

    def watts(self, before: float | None, after: float | None, seconds: float) -> float | None:
        """Power between two readings; None where it cannot be told."""
        if before is None or after is None or self.kind == "power":
            return after if self.kind == "power" else None
        joules = self.spent_j(before, after)
        return None if joules is None else joules / seconds


@dataclass(frozen=True)
class GpuMeter(Meter):
    """NVML's counter of energy, or where the GPU has none its power."""

    gpu: nvml.Gpu | None = None

    def read(self) -> float | None:
        """Joules or watts now."""
        if self.gpu is None:
            return None
        return self.gpu.energy_j() if self.kind == "energy" else self.gpu.power_w()


@dataclass(frozen=True)
class Energy:
    """What one meter saw.

    Attributes:
        source: the meter's name.
        idle_w: before the work, with the model loaded.
        working_w: while it inferred without pause.
        per_inference_j: (working - idle) times the seconds of one call; None where the work does not stand out from the idle level.
    """

    source: str
    idle_w: float
    working_w: float
    per_inference_j: float | None


def measure_energy(
    call: Callable[[], object],
    seconds: float,
    found: Sequence[Meter],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Energy]:
    """Energy of one `call`, by every meter that can be read, above what the machine takes when it does nothing.

    Not while latencies are taken: reading a sensor takes time. A package and its cores are two entries; do not add them.
    """
    readable = [meter for meter in found if meter.read() is not None]
    if not readable:
        return []

    def watts(work: Callable[[], object], seconds: float) -> tuple[list[list[float]], float]:
        """Power by meter, once in each interval, while `work` is repeated for `seconds`, and the seconds of one `work`."""
        powers: list[list[float]] = [[] for _ in readable]
        start = sampled = clock()
        before = [meter.read() for meter in readable]
        calls, spent = 0, 0.0
        while clock() - start < seconds or calls < LEAST_INTERVALS:
            begun = clock()
            work()
            spent += clock() - begun
            calls += 1
            if (now := clock()) - sampled >= SAMPLE_S:
                after = [meter.read() for meter in readable]
                for power, meter, old, new in zip(powers, readable, before, after, strict=True):
                    if (watt := meter.watts(old, new, now - sampled)) is not None:
                        power.append(watt)
                sampled, before = now, after
        return powers, spent / calls

    idle, _ = watts(lambda: sleep(SAMPLE_S), IDLE_S)
    working, call_s = watts(call, max(seconds, IDLE_S))
    told = []
    for meter, low, high in zip(readable, idle, working, strict=True):
        if low and high:
            idle_w, working_w = fmean(low), fmean(high)
            out = working_w - idle_w > STANDS_OUT * math.hypot(_standard_error(low), _standard_error(high))
            told.append(Energy(meter.name, idle_w, working_w, (working_w - idle_w) * call_s if out else None))
    return told


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) >= LEAST_INTERVALS else math.inf


def meters(root: Path = ROOT) -> list[Meter]:
    """All meters of this machine, readable or not, with names that tell them apart."""
    found = [*rapl(root), *hwmon(root), *(gpu_meters() if root == ROOT else [])]
    names = [meter.name for meter in found]
    return [replace(m, name=f"{m.name} #{names[: i + 1].count(m.name)}") if names.count(m.name) > 1 else m for i, m in enumerate(found)]


def why_none(found: Sequence[Meter]) -> str:
    """Why nothing was measured with these meters, none of which could be read."""
    if not found:
        return "this machine has none of the meters that edgecnn reads: RAPL, hwmon sensors, INA3221 rails, NVML"
    return f"{', '.join(meter.name for meter in found)}: there, and cannot be read; RAPL is often root's alone"


def gpu_meters() -> list[Meter]:
    """One for each NVIDIA GPU: the counter where it has one, else power."""
    return [GpuMeter(f"NVML {g.name}", "power" if g.energy_j() is None else "energy", (), 1.0, gpu=g) for g in nvml.gpus()]


def rapl(root: Path = ROOT) -> list[Meter]:
    """The CPU's own energy counters: packages, and their cores, DRAM and so on, which are parts of the package or beside it."""
    found = []
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        parent = zone.parent / zone.name.rpartition(":")[0]
        name = _text(zone / "name")
        if name is None or not (zone / "energy_uj").exists():
            continue
        within = f"{_text(parent / 'name')} " if zone.name.count(":") > 1 else ""
        wraps_j = (_number(zone / "max_energy_range_uj") or 0.0) * 1e-6
        found.append(Meter(f"RAPL {within}{name}", "energy", (zone / "energy_uj",), 1e-6, wraps_j))
    return found


def hwmon(root: Path = ROOT) -> list[Meter]:
    """Energy and power sensors, and voltage times current of an INA3221's channels."""
    found = []
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*"), key=lambda p: (len(p.name), p.name)):
        driver = _text(chip / "name") or chip.name
        for path in sorted(chip.glob("energy*_input")):
            found.append(Meter(f"{driver} {_label(path)}", "energy", (path,), 1e-6))
        for number in sorted({p.name.partition("_")[0] for p in chip.glob("power*_*")}):
            sensors = [p for p in (chip / f"{number}_average", chip / f"{number}_input") if p.exists()]
            found += [Meter(f"{driver} {_label(p)}", "power", (p,), 1e-6) for p in sensors[:1]]
        if driver == "ina3221":
            for volts in sorted(chip.glob("in[1-3]_input")):  # in4 to in6 are the shunts
                amperes = chip / f"curr{volts.name[2]}_input"
                # a channel that nothing is soldered to is switched off: its files answer ENODATA
                if amperes.exists() and _text(chip / f"in{volts.name[2]}_enable") != "0":
                    found.append(Meter(f"INA3221 {_label(volts)}", "power", (volts, amperes), 1e-6))
    return found


def _label(path: Path) -> str:
    number = path.name.partition("_")[0]
    return _text(path.with_name(f"{number}_label")) or number


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
