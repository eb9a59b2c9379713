"""Which process is meant: a pid alone may be another program's by now."""

import os
import signal
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_KILLS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))


def mark_of(pid: int) -> str | None:
    """What tells a living process from every other that has had or will have its pid.

    On Linux the boot of this machine and the clock ticks from there to the process's start: no step
    of the wall clock moves either. Elsewhere the creation time that the system keeps.

    Returns:
        None if there is no such process, or it has ended and waits to be collected.
    """
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return _ticks(pid) or f"{process.create_time():.2f}"
    except (psutil.Error, OSError):
        return None


def my_mark() -> str:
    """`mark_of` this very process."""
    mark = mark_of(os.getpid())
    assert mark is not None
    return mark


def _ticks(pid: int) -> str | None:
    """Boot and start ticks. None on systems that do not say them as Linux does."""
    try:
        boot = _BOOT.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    # The name of the program stands in brackets and may hold blanks and brackets itself.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return f"{boot}:{int(fields[19])}"


def out_of_memory_kills() -> int:
    """Processes that the system has ended for want of memory, here and since it started.

    Linux alone counts them: for this machine, and for the group that this process belongs to.
    """
    return sum(_counted(path) for path in _KILLS)


def _counted(path: Path) -> int:
    try:
        words = path.read_text("ascii").split()
    except (OSError, UnicodeDecodeError):
        return 0
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def how_it_ended(status: int | None, *, short_of_memory: bool) -> str:
    """The end of a process that left no words of its own, as the second half of a sentence.

    Args:
        status: Exit status; minus the signal that ended it. None if nobody knows.
        short_of_memory: Whether the system ended processes for want of memory meanwhile.
    """
    if status is None:
        return "ended without a word"
    if status == -signal.SIGKILL:
        if short_of_memory:
            return "was ended by the system, which had no memory left,"
        return "was killed from outside"
    if status < 0:
        names = {int(known): known.name for known in signal.Signals}
        return f"crashed ({names.get(-status, f'signal {-status}')})"
    return f"ended without a word, status {status},"
