"""Reads `/proc/PID/stat`. Imports almost nothing, since the watchdog must start fast."""

from pathlib import Path


def stat_of(process_id: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` from the process's state on; empty if there is no such process.

    Source: proc(5); the state is the third field, so field N is at index N - 3.
    """
    try:
        return Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
