"""Data sets from files that the user has."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IDX_BYTES = 0x08  # the type code of unsigned bytes
MNIST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes (the format of MNIST), gzipped if its name ends in .gz.

    Raises:
        ValueError: the file is not such a file, or is cut short.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_BYTES:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {data[:4].hex(' ')}")
    dimensions = data[3]
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    expected = start + int(np.prod(shape))
    if len(data) != expected:
        raise ValueError(f"{path} should have {expected} bytes for an array of shape {shape}, it has {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def load_mnist(folder: str | Path) -> tuple[Tensor, Tensor]:
    """The 10,000 test digits of MNIST from its original files, (10000, 784) standardised, and labels (10000,).

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file is corrupt, or there are not as many labels as images.
    """
    arrays = []
    for name in MNIST_FILES:
        candidates = [Path(folder) / name, Path(folder) / f"{name}.gz"]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{str(folder)!r} has neither {name} nor {name}.gz; MNIST's original files do")
        arrays.append(read_idx(found))
    images, labels = arrays
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{str(folder)!r}: images of shape {images.shape} do not go with labels of {labels.shape}")
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(labels.astype(np.int64))
