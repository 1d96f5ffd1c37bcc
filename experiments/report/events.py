"""What is in a TensorBoard log, as TensorBoard's own reader reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import (
    COMPRESSED_HISTOGRAMS,
    HISTOGRAMS,
    IMAGES,
    SCALARS,
    TENSORS,
    EventAccumulator,
)

from rlsched.experiments.quiet import quiet

FILES = "*tfevents*"
ALL, LAST = 0, 1  # of a tag's values
WANTED = {SCALARS: ALL, TENSORS: ALL, IMAGES: LAST, HISTOGRAMS: LAST, COMPRESSED_HISTOGRAMS: LAST}
TEXT = "/text_summary"  # what `SummaryWriter.add_text` adds to a tag
FRAME = 12  # bytes before a record: its length in eight of them, and their checksum
CHECKSUM = 4  # bytes after it


class Scalars(NamedTuple):
    """A curve."""

    steps: NDArray[np.float64]  # (n,), rising
    values: NDArray[np.float64]  # (n,)


class Log(NamedTuple):
    """A folder of event files."""

    scalars: dict[str, Scalars]  # by their tags
    texts: dict[str, list[tuple[int, str]]]  # with their steps
    images: dict[str, tuple[int, bytes]]  # the last of each tag, as PNG
    is_cut_off: bool  # the last record of a file is not whole: it was being written, or a kill fell into that


def has_log(folder: Path) -> bool:
    return any(path.is_file() for path in folder.glob(FILES))


def read_log(folder: Path) -> Log:
    """Read the event files that lie in a folder, and not those below it.

    A run that was resumed has its steps once: what it logged anew takes the place of what it had logged there before.

    Raises:
        ValueError: there is no event in it.
        OSError: it cannot be read.
    """
    files = sorted(path for path in folder.glob(FILES) if path.is_file())
    for path in files:
        path.open("rb").close()  # what may not be read is told by the system
    with quiet("tensorboard"):
        events = EventAccumulator(str(folder), size_guidance=WANTED).Reload()
    tags = events.Tags()
    scalars = {}
    for tag in tags["scalars"]:
        last = _last((event.step, event.value) for event in events.Scalars(tag))
        scalars[tag] = Scalars(*np.array(last, dtype=np.float64).reshape(-1, 2).T)
    images = {tag: (event.step, event.encoded_image_string) for tag in tags["images"] for event in events.Images(tag)}
    texts = {}
    for tag in tags["tensors"]:
        if tag.endswith(TEXT):
            found = [(event.step, event.tensor_proto.string_val) for event in events.Tensors(tag)]
            texts[tag.removesuffix(TEXT)] = [
                (step, b"\n".join(text).decode(errors="replace")) for step, text in _last(found, once=False)
            ]
    if not (scalars or images or texts):
        what = "is empty, or was cut off in its first record" if files else "is missing"
        raise ValueError(f"{folder} has no TensorBoard log that can be read: its event file {what}")
    return Log(scalars, texts, images, any(map(_is_cut_off, files)))


def _last(events: Iterable[tuple[int, Any]], *, once: bool = True) -> list[tuple[int, Any]]:
    """The values with rising steps: where these go back, what came before is left out from there on."""
    kept: list[tuple[int, Any]] = []
    for step, value in events:
        while kept and (kept[-1][0] > step or (once and kept[-1][0] == step)):
            kept.pop()
        kept.append((step, value))
    return kept


def _is_cut_off(path: Path) -> bool:
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            place += FRAME + int.from_bytes(file.read(8), "little") + CHECKSUM
    return place != size


Read = TypeVar("Read")


def noted(read: Callable[[], Read]) -> tuple[Read, list[str]]:
    """What is read, and what was warned of, as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read()
    return found, [f"{warning.message}." for warning in caught]
