"""Data sets from files."""

import gzip
import struct

import numpy as np
import pytest
import torch

from rlsched.envs.data import load_mnist, read_idx


def idx(array):
    """The array as MNIST's authors would have written it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, images, labels, suffix=""):
    """A folder of MNIST files with these digits."""
    pack = gzip.compress if suffix else bytes
    (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (folder / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))


IMAGES = np.random.default_rng(0).integers(256, size=(7, 28, 28), dtype=np.uint8)
LABELS = np.arange(7, dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_as_it_was_written(tmp_path, suffix):
    """Transposed pixels or shifted labels would still train, only worse."""
    write_mnist(tmp_path, IMAGES, LABELS, suffix)
    inputs, labels = load_mnist(tmp_path)
    assert labels.tolist() == LABELS.tolist()
    pixels = torch.from_numpy(IMAGES.reshape(7, 784).astype(np.float32))
    torch.testing.assert_close(inputs, (pixels - pixels.mean()) / pixels.std())


def test_missing_file_is_named(tmp_path):
    """A user who points at the wrong folder should learn which file is looked for."""
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        load_mnist(tmp_path)


def test_labels_that_do_not_match_the_images_are_refused(tmp_path):
    """A mix of two downloads would train on wrong labels."""
    write_mnist(tmp_path, IMAGES, LABELS[:-1])
    with pytest.raises(ValueError, match="do not go with"):
        load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (idx(IMAGES)[:-1], "short", "should have"),
        (idx(IMAGES) + b"\0", "long", "should have"),
        (idx(IMAGES)[:9], "header", "within its header"),
        (b"<html>not found</html>", "page", "not an IDX file"),
        (b"", "empty", "not an IDX file"),
        (gzip.compress(idx(IMAGES))[:-20], "cut.gz", "cannot be read"),
        (b"not gzip", "no.gz", "cannot be read"),
    ],
)
def test_corrupt_file_is_refused_by_name(tmp_path, content, name, message):
    """A download that broke off must not be trained on."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)
