"""What a built bundle has beside its chip, in words."""

from pathlib import Path

import streamlit as st

from chipviz.bundle.metadata import read_metadata
from chipviz.bundle.remarks import exits_in_words, threshold_in_words
from chipviz.errors import ChipvizError
from chipviz.results.report import BundleReport
from chipviz.ui import formatting


def show(bundle: BundleReport) -> None:
    """Early exits and threshold of a bundle, if it has any."""
    try:
        metadata = read_metadata(Path(bundle.path))
    except ChipvizError:
        return  # said where it is opened
    if metadata.exits is not None:
        st.write(exits_in_words(metadata.exits))
    if metadata.threshold is not None:
        names = [formatting.plain(name) for name in metadata.task.label_names]
        st.write(threshold_in_words(metadata.threshold, names))


def has_exits(bundle: BundleReport) -> bool:
    """Whether texts may leave it early."""
    try:
        return read_metadata(Path(bundle.path)).exits is not None
    except ChipvizError:
        return False
