"""How values are written on pages: numbers, times, settings, text that is safe in Markdown."""

import re
import time

from chipviz.config import RunConfig

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:^=&])")

_ADDRESS = re.compile(r"https?(?=:)|www(?=\.)|[-.\w+](?=@)", re.IGNORECASE)
"""Where Markdown would see an address without being told."""
_JOINER = "\u2060"


def plain(text: str) -> str:
    """Text for places that read Markdown: every mark escaped, so it shows as written.

    Addresses are no links either: what makes one is parted by a character that nobody sees.
    """
    parted = _ADDRESS.sub(lambda found: found[0] + _JOINER, " ".join(text.split()))
    return _MARKDOWN.sub(r"\\\1", parted)


def label_of(field: str) -> str:
    """What a setting of `RunConfig` is called in the form."""
    return RunConfig.model_fields[field].title or field


def help_of(field: str) -> str:
    """What a setting of `RunConfig` does, in a sentence or two."""
    return RunConfig.model_fields[field].description or ""


def percent(value: float) -> str:
    """An accuracy or share in [0, 1] as people read it."""
    return f"{100 * value:.1f} %"


def megabytes(n_bytes: float) -> str:
    """Bytes as MB, from 1 GB on as GB, below 1 MB as kB."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:,.0f} kB"
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.0f} MB"


def millions(count: int) -> str:
    """A parameter count."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"


def milliseconds(seconds: float) -> str:
    """A latency, in ms below one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def duration(seconds: float) -> str:
    """Time left, as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def ago(moment: float) -> str:
    """How long ago a unix time was, in one unit."""
    gone = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if gone >= size:
            return f"{int(gone // size)} {unit} ago"
    return "just now"
