"""What Linux tells a process about itself below ``/proc`` and ``/sys``: its mounts, and its control groups' CPU time.

Elsewhere there are no such files, and so no mounts and no quota. Formats: proc(5), cgroups(7), and the kernel's
``cgroup-v2.rst`` and ``sched-bwc.rst``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SELF = Path("/proc/self")
_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Mount:
    """One mount: the folder of the file system that is seen, where it is seen, the system's kind and its options."""

    root: str
    point: str
    kind: str
    options: frozenset[str]


def mounts() -> list[Mount]:
    """Return the mounts that this process sees."""
    found = []
    for line in (read_text(_SELF / "mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        place, system = before.split(), after.split()
        if len(place) >= 5 and len(system) >= 3:
            root, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name) for name in place[3:5])
            found.append(Mount(root, point, system[0], frozenset(system[2].split(","))))
    return found


def is_mount_point(path: Path) -> bool:
    """Return whether a path is a mount's, which can be neither renamed nor removed; bind mounts and files too."""
    resolved = os.path.realpath(path)
    return os.path.ismount(resolved) or any(mount.point == resolved for mount in mounts())


def cpu_quota() -> float | None:
    """Return how many cores' worth of time the control groups allow, the least of all levels; ``None`` without a bound.

    A process that has used it up is put to sleep for the rest of the period, which shows as latencies of tens of
    milliseconds now and then.
    """
    return min((quota for group in _control_groups("cpu") if (quota := _quota_of(group)) is not None), default=None)


def _quota_of(group: Path) -> float | None:
    words = (read_text(group / "cpu.max") or "").split()  # version 2: both in one file, or "max"
    words = words or [read_text(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):  # version 1 has -1 for no bound
        return int(words[0]) / int(words[1])
    return None


def throttled_ms() -> float:
    """Return for how long the kernel has held the control groups back for their quotas so far, all levels together."""
    total = 0.0
    for group in _control_groups("cpu"):
        pairs = (line.split() for line in (read_text(group / "cpu.stat") or "").splitlines())
        counts = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
        total += counts.get("throttled_usec", 0) / 1e3 + counts.get("throttled_time", 0) / 1e6  # versions 2 and 1
    return total


def _control_groups(controller: str) -> Iterator[Path]:
    """Give the folders of this process's control groups, of versions 1 and 2, each with those above it."""
    hierarchies = [mount for mount in mounts() if mount.kind in ("cgroup", "cgroup2")]
    for line in (read_text(_SELF / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for mount in hierarchies:
            if (mount.kind == "cgroup2") == (not controllers) and (
                not controllers or {controller} <= mount.options & frozenset(controllers.split(","))
            ):
                folder, point = Path(mount.point, _below(path, mount.root)), Path(mount.point)
                yield folder
                while folder != point:
                    folder = folder.parent
                    yield folder


def _below(path: str, root: str) -> PurePosixPath:
    """Return a group's path below what is mounted; nothing where it lies elsewhere, as containers may see it."""
    try:
        relative = PurePosixPath(path).relative_to(root)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in relative.parts else relative


def read_text(path: Path) -> str | None:
    """Return the text of a file of the kernel's; ``None`` where there is none, or it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return None


class EnergyMeter:
    """Counts the energy that the processor's packages take, by their own counters (RAPL, ``powercap`` in sysfs).

    Systems let root alone read them, as a rule, and virtual machines and boards have none.
    """

    def __init__(self) -> None:
        self._begun = self._counters()

    def joules(self) -> float | None:
        """Return the energy since this object was made, of everything that ran; ``None`` where it cannot be read."""
        now = self._counters()
        if not now or now.keys() != self._begun.keys():
            return None
        return sum((count - self._begun[zone][0]) % (most + 1) for zone, (count, most) in now.items()) / 1e6

    @staticmethod
    def _counters() -> dict[str, tuple[int, int]]:
        """Return the microjoules of each package, and after how many its counter begins again."""
        found = {}
        for zone in sorted(_POWERCAP.glob("intel-rapl:*")):
            if not (read_text(zone / "name") or "").startswith("package"):  # a part of one, or all of a laptop: psys
                continue
            told = [read_text(zone / name) or "" for name in ("energy_uj", "max_energy_range_uj")]
            if not all(text.isdecimal() for text in told):
                return {}
            found[zone.name] = (int(told[0]), int(told[1]))
        return found
