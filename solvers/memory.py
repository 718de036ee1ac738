"""Peak resident memory of this process, reset at the start of each solve where the system allows it."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Let the peak start anew at the present use (Linux); elsewhere the peak is that of the whole process."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak() -> int:
    """Return the peak resident set in bytes since the last reset."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
