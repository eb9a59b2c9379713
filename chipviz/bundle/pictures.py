"""A bundle of pictures at work: a stock classifier, or a chip beside the cut vision encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chipviz.bundle.metadata import Metadata
from chipviz.bundle.opening import as_refusals
from chipviz.bundle.reader import PictureChip, read_picture_chip
from chipviz.bundle.vision import MADE, make_picture
from chipviz.data.pictures import Pictures
from chipviz.data.processor import PictureReader, load_asking, load_processor
from chipviz.data.task import check_fields
from chipviz.results.answers import Prediction


@dataclass(frozen=True)
class PictureClassifier:
    """A loaded bundle that reads pictures."""

    metadata: Metadata
    reader: PictureReader
    model: Any
    """A stock classifier, or for kind *chipviz* the cut encoder alone."""
    chip: PictureChip | None = None
    """Of kind *chipviz* alone."""

    @torch.inference_mode()
    def predict(
        self, sources: Sequence[str | Path], pairs: Sequence[str] | None = None
    ) -> list[Prediction]:
        """Classify pictures.

        Args:
            sources: Paths of files, or names of `chipviz.bundle.vision.MADE`.
            pairs: Nothing: a picture is read alone.

        Raises:
            SourceError: If a file cannot be opened.
            UnreadableError: If it holds no picture.
            ConfigError: If texts are given beside the pictures.
        """
        check_fields(False, [str(source) for source in sources], pairs)
        names, found = self.model.config.id2label, list[Prediction]()
        for source in sources:
            made = str(source) in MADE and not Path(source).exists()
            picture = make_picture(str(source)) if made else self.reader.open(str(source))
            batch = self.reader.batch([picture])
            found.append(Prediction.of(names, self.scores(batch).softmax(dim=-1)[0].tolist()))
        return found

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """Class scores of pictures, as their reader makes them: shape (B, C), float32."""
        if self.chip is not None:
            return self.chip(batch)
        return self.model(pixel_values=batch["pixel_values"].to(self.model.device)).logits.float()


def open_pictures(path: Path, metadata: Metadata, model: Any) -> PictureClassifier:
    """A bundle of pictures whose model is loaded.

    Raises:
        BundleError: If its processor or its chip cannot be used.
    """
    with as_refusals(path):
        question = metadata.task.template
        reader = (
            load_asking(path, Pictures(path), question)
            if question
            else load_processor(path, Pictures(path))
        )
        own = metadata.kind == "chipviz"
        chip = read_picture_chip(path, model, metadata, reader) if own else None
    return PictureClassifier(metadata, reader, model, chip)
