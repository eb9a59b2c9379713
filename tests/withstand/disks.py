"""What tests do to a disk."""

import os


def fill(folder):
    """Leave not one byte free."""
    with (folder / "filler").open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    assert os.statvfs(folder).f_bavail == 0
