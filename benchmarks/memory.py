"""How much memory this process has, as far as its system tells."""

from __future__ import annotations

import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")


def peak_mb() -> float:
    """Return the most memory this process ever had; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0.0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)


def resident_mb() -> float:
    """Return the memory this process has now, where the system tells; else the most it ever had."""
    if sys.platform == "win32":
        return 0.0
    import resource

    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return peak_mb()
