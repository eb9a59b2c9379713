"""Pictures: decoded and looked at once, kept under the hash of their bytes, named by a reference.

A reference stands where a text stands in a task. It names the bytes and says how the picture looks,
so that repeats are found without opening a file. Knows Pillow, neither tables nor models.
"""

import hashlib
import io
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from chipviz.errors import ChipvizError, SourceError

MAX_BYTES = 64 << 20
"""Maximum bytes of a picture's file."""
MAX_PIXELS = 89_478_485
"""Maximum pixels of a picture. A file of kilobytes may claim any number; Pillow's own limit."""
_TOO_LARGE = f"has more than the {MAX_PIXELS:,} pixels that are read"
MAX_RATIO = 32
"""Maximum ratio of the sides. A processor would enlarge the short one and all the rest with it."""
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
"""Ends of names that are taken for pictures."""
KINDS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""Formats that are read. Pillow knows others, some of which run programs."""
_REFERENCE = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}-\d{1,6}x\d{1,6}")
_IN_TEXT = re.compile(r"[0-9a-f]{50}")


class UnreadableError(ChipvizError):
    """A picture that cannot be read, and why."""

    def __init__(self, why: str) -> None:
        super().__init__(f"This picture {why}.", "Save it again as PNG or JPEG.")
        self.why = why


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures, each once."""

    folder: Path

    def add(self, data: bytes) -> tuple[str, list[str]]:
        """Keep a picture.

        Args:
            data: The bytes of its file.

        Returns:
            Its reference, and what had to be done to read it: see `read`.

        Raises:
            UnreadableError: If it is none.
        """
        picture, done = read(data)
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            part.write_bytes(data)
            part.replace(path)
        return f"{digest}-{_look(picture):016x}-{picture.width}x{picture.height}", done

    def has(self, reference: str) -> bool:
        """Whether a picture is there."""
        return self.file_of(reference).is_file()

    def file_of(self, reference: str) -> Path:
        """Where a picture's bytes lie, if it is there."""
        return self._path(reference.partition("-")[0])

    def data(self, reference: str) -> bytes:
        """The bytes of a picture's file.

        Raises:
            SourceError: If it is not there.
        """
        try:
            return self.file_of(reference).read_bytes()
        except OSError:
            raise SourceError(
                "A picture of this run is gone from the home folder.",
                "Give the same data again; its pictures are kept anew.",
            ) from None

    def open(self, reference: str) -> Image.Image:
        """A picture as RGB, upright.

        Raises:
            SourceError: If it is not there.
        """
        return read(self.data(reference))[0]

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest


def is_reference(text: object) -> bool:
    """Whether a text is what `Pictures.add` returned."""
    return isinstance(text, str) and _REFERENCE.fullmatch(text) is not None


def names_a_reference(text: str) -> bool:
    """Whether a reference, whole or cut short, stands in a text."""
    return _IN_TEXT.search(text) is not None


def size_of(reference: str) -> tuple[int, int]:
    """Width and height, in pixels."""
    width, height = reference.rpartition("-")[2].split("x")
    return int(width), int(height)


PLAIN = "0" * 16
"""Look of a picture in which nothing grows brighter to the right. Such are not alike for that."""


def look_of(reference: str) -> str:
    """What pictures have in common that look alike, whatever their size and compression."""
    return reference.split("-")[1]


def read(data: bytes) -> tuple[Image.Image, list[str]]:
    """Decode a picture: RGB, upright, its first frame.

    Args:
        data: The bytes of its file.

    Returns:
        The picture, and what a reader should know of it: `animated`, `transparent`.

    Raises:
        UnreadableError: If it cannot be read, or would take a computer's memory.
    """
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"has {len(data):,} bytes, at most {MAX_BYTES:,} are read")
    Image.init()  # WEBP and TIFF are not there before
    try:
        picture = Image.open(io.BytesIO(data), formats=KINDS)
        _refuse_size(picture.width, picture.height)
        done = ["animated"] if getattr(picture, "n_frames", 1) > 1 and _moves(picture) else []
        picture.load()
        picture = cast(Image.Image, ImageOps.exif_transpose(picture))
        if picture.has_transparency_data:
            done.append("transparent")
        return _as_rgb(picture), done
    except UnidentifiedImageError:
        raise UnreadableError(f"is none of {', '.join(KINDS)}") from None
    except UnreadableError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableError(_TOO_LARGE) from None
    except Exception as error:  # noqa: BLE001 - decoders raise whatever a broken file leads them to
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise UnreadableError(f"cannot be decoded ({said})") from None


def _moves(picture: Image.Image) -> bool:
    """Whether further frames follow in time. Of JPEG (MPO) and TIFF they are other pictures."""
    return picture.format in ("GIF", "PNG", "WEBP")


def _refuse_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableError(_TOO_LARGE)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UnreadableError(
            f"has {width:,} x {height:,} pixels, and one side may be {MAX_RATIO} times the other"
        )


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Three channels. White shows through what is transparent; deep greys keep their shades."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        low, high = cast(tuple[float, float], picture.convert("F").getextrema())
        top = 65_535 if low >= 0 and high > 255 else 255
        if low < 0 or high > 65_535:
            raise UnreadableError("has numbers in place of colours")
        scaled = picture.convert("F").point(lambda value: value * (255 / top))
        return scaled.convert("L").convert("RGB")
    if picture.has_transparency_data:
        own = picture.convert("RGBA")
        white = Image.new("RGBA", own.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, own).convert("RGB")
    return picture.convert("RGB")


def _look(picture: Image.Image) -> int:
    """64 bits that survive scaling and compression: where it grows brighter to the right.

    Source: the difference hash of Neal Krawetz (2013).
    """
    small = picture.convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    rows: Sequence[int] = list(small.tobytes())
    bits = 0
    for row in range(8):
        for column in range(8):
            at = 9 * row + column
            bits = 2 * bits + (rows[at] < rows[at + 1])
    return bits
