"""What a process took: memory that it holds or held, CPU seconds. Imports nothing, so that it can be imported first."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident_bytes(peak: bool = False) -> int:
    """Memory that this process holds now, or the most that it ever held.

    From /proc where there is one: getrusage keeps the peak of the process that was there before exec, which is the
    parent's for a child that has just been started.
    """
    status = Path("/proc/self/status")
    if status.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds() -> float:
    """CPU time of this process so far, of all its threads, in user code and in the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
