"""The most memory a program ever held: `python -m benchmarks.peak COMMAND ...` prints the bytes.

A program of its own that imports little: the system counts what a process held before it became
another program, so that whoever starts a program from a large process sees his own size.
"""

import os
import subprocess
import sys


def main(command: list[str]) -> int:
    """Run a command to its end and return its exit status."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    sys.stdout.write(f"{usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)}\n")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
