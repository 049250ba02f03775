"""How much memory a process may still take, in the files that Linux shows: of the machine and of control groups."""

from pathlib import Path

import pytest

from checkpoints.room import memory

GIB = 1 << 30
STAT = f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\ntotal_inactive_file {3 * GIB}\n"


def linux(root: Path, *groups: str, available: int = 8 * GIB) -> tuple[Path, Path]:
    """/proc and the control groups' mount of a machine."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available >> 10} kB\n")
    (root / "proc" / "self" / "cgroup").write_text("\n".join(groups) + "\n")
    (root / "cgroup").mkdir()
    return root / "proc", root / "cgroup"


def group(folder: Path, limit: int | str, used: int, *, version: int = 2) -> None:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(STAT)


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    """No group, one without a limit, and v1's number for none: MemAvailable."""
    proc, mount = linux(tmp_path, "0::/", "4:memory:/a")
    group(mount, "max", GIB)
    group(mount / "memory" / "a", 9223372036854771712, GIB, version=1)
    assert memory(proc, mount).free == 8 * GIB
    assert "/proc/meminfo" in memory(proc, mount).source


@pytest.mark.parametrize(
    ("line", "folder", "version", "free"),
    [
        ("0::/", "", 2, 3 * GIB),  # of 4 GiB 3 are used, of which 2 are pages of files that nobody uses
        ("0::/user/parity", "user", 2, 3 * GIB),  # a group above
        ("0::/../elsewhere", "", 2, 3 * GIB),  # a container that sees only the mount
        ("0::/x", "unified", 2, 3 * GIB),
        ("7:cpu,memory:/docker/1", "memory", 1, 4 * GIB),  # v1 counts what is below, too: 3 GiB idle
        ("7:memory:/docker/1", "memory/docker/1", 1, 4 * GIB),
    ],
)
def test_idle_pages_of_files_are_free_in_a_control_group(
    tmp_path: Path, line: str, folder: str, version: int, free: int
) -> None:
    """The limit of the process's group, or of one above, less what is used beside idle pages; the source names the group."""
    proc, mount = linux(tmp_path, line)
    group(mount / folder, 4 * GIB, 3 * GIB, version=version)
    now = memory(proc, mount)
    assert (now.free, str(mount / folder) in now.source) == (free, True)


def test_the_smaller_of_two_is_what_is_left(tmp_path: Path) -> None:
    """A machine with less than its group allows; a group that is full leaves nothing, and no negative number."""
    proc, mount = linux(tmp_path, "0::/", available=GIB)
    group(mount, 4 * GIB, 3 * GIB)
    assert memory(proc, mount).free == GIB
    group(mount, GIB, 9 * GIB)
    assert memory(proc, mount).free == 0
    (mount / "memory.stat").unlink()
    assert memory(proc, mount).free == GIB


def test_another_system_has_what_it_has(tmp_path: Path) -> None:
    """Without /proc: the machine's own number."""
    assert memory(tmp_path / "none", tmp_path / "none").free > 0
