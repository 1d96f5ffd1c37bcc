"""Data sets from files that the user has, or from OpenML."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import http.client
import io
import math
import pickle
import struct
import sys
import tarfile
import urllib.error
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsched.files import write

T = TypeVar("T")

CLASSES = 10  # of every data set here
IDX_BYTES = 0x08  # the type code of unsigned bytes
MNIST_PREFIXES = {"train": "train", "test": "t10k"}
CIFAR_BATCHES = {  # the files of a split, with the MD5 sums of the published ones
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}
CIFAR_FOLDER, CIFAR_ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"


class _OpenML(NamedTuple):
    data_id: int  # names one version of a data set
    channels: int
    shape: tuple[int, ...]  # of an image, as it is returned
    megabytes: int  # of text to parse, about


OPENML = {
    "mnist": _OpenML(554, 1, (784,), 130),
    "fashion-mnist": _OpenML(40996, 1, (784,), 155),
    "cifar-10": _OpenML(40927, 3, (3, 32, 32), 650),
}


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes (the format of MNIST), gzipped if its name ends in .gz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a file, or is cut short.
    """
    path = Path(path)
    data = _read(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_BYTES:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {data[:4].hex(' ')}")
    dimensions = data[3]
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    expected = start + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{path} should have {expected} bytes for an array of shape {shape}, it has {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def load_mnist(folder: str | Path, split: str = "test") -> tuple[Tensor, Tensor]:
    """MNIST, or Fashion-MNIST, from its original files, gzipped or not.

    Args:
        folder: holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or the same with `t10k`.
        split: "train" or "test".

    Returns:
        Images (n, 784), float32, with mean 0 and standard deviation 1 over the split (`.view(-1, 1, 28, 28)` for a
        convolution), and labels (n,), int64.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file is corrupt, or images and labels do not go together.
    """
    prefix = _choose("split", split, MNIST_PREFIXES)
    folder = _existing(folder)
    arrays = []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        found = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{str(folder)!r} has neither {name} nor {name}.gz; MNIST's original files do")
        arrays.append(read_idx(found))
    images, labels = arrays
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{folder}: images should be of shape (n, 28, 28), they are of {images.shape}")
    _check(images, labels, folder)
    return _standardised(images.reshape(-1, 1, 784), folder)[:, 0], torch.from_numpy(labels.astype(np.int64))


def load_cifar10(folder: str | Path, split: str = "train", verify: bool = False) -> tuple[Tensor, Tensor]:
    """CIFAR-10 from the files of its python version.

    They are pickles, which can run any code; here they can only spell arrays, and anything else is refused.

    Args:
        folder: holds the batches, or the folder `cifar-10-batches-py` with them, or `cifar-10-python.tar.gz`.
        split: "train" (`data_batch_1` to `data_batch_5`) or "test" (`test_batch`).
        verify: demand the MD5 sums of the published batches. Without it, other images in the same format load too.

    Returns:
        Images (n, 3, 32, 32), float32, with mean 0 and standard deviation 1 in each channel over the split, and
        labels (n,), int64.

    Raises:
        FileNotFoundError: the folder lacks one of the batches.
        ValueError: a file is corrupt or refused, or images and labels do not go together.
    """
    sums = _choose("split", split, CIFAR_BATCHES)
    place, contents = _cifar_files(_existing(folder), sums)
    missing = [name for name in sums if name not in contents]
    if missing:
        raise FileNotFoundError(
            f"{str(place)!r} lacks {', '.join(missing)}; CIFAR-10's python version has them, "
            f"in {CIFAR_FOLDER} or in {CIFAR_ARCHIVE}"
        )
    images, labels = [], []
    for name, md5 in sums.items():
        content = contents[name]
        if verify and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{place / name} is not the published file: its MD5 sum is not {md5}")
        data, numbers = _unpickle_batch(content, place / name)
        images.append(data)
        labels.append(numbers)
    pixels = np.concatenate(images).reshape(-1, 3, 1024)
    return _standardised(pixels, place).view(-1, 3, 32, 32), torch.from_numpy(np.concatenate(labels).astype(np.int64))


def fetch_openml(name: str, cache: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """A data set from openml.org through scikit-learn, or from the cache once it was fetched.

    A download is checked against the MD5 sum that OpenML states. Its text takes minutes to parse, for CIFAR-10 about
    4 GB of memory as well; the outcome is kept as `NAME-ID.npz`, with its SHA-256, which every later call verifies.

    Args:
        name: "mnist", "fashion-mnist" or "cifar-10", each one fixed version.
        cache: folder for the files; by default scikit-learn's (`~/scikit_learn_data`, or `$SCIKIT_LEARN_DATA`).

    Returns:
        All images and labels, training and test together in OpenML's order, otherwise as `load_mnist` and
        `load_cifar10` return them.

    Raises:
        ConnectionError: OpenML cannot be reached.
        ValueError: the download, or the file in the cache, is corrupt.
    """
    from sklearn.datasets import get_data_home

    source = _choose("name", name, OPENML)
    path = Path(get_data_home(cache)) / f"{name}-{source.data_id}.npz"
    checksum = path.with_name(path.name + ".sha256")
    if not path.is_file():
        images, labels = _download(name, path.parent)
        packed = io.BytesIO()
        np.savez_compressed(packed, images=images, labels=labels)
        write(checksum, f"{_sha256(packed.getvalue())}  {path.name}\n".encode())
        write(path, packed.getvalue())
    content = path.read_bytes()
    if not checksum.is_file() or _sha256(content).encode() not in checksum.read_bytes():
        raise ValueError(f"{path} does not match {checksum.name}, its checksum: delete it, and it is fetched anew")
    with np.load(io.BytesIO(content)) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    pixels = _standardised(images.reshape(len(images), source.channels, -1), path)
    return pixels.view(-1, *source.shape), torch.from_numpy(labels)


def _choose(argument: str, given: str, options: Mapping[str, T]) -> T:
    if given not in options:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, options))}, got {given!r}")
    return options[given]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _existing(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder")
    return Path(folder)


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check(images: NDArray[np.uint8], labels: NDArray[Any], source: str | Path) -> None:
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(f"{source}: images of shape {images.shape} do not go with labels of {labels.shape}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{source}: labels should be whole numbers from 0 to {CLASSES - 1}")


def _standardised(images: NDArray[np.uint8], source: Path) -> Tensor:
    """Images (n, channels, pixels) with mean 0 and standard deviation 1 in each channel."""
    pixels = torch.from_numpy(images.astype(np.float32))
    mean, deviation = pixels.mean((0, 2), keepdim=True), pixels.std((0, 2), keepdim=True)
    if not deviation.all():
        raise ValueError(f"{source}: a channel is the same in every pixel")
    return pixels.sub_(mean).div_(deviation)


def _cifar_files(folder: Path, names: Collection[str]) -> tuple[Path, dict[str, bytes]]:
    """Where CIFAR-10's files are, and the contents of those of these names."""
    for place in (folder, folder / CIFAR_FOLDER):
        contents = {name: (place / name).read_bytes() for name in names if (place / name).is_file()}
        if contents:
            return place, contents
    archive = folder / CIFAR_ARCHIVE
    if not archive.is_file():
        return folder, {}
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_read(archive))) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in names and (file := tar.extractfile(member)):
                    contents[name] = file.read()
    except tarfile.TarError as error:
        raise ValueError(f"{archive} cannot be read: {error}") from error
    return archive, contents


def _unpickle_batch(content: bytes, source: Path) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Images (n, 3072) and labels (n,) of one of CIFAR-10's batches."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    except Exception as error:  # pickle raises whatever corrupt bytes happen to spell
        raise ValueError(f"{source} is not a batch of CIFAR-10: {error!r}") from error
    if images.dtype != np.uint8 or images.shape[1:] != (3072,):
        raise ValueError(f"{source}: data should be uint8 of shape (n, 3072), it is {images.dtype} of {images.shape}")
    _check(images, labels, source)
    return images, labels


class _Dtype:
    """A pickled `numpy.dtype`: its code alone. NumPy's own would take over any flags, and bytes for pointers."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code: Any = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = state[1] + self.code  # the byte order


class _Array:
    """A pickled `numpy.ndarray`, made by NumPy's `_frombuffer` (protocol 5) or by its `_reconstruct` and a state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.arguments = data, dtype, shape, "F" if fortran else "C"

    def __array__(self, *_: object, **__: object) -> NDArray[Any]:
        data, dtype, shape, order = self.arguments
        return np.frombuffer(data, dtype.code).reshape(shape, order=order)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays from any version of NumPy, and what needs no import."""

    ALLOWED: Mapping[str, Any] = {
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy.core.numeric._frombuffer": _Array,
        "_codecs.encode": codecs.encode,  # makes bytes, in a pickle for Python 2 from Python 3
    }

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if wanted not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return self.ALLOWED[wanted]


def _download(name: str, folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, pixels) and labels (n,), as OpenML has them; the files that are fetched stay in the folder."""
    from sklearn import datasets

    data_id, *_, megabytes = OPENML[name]
    print(
        f"fetching {name} from https://www.openml.org/d/{data_id} into {folder}: about {megabytes} MB of text, "
        "which take minutes to parse, once",
        file=sys.stderr,
    )
    try:
        pixels, labels = datasets.fetch_openml(
            data_id=data_id,
            data_home=folder,
            as_frame=False,
            return_X_y=True,
            parser="liac-arff",  # the faster one needs pandas
        )
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{name} cannot be fetched from OpenML: {error}. load_mnist and load_cifar10 read files that you have"
        ) from error
    with np.errstate(invalid="ignore"):
        images = pixels.astype(np.uint8)
    if (images != pixels).any():
        raise ValueError(f"{name} from OpenML: pixels should be whole numbers from 0 to 255")
    labels = labels.astype(np.int64)
    _check(images, labels, f"{name} from OpenML")
    return images, labels
