"""How much memory is at hand, and the error that says so before a large tensor is made."""

from typing import Any

from mambascope.errors import CacheError, InputError

__all__ = ["available_bytes", "human", "require_bytes"]


def human(n: float) -> str:
    """``1536`` -> ``"1.5 KB"``; powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _meminfo() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _cgroup() -> int | None:
    """What a container's own limit leaves (cgroup v2); None where there is no limit."""
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            most = limit.read().strip()
            return None if most == "max" else max(0, int(most) - int(used.read()))
    except (OSError, ValueError):
        return None


def _cached_bytes(device: Any) -> int:
    """What torch's allocator holds of a GPU's memory without using it."""
    import torch

    stats = torch.cuda.memory_stats_as_nested_dict(device)  # memory_reserved() and the like sort all of it each time
    if not stats:
        return 0
    return stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"]


def available_bytes(device: Any) -> int | None:
    """Bytes that can still be allocated on a torch device; None where the system does not tell."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _cached_bytes(device)
    if device.type != "cpu":
        return None
    known = [n for n in (_meminfo(), _cgroup()) if n is not None]
    return min(known) if known else None


def require_bytes(need: int, device: Any, what: str, way_out: str, error: type[InputError] | type[CacheError]) -> None:
    """Raise ``error`` if ``what`` needs more memory than is at hand: its size, the limit and the way out."""
    if need < 64_000_000:  # asking the system costs more than such a tensor
        return
    if str(device).startswith("cuda") and need < _cached_bytes(device):  # and the driver need not be asked
        return
    limit = available_bytes(device)
    if limit is not None and need > limit:
        raise error(f"{what} would take {human(need)} on {device}, where {human(limit)} are available; {way_out}")
