"""Meters of energy and power that this machine really has: RAPL, hwmon sensors, a Jetson's INA3221 rails.

A meter that cannot be read gives None; nothing is estimated from a data sheet. Files and units are those of the
kernel's documentation (power/powercap, hwmon/sysfs-interface, hwmon/ina3221).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


def meters(root: Path = ROOT) -> list[Meter]:
    """All meters of this machine, readable or not."""
    return [*rapl(root), *hwmon(root)]


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
