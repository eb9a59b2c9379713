"""What a model makes of pictures before it reads them: the family's own processor.

Stands where a prompt stands for texts. Knows processors, neither tables nor models.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.processing_auto import processor_class_from_name

from chipviz.data.pictures import Pictures, is_reference, read
from chipviz.data.prompt import Prompt, cut_notices, n_truncated
from chipviz.data.task import Task
from chipviz.errors import ConfigError, Notice, SourceError
from chipviz.files import MAX_SETTINGS, read_small

Reader = Union[Prompt, "PictureReader"]
"""What turns rows of a task into what a backbone takes."""
QUESTION = "What type of object is in this photo?"
"""What a model that reads pictures and texts is asked, unless told otherwise. Source: the public
code of arXiv:2410.06541."""
EDGE = 0.03
PROCESSOR = "preprocessor_config.json"
WHOLE = "processor_config.json"
"""File of a processor of pictures and texts. That of pictures may stand inside."""


@dataclass(frozen=True)
class Picture:
    """One picture on its way into a model. Its length is that of the sequence it becomes."""

    source: str
    """A reference, or the path of a file."""
    reader: "PictureReader"

    def __len__(self) -> int:
        return self.reader.n_tokens

    def opened(self) -> Image.Image:
        """The picture, as RGB."""
        return self.reader.open(self.source)


@dataclass(frozen=True)
class PictureReader:
    """Turns pictures into pixels of a model's own kind."""

    processor: Any
    pictures: Pictures
    n_tokens: int = 1
    """Tokens that a picture becomes. Known once a model has read one."""
    template: str = ""
    max_chars: int = 0
    takes_pair: bool = False
    pad_id: int = 0

    @property
    def max_length(self) -> int:
        """Tokens that a picture becomes."""
        return self.n_tokens

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Picture]:
        """The pictures, none of them opened yet.

        Raises:
            ConfigError: If second ones are given.
        """
        if pairs is not None:
            raise ConfigError("One picture is read here; a text has no place.", "Leave it out.")
        return [Picture(text, self) for text in texts]

    def open(self, source: str) -> Image.Image:
        """A picture, as RGB.

        Args:
            source: A reference, or the path of a file.

        Raises:
            SourceError: If it is not there.
            UnreadableError: If it cannot be read.
        """
        if is_reference(source):
            return self.pictures.open(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise SourceError(
                f"The picture {source[-80:]!r} cannot be opened ({error.strerror}).", "Check it."
            ) from None
        return read(data)[0]

    def batch(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What a model is given of several pictures, by the names of its inputs."""
        return {"pixel_values": torch.stack([self.pixels(picture) for picture in pictures])}

    def pixels(self, picture: Image.Image) -> Tensor:
        """What a model is given of a picture: shape (3, H, W), float32."""
        found = self.processor(
            images=picture, return_tensors="pt", input_data_format="channels_last"
        )
        return found["pixel_values"][0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pixels of any picture: channels, height, width."""
        pixels = self.pixels(Image.new("RGB", (64, 48), (90, 120, 150)))
        channels, height, width = pixels.shape
        return channels, height, width

    def seen(self, picture: Image.Image) -> Image.Image:
        """What the model sees of a picture, as a picture: scaled and cropped, not normed."""
        pixels = self.processor(
            images=picture,
            return_tensors="pt",
            input_data_format="channels_last",
            do_normalize=False,
            do_rescale=False,
        )["pixel_values"][0]
        array = pixels.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(array)

    def crop(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What is left of a picture of this size: left, top, right and bottom, in shares of it.

        Found by looking at a picture whose colours say where they stand.
        """
        steps = Image.linear_gradient("L").resize((width, height))  # from 0 at the top to 255
        across = Image.linear_gradient("L").rotate(90).resize((width, height))
        where = Image.merge("RGB", (across, steps, steps))
        seen = np.asarray(self.seen(where), dtype=np.float64) / 255
        found = (seen[..., 0].min(), seen[..., 1].min(), seen[..., 0].max(), seen[..., 1].max())
        # Smoothing keeps the outermost steps from being seen.
        left, top, right, bottom = (
            0.0 if s < EDGE else 1.0 if s > 1 - EDGE else round(float(s), 3) for s in found
        )
        return left, top, right, bottom

    def save(self, folder: Path) -> None:
        """Write the processor as plain `transformers` reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.processor.save_pretrained(folder)

    @property
    def fingerprint(self) -> str:
        """Changes when any picture could come out as other pixels."""
        said = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True)
class AskingReader(PictureReader):
    """Turns pictures into what a model reads that is asked about them: a prompt around each."""

    prompt: str = ""
    """The question with the marks of a picture and of a turn around it."""
    image_token: int = -1
    """The token that a picture's places in the prompt hold."""

    @property
    def _images(self) -> Any:
        return self.processor.image_processor

    def batch(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What a model is given of several pictures: prompts padded on the right, and pixels."""
        found = self.processor(
            images=[[picture] for picture in pictures],
            text=[self.prompt] * len(pictures),
            return_tensors="pt",
            padding=True,
        )
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def seen(self, picture: Image.Image) -> Image.Image:
        """The picture itself: its processor may cut it into several."""
        small = picture.copy()
        small.thumbnail((448, 448))
        return small

    def crop(self, width: int, height: int) -> tuple[float, float, float, float]:
        """All of it."""
        del width, height
        return 0.0, 0.0, 1.0, 1.0

    @property
    def fingerprint(self) -> str:
        """Changes when any picture or the prompt could come out otherwise."""
        said = [str(self._images.to_dict()), self.prompt, self.template]
        said.append(self.processor.tokenizer.backend_tokenizer.to_str())
        return hashlib.sha256("\0".join(said).encode()).hexdigest()


def load_asking(folder: Path, pictures: Pictures, question: str) -> AskingReader:
    """Load the processor of a model that reads pictures and texts.

    Args:
        folder: The model folder.
        pictures: Where references lead.
        question: What is asked about each picture.

    Raises:
        SourceError: If the folder holds none, or one with code of its own.
    """
    try:
        processor = _open_asking(folder)
        processor.tokenizer.padding_side = "right"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        prompt = _asked(processor, question)
        reader = AskingReader(processor, pictures, template=question, prompt=prompt)
        found = reader.batch([Image.new("RGB", (96, 32))] * 2)
        token = _place(processor, found["input_ids"])
    except Exception as error:  # noqa: BLE001 - as many kinds as there are odd settings
        raise SourceError(
            f"The processor of {folder.name} cannot be used: {' '.join(str(error).split())[:160]}.",
            "Give the model as it was published, processor and tokenizer included.",
            "backbone",
        ) from None
    return replace(reader, image_token=token, n_tokens=found["input_ids"].shape[1])


def _open_asking(folder: Path) -> Any:
    """The processor of a model that reads pictures and texts, without its part for videos.

    That part wants a library that nothing here needs.

    Raises:
        ValueError: If it asks for code of its own.
    """
    said: dict[str, Any] = {}
    for name in (WHOLE, PROCESSOR, "tokenizer_config.json"):
        if (folder / name).is_file():
            text = read_small(folder / name, MAX_SETTINGS)
            if "auto_map" in text:  # at any depth
                raise ValueError("it asks for code of its own, which is never run")
            said = json.loads(text) | said
    name = said.get("processor_class")
    kind: Any = processor_class_from_name(name) if isinstance(name, str) and name else None
    if kind is None or "video_processor" not in kind.get_attributes():
        kind = AutoProcessor
    else:
        left = [part for part in kind.get_attributes() if part != "video_processor"]
        kind = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: left)})
    with warnings.catch_warnings(action="ignore"):
        return kind.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, backend="pil"
        )


def _place(processor: Any, ids: Tensor) -> int:
    """The token that stands where a picture's states go. Some name the mark before them so, too.

    Raises:
        ValueError: If a prompt has no such token.
    """
    named = {getattr(one, "image_token_id", None) for one in (processor, processor.tokenizer)}
    counts = {int(token): int((ids == token).sum()) for token in named if token is not None}
    token = max(counts, key=lambda one: counts[one], default=-1)
    if not counts.get(token):
        raise ValueError("a prompt has no place for its picture")
    return token


def _asked(processor: Any, question: str) -> str:
    """The question in the form of a turn, where the family has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    mark = getattr(processor, "image_token", "<image>")
    return f"{getattr(mark, 'content', mark)}\n{question}"


def limit_notices(reader: Reader, task: Task) -> tuple[int, list[Notice]]:
    """How many rows the length limit cuts, and what must be said of it. It cuts no picture."""
    if not isinstance(reader, Prompt):
        return 0, []
    n_cut, n_texts = n_truncated(reader, task), sum(map(len, task.splits.values()))
    return n_cut, cut_notices(reader.max_length, n_cut, n_texts)


def load_processor(folder: Path, pictures: Pictures) -> PictureReader:
    """Load the processor of a model folder.

    Args:
        folder: Of a model that reads pictures.
        pictures: Where references lead.

    Raises:
        SourceError: If the folder holds none, or one with code of its own.
    """
    files = [folder / name for name in (PROCESSOR, WHOLE) if (folder / name).is_file()]
    if not files:
        raise SourceError(
            f"{folder.name} has no {PROCESSOR}, so nobody knows what pictures are made into.",
            "Save the model's image processor there, or give the model as it was published.",
            "backbone",
        )
    try:
        for file in files:
            text = read_small(file, MAX_SETTINGS)
            if not isinstance(json.loads(text), dict) or "auto_map" in text:
                raise ValueError("it asks for code of its own, which is never run")
        with warnings.catch_warnings(action="ignore"):
            processor = AutoImageProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, backend="pil"
            )
        reader = PictureReader(processor, pictures)
        wide = reader.pixels(Image.new("RGB", (96, 32))).shape
        if wide != reader.shape or len(wide) != 3:
            raise ValueError("pictures of two shapes come out as pixels of two shapes")
    except Exception as error:  # noqa: BLE001 - as many kinds as there are odd settings
        raise SourceError(
            f"The image processor of {folder.name} cannot be used: "
            f"{' '.join(str(error).split())[:160]}.",
            "It must make every picture one size: set crop_size, or size with height and width.",
            "backbone",
        ) from None
    return reader
