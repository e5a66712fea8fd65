"""Threads follow the CPU quota of the process's control groups, of versions 1 and 2, nested, and in a container."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dmformer import procfs
from dmformer.machine import describe_machine, usable_cores

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for mount points, and a process on eight cores with no control group yet."""
    monkeypatch.setattr(procfs, "_SELF", tmp_path / "self")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "self").mkdir()
    return tmp_path


def put(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text + "\n")


def describe(system: Path, cgroup: str, *mounts: tuple[str, str, str, str]) -> None:
    lines = [f"31 23 0:28 {root} {point} rw - {kind} {kind} {options}" for root, point, kind, options in mounts]
    put(system / "self", cgroup=cgroup, mountinfo="\n".join(lines))


@pytest.mark.parametrize(
    ("own", "above", "top", "quota", "cores"),
    [
        ("50000 100000", "max 100000", None, 0.5, 1),
        ("max 100000", "250000 100000", None, 2.5, 2),
        ("400000 100000", "300000 100000", "max 100000", 3.0, 3),
        ("1600000 100000", "max 100000", None, 16.0, 8),
        ("max 100000", "max 100000", None, None, 8),
    ],
)
def test_version_2_the_least_of_all_levels(
    system: Path, own: str, above: str, top: str | None, quota: float | None, cores: int
) -> None:
    point = system / "cgroup"
    describe(system, "0::/service.slice/own.service", ("/", str(point), "cgroup2", "rw"))
    put(point / "service.slice/own.service", cpu__max=own)
    put(point / "service.slice", cpu__max=above)
    put(point, **({} if top is None else {"cpu__max": top}))
    assert (procfs.cpu_quota(), usable_cores()) == (quota, cores)
    assert describe_machine()["cpu_quota_cores"] == quota


@pytest.mark.parametrize(
    ("path", "root"), [("/a/b", "/"), ("/docker/1", "/docker/1"), ("/host/1", "/docker/2"), ("/../x", "/")]
)
def test_version_1_and_what_a_container_sees(system: Path, path: str, root: str) -> None:
    point = system / "cpu,cpu acct"
    mounted = str(point).replace(" ", r"\040")
    describe(
        system,
        f"4:cpuset:/elsewhere\n3:cpu,cpuacct:{path}\n0::/",
        (root, mounted, "cgroup", "rw,cpu,cpuacct"),
        ("/", str(system / "cpuset"), "cgroup", "rw,cpuset"),
    )
    put(point, cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    put(point / "a/b", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    put(system / "cpuset/elsewhere", cpu__cfs_quota_us="1", cpu__cfs_period_us="100000")
    assert procfs.cpu_quota() == 3.0


def test_what_the_kernel_counted_as_throttled(system: Path) -> None:
    describe(
        system, "0::/a\n1:cpu:/b", ("/", str(system / "2"), "cgroup2", "rw"), ("/", str(system / "1"), "cgroup", "cpu")
    )
    put(system / "2/a", cpu__stat="usage_usec 5\nnr_throttled 2\nthrottled_usec 3000")
    put(system / "1/b", cpu__stat="nr_throttled 1\nthrottled_time 4000000")
    assert procfs.throttled_ms() == pytest.approx(7.0)


def test_a_system_without_control_groups(system: Path) -> None:
    assert (procfs.cpu_quota(), procfs.throttled_ms(), procfs.mounts(), usable_cores()) == (None, 0.0, [], 8)
