"""How much memory this process may still take: what the machine has free, and what its cgroups allow. Linux only."""

from collections.abc import Iterator
from pathlib import Path

# Names of limit, usage and reclaimable page cache, in cgroups of version 2 and of version 1.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the system does not say. `root` is where /proc and /sys lie."""
    rooms = [*_machine(root), *_cgroups(root)]
    return max(0, min(rooms)) if rooms else None


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _cgroups(root: Path) -> Iterator[int]:
    """What is left under each limit, from the process's own group to the outermost that is visible."""
    top = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _levels(top, path, V2)
        elif "memory" in controllers.split(","):
            yield from _levels(top / "memory", path, V1)


def _levels(top: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """In a container the path may be the host's, of which only the end of the tree, as its top, is visible."""
    inner = top / path.lstrip("/")
    for level in (inner, *inner.parents):
        if level.is_relative_to(top) and (room := _room(level, *names)) is not None:
            yield room


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Page cache that can be dropped at once counts as free, as for Kubernetes."""
    limit, usage = _lines(group / limit_name), _lines(group / usage_name)
    if not limit or not usage or limit[0] == "max":
        return None
    cache = (int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[0] == cache_name)
    return int(limit[0]) - int(usage[0]) + next(cache, 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().split("\n")[:-1]
    except OSError:
        return []
