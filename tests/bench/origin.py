"""Which commit a benchmark measures."""

import os
import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str:
    """``BENCH_COMMIT`` if it is set (a copy without git), else git's word, else "unknown"."""
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
