"""How much memory there is to use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

# Limit, use, statistics, and the statistic of cached file pages that count as used but are given up on demand: without
# it, reading the checkpoints would shrink what is available.
CONTROL_GROUPS = (
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
        "inactive_file",
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def available(device: torch.device) -> int:
    """Return the bytes that can be allocated on a device now; on the CPU within the control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_host_available()]
    for limit, used, statistics, reclaimable in CONTROL_GROUPS:
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
        limits[-1] += _field(Path(statistics), reclaimable)
    return max(0, min(limits))


def _field(statistics: Path, name: str) -> int:
    """Return the number after a name in a control group's memory.stat, 0 if there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in statistics.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _host_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def readable(nbytes: float) -> str:
    """Format bytes for people: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
