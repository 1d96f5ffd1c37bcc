"""Data sets from files, and from OpenML."""

import gzip
import hashlib
import http.client
import io
import json
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
import urllib.response
from email.message import Message

import numpy as np
import pytest
import torch

from rlsched.envs.data import CIFAR_BATCHES, fetch_openml, load_cifar10, load_mnist, read_idx


def random_bytes(*shape):
    """Pixels that are the same in every test."""
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


IMAGES = random_bytes(7, 28, 28)
LABELS = np.arange(7, dtype=np.uint8)
PIXELS = random_bytes(20, 3072)  # of CIFAR-10: 1024 red, then 1024 green, then 1024 blue
NUMBERS = [n % 10 for n in range(20)]


def standardised(pixels):
    """The definition, channel by channel."""
    channels = torch.from_numpy(pixels.astype(np.float32)).unbind(1)
    return torch.stack([(channel - channel.mean()) / channel.std() for channel in channels], 1)


# --- IDX ---


def idx(array):
    """The array as MNIST's authors would have written it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, images, labels, suffix="", prefix="t10k"):
    """A folder of MNIST files with these digits."""
    pack = gzip.compress if suffix else bytes
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_as_it_was_written(tmp_path, suffix):
    """Transposed pixels or shifted labels would still train, only worse."""
    write_mnist(tmp_path, IMAGES, LABELS, suffix)
    inputs, labels = load_mnist(tmp_path)
    assert labels.tolist() == LABELS.tolist()
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(inputs, standardised(IMAGES.reshape(7, 1, 784))[:, 0])


def test_splits_of_mnist_are_not_confused(tmp_path):
    """A network validated on the images that it was trained on looks better than it is."""
    write_mnist(tmp_path, IMAGES, LABELS)
    write_mnist(tmp_path, IMAGES[:4], LABELS[:4], prefix="train")
    assert len(load_mnist(tmp_path, "train")[1]) == 4
    assert len(load_mnist(tmp_path, "test")[1]) == 7


def test_missing_file_is_named(tmp_path):
    """A user who points at the wrong folder should learn which file is looked for."""
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, LABELS[:-1], "do not go with"),
        (IMAGES[:0], LABELS[:0], "do not go with"),
        (IMAGES, IMAGES[0], "do not go with"),
        (IMAGES.reshape(7, 784), LABELS, r"should be of shape \(n, 28, 28\)"),
        (IMAGES, LABELS + 4, "from 0 to 9"),
        (IMAGES * 0, LABELS, "same in every pixel"),
    ],
)
def test_mnist_that_makes_no_sense_is_refused(tmp_path, images, labels, message):
    """A mix of two downloads would train on wrong labels, and blank images on divisions by zero."""
    write_mnist(tmp_path, images, labels)
    with pytest.raises(ValueError, match=message) as error:
        load_mnist(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (idx(IMAGES)[:-1], "short", "should have"),
        (idx(IMAGES) + b"\0", "long", "should have"),
        (idx(IMAGES)[:9], "header", "within its header"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "huge", "should have"),
        (b"<html>not found</html>", "page", "not an IDX file"),
        (b"", "empty", "not an IDX file"),
        (gzip.compress(idx(IMAGES))[:-20], "cut.gz", "cannot be read"),
        (gzip.compress(idx(IMAGES))[:10] + b"\xff" * 99, "deflate.gz", "cannot be read"),
        (gzip.compress(idx(IMAGES))[:-8] + b"\0" * 8, "checksum.gz", "cannot be read"),
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


# --- CIFAR-10 ---


def python2_batch(pixels, labels):
    """A batch as Python 2 pickled the published ones: protocol 2, 8-bit strings, flags of the dtype as 0 and 1."""

    def text(string):
        return b"U" + bytes([len(string)]) + string  # SHORT_BINSTRING

    def integer(number):
        return b"J" + struct.pack("<i", number)  # BININT

    shape = b"".join(map(integer, pixels.shape))
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    data = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + text(b"b") + b"tR"
    data += b"(" + integer(1) + b"(" + shape + b"t" + dtype + b"\x89"  # the state: version, shape, dtype, C order
    data += b"T" + struct.pack("<I", pixels.size) + pixels.tobytes() + b"tb"  # BINSTRING
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + data + text(b"labels") + numbers + b"u."


def modern_batch(protocol, key=str, sequence=list):
    """A function that pickles a batch as today's Python does."""
    return lambda pixels, labels: pickle.dumps({key("data"): pixels, key("labels"): sequence(labels)}, protocol)


WRITERS = {
    "Python 2": python2_batch,
    "Python 3 for Python 2": modern_batch(2, key=str.encode),
    "NumPy 1": lambda *batch: modern_batch(3)(*batch).replace(b"numpy._core", b"numpy.core"),
    "NumPy 2": lambda *batch: modern_batch(3)(*batch).replace(b"numpy.core", b"numpy._core"),
    "protocol 4": modern_batch(4),
    "protocol 5": modern_batch(5),
    "labels in an array": modern_batch(5, sequence=np.array),
    "big-endian labels": modern_batch(4, sequence=lambda labels: np.array(labels, ">i8")),
}


def cifar_contents(writer=python2_batch, split="train"):
    """The contents of a split's files: the twenty images, in turn."""
    names = list(CIFAR_BATCHES[split])
    count = 20 // len(names)
    starts = range(0, 20, count)
    return {name: writer(PIXELS[i : i + count], NUMBERS[i : i + count]) for name, i in zip(names, starts, strict=True)}


def write_folder(folder, contents):
    """CIFAR-10's files."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def write_archive(folder, contents):
    """CIFAR-10's archive."""
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.addfile(directory := tarfile.TarInfo("cifar-10-batches-py"))
        directory.type = tarfile.DIRTYPE
        for name, content in sorted(contents.items(), reverse=True):  # in no useful order, like the published one
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


PLACES = {
    "folder": write_folder,
    "subfolder": lambda folder, contents: write_folder(folder / "cifar-10-batches-py", contents),
    "archive": write_archive,
}


@pytest.mark.parametrize("write", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_read_as_it_was_written(tmp_path, write, split):
    """Mixed channels, or batches in another order than their labels, would still train, only worse."""
    write(tmp_path, cifar_contents(split=split))
    images, labels = load_cifar10(tmp_path, split)
    assert labels.tolist() == NUMBERS
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(images, standardised(PIXELS.reshape(20, 3, 1024)).view(20, 3, 32, 32))


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_cifar_loads_whatever_pickled_it(tmp_path, writer):
    """The published files are from Python 2; a user's extract of them is not."""
    write_folder(tmp_path, cifar_contents(writer))
    images, labels = load_cifar10(tmp_path)
    torch.testing.assert_close(images, standardised(PIXELS.reshape(20, 3, 1024)).view(20, 3, 32, 32))
    assert labels.tolist() == NUMBERS


def test_forged_flags_of_a_dtype_do_no_harm(tmp_path):
    """NumPy believes flags that call bytes pointers, and crashes, or worse."""
    flags = b"J\xff\xff\xff\xffJ" + bytes(4) + b"tb"
    content = python2_batch(PIXELS, NUMBERS)
    assert content.count(flags) == 1
    (tmp_path / "test_batch").write_bytes(content.replace(flags, flags[:6] + b"\x3f\0\0\0tb"))
    images, _ = load_cifar10(tmp_path, "test")
    torch.testing.assert_close(images, standardised(PIXELS.reshape(20, 3, 1024)).view(20, 3, 32, 32))


class Command:
    """Unpickled, it runs a command: pickle's own weakness."""

    def __init__(self, *command):
        self.command = command

    def __reduce__(self):
        """What pickle calls."""
        return os.system, self.command


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_that_runs_a_command_is_refused(tmp_path, protocol):
    """A data set from a stranger must not own the machine."""
    victim = tmp_path / "victim"
    command = Command(f"touch '{victim}'")
    pickle.loads(pickle.dumps(command, protocol))
    assert victim.exists()  # the attack works
    victim.unlink()
    (tmp_path / "test_batch").write_bytes(
        pickle.dumps({"data": PIXELS, "labels": NUMBERS, "filenames": command}, protocol)
    )
    with pytest.raises(ValueError, match=r"test_batch is not a batch of CIFAR-10: .*system"):
        load_cifar10(tmp_path, "test")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python2_batch(PIXELS, NUMBERS)[:-1], "is not a batch"),
        (python2_batch(PIXELS, NUMBERS)[:1000], "is not a batch"),
        (b"", "is not a batch"),
        (b"<html>not found</html>", "is not a batch"),
        (pickle.dumps([PIXELS, NUMBERS]), "is not a batch"),
        (pickle.dumps({"data": PIXELS, "fine_labels": NUMBERS}), "is not a batch.*'labels'"),
        (pickle.dumps({"data": PIXELS, "labels": [*NUMBERS[:-1], [0, 1]]}), "is not a batch"),
        (pickle.dumps({"data": PIXELS.reshape(-1), "labels": NUMBERS}), "should be uint8 of shape"),
        (pickle.dumps({"data": PIXELS[:, 1:], "labels": NUMBERS}), r"\(20, 3071\)"),
        (pickle.dumps({"data": PIXELS.astype(object), "labels": NUMBERS}), "is not a batch"),
        (pickle.dumps({"data": PIXELS.astype(np.float32), "labels": NUMBERS}), "it is float32"),
        (pickle.dumps({"data": PIXELS, "labels": NUMBERS[1:]}), "do not go with"),
        (pickle.dumps({"data": PIXELS[:0], "labels": []}), "do not go with"),
        (pickle.dumps({"data": PIXELS, "labels": [10, *NUMBERS[1:]]}), "from 0 to 9"),
        (pickle.dumps({"data": PIXELS, "labels": [-1, *NUMBERS[1:]]}), "from 0 to 9"),
        (pickle.dumps({"data": PIXELS, "labels": [0.5, *NUMBERS[1:]]}), "from 0 to 9"),
    ],
)
def test_corrupt_batch_is_refused_by_name(tmp_path, content, message):
    """A download that broke off, or another data set, must not be trained on."""
    path = tmp_path / "test_batch"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_cifar10(tmp_path, "test")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("write", PLACES.values(), ids=PLACES)
def test_missing_batch_is_named(tmp_path, write):
    """A fifth of the images would be missing, and nobody would notice."""
    contents = cifar_contents()
    del contents["data_batch_4"]
    write(tmp_path, contents)
    with pytest.raises(FileNotFoundError, match="lacks data_batch_4;"):
        load_cifar10(tmp_path)


def test_folder_without_cifar_is_named(tmp_path):
    """A user who points at the wrong folder should learn what is looked for."""
    with pytest.raises(FileNotFoundError, match=r"lacks test_batch; .*cifar-10-python.tar.gz") as error:
        load_cifar10(tmp_path, "test")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda archive: archive[: len(archive) // 2],
        lambda archive: archive[:-4],
        lambda archive: archive[:-8] + bytes(8),
        lambda archive: gzip.compress(gzip.decompress(archive)[:9000]),
        lambda archive: gzip.compress(b"no tar"),
        lambda archive: b"<html>not found</html>",
    ],
    ids=["half", "cut", "checksum", "cut within", "no tar", "page"],
)
def test_corrupt_archive_is_refused_by_name(tmp_path, damage):
    """What can still be read of a broken download is not what was published."""
    write_archive(tmp_path, cifar_contents())
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_cifar10(tmp_path)
    assert str(path) in str(error.value)


def test_images_that_were_not_published_are_refused_on_demand(tmp_path, monkeypatch):
    """Results on a modified data set would be reported as those on CIFAR-10."""
    contents = cifar_contents(split="test")
    write_folder(tmp_path, contents)
    with pytest.raises(ValueError, match="test_batch is not the published file"):
        load_cifar10(tmp_path, "test", verify=True)
    monkeypatch.setitem(CIFAR_BATCHES["test"], "test_batch", hashlib.md5(contents["test_batch"]).hexdigest())
    assert len(load_cifar10(tmp_path, "test", verify=True)[1]) == 20


# --- both ---


@pytest.mark.parametrize("load", [load_mnist, load_cifar10])
def test_file_in_place_of_the_folder_is_refused(tmp_path, load):
    """A user who names the archive itself should learn that its folder is wanted."""
    path = tmp_path / "cifar-10-python.tar.gz"
    path.touch()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python.tar.gz' is not a folder"):
        load(path)


@pytest.mark.parametrize("load", [load_mnist, load_cifar10])
def test_unknown_split_is_refused(tmp_path, load):
    """A misspelt split must not fall back to another one."""
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', got 'valid'"):
        load(tmp_path, "valid")


# --- OpenML ---


class OpenML(urllib.request.BaseHandler):
    """Answers in place of openml.org, at the boundary to the network, so that all of scikit-learn's own code runs."""

    def __init__(self):
        self.pixels, self.labels = IMAGES.reshape(7, 784).astype(object), LABELS
        self.md5 = None  # instead of the right one
        self.error = None  # instead of an answer
        self.requests = []

    def https_open(self, request):
        """The answer to a request."""
        self.requests.append(request.full_url)
        if self.error is not None:
            raise self.error
        return urllib.response.addinfourl(io.BytesIO(self.answer()), Message(), request.full_url, 200)

    def answer(self):
        """The data for a download, else all that the API tells of the data set."""
        names = [f"pixel{i}" for i in range(self.pixels.shape[1])]
        rows = [",".join(map(str, [*row, label])) for row, label in zip(self.pixels, self.labels, strict=True)]
        columns = [*(f"@ATTRIBUTE {name} REAL" for name in names), "@ATTRIBUTE class {0,1,2,3,4,5,6,7,8,9}"]
        arff = "\n".join(["@RELATION images", *columns, "@DATA", *rows]).encode()
        if "/download/" in self.requests[-1]:
            return arff
        constant = {"is_ignore": "false", "is_row_identifier": "false", "number_of_missing_values": "0"}
        features = [{"name": name, "data_type": "numeric", "is_target": "false"} for name in names]
        features.append({"name": "class", "data_type": "nominal", "is_target": "true"})
        description = {
            "name": "images",
            "version": "1",
            "description": "",
            "format": "ARFF",
            "status": "active",
            "url": "https://api.openml.org/data/v1/download/1/images.arff",
            "file_id": "1",
            "md5_checksum": self.md5 or hashlib.md5(arff).hexdigest(),
        }
        everything = {
            "data_set_description": description,
            "data_features": {"feature": [{"index": str(i), **constant, **f} for i, f in enumerate(features)]},
            "data_qualities": {"quality": [{"name": "NumberOfInstances", "value": f"{len(rows)}.0"}]},
        }
        return json.dumps(everything).encode()


@pytest.fixture
def openml(monkeypatch):
    """Seven digits on OpenML."""
    handler = OpenML()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between scikit-learn's attempts
    opener = urllib.request.OpenerDirector()
    opener.add_handler(handler)
    urllib.request.install_opener(opener)
    yield handler
    urllib.request.install_opener(None)


def test_data_set_from_openml_is_what_was_served(tmp_path, openml):
    """Labels come as strings and pixels as floats; either could go astray."""
    images, labels = fetch_openml("mnist", tmp_path)
    torch.testing.assert_close(images, standardised(IMAGES.reshape(7, 1, 784))[:, 0])
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(("name", "number"), [("mnist", 554), ("fashion-mnist", 40996)])
def test_version_of_the_data_set_is_fixed(tmp_path, openml, name, number):
    """Another version under the same name would change results without a word."""
    fetch_openml(name, tmp_path)
    assert openml.requests[0] == f"https://www.openml.org/api/v1/json/data/{number}"


def test_cifar_from_openml_has_the_shape_of_cifar_from_files(tmp_path, openml):
    """One network has to take both."""
    openml.pixels, openml.labels = PIXELS, NUMBERS
    write_folder(tmp_path, cifar_contents(split="test"))
    fetched, loaded = fetch_openml("cifar-10", tmp_path), load_cifar10(tmp_path, "test")
    torch.testing.assert_close(fetched, loaded, rtol=0, atol=0)


def test_what_is_fetched_is_announced_once(tmp_path, openml, capsys):
    """Minutes of silence look like a hang."""
    fetch_openml("mnist", tmp_path)
    said = capsys.readouterr().err
    assert all(part in said for part in ("mnist", "openml.org/d/554", str(tmp_path), "MB"))
    fetch_openml("mnist", tmp_path)
    assert capsys.readouterr().err == ""


def test_second_call_needs_no_network(tmp_path, openml):
    """Each of many runs would download and parse the data set again."""
    first = fetch_openml("mnist", tmp_path)
    openml.requests.clear()
    torch.testing.assert_close(fetch_openml("mnist", tmp_path), first, rtol=0, atol=0)
    assert openml.requests == []


@pytest.mark.parametrize("lost", ["pixels", "checksum"])
def test_corrupt_cache_is_refused_by_name_and_mended_by_deletion(tmp_path, openml, lost):
    """Bits that flipped on the disk must not be trained on, and the remedy that the error names must work."""
    first = fetch_openml("mnist", tmp_path)
    path, checksum = tmp_path / "mnist-554.npz", tmp_path / "mnist-554.npz.sha256"
    if lost == "pixels":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        checksum.unlink()
    with pytest.raises(ValueError, match="delete it") as error:
        fetch_openml("mnist", tmp_path)
    assert str(path) in str(error.value)
    path.unlink()
    torch.testing.assert_close(fetch_openml("mnist", tmp_path), first, rtol=0, atol=0)


def test_corrupt_download_is_refused_and_leaves_no_cache(tmp_path, openml):
    """scikit-learn compares MD5 sums: this notices should that change, and that we keep nothing of it."""
    openml.md5 = "0" * 32
    with (
        pytest.warns(RuntimeWarning, match="redownloading"),
        pytest.raises(ValueError, match=r"md5 checksum of the file .* does not match"),
    ):
        fetch_openml("mnist", tmp_path)
    assert not list(tmp_path.glob("mnist*"))


@pytest.mark.parametrize("pixel", ["0.5", "256", "-1", "?"])
def test_pixels_of_another_scale_are_refused(tmp_path, openml, pixel):
    """Rounded to bytes, pixels between 0 and 1 would all be black."""
    openml.pixels[3, 300] = pixel
    with pytest.raises(ValueError, match="mnist from OpenML: pixels should be whole numbers"):
        fetch_openml("mnist", tmp_path)


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), ConnectionResetError("reset by peer"), http.client.IncompleteRead(b"")],
    ids=["no network", "reset", "cut"],
)
def test_machine_without_a_network_is_told_of_the_files(tmp_path, openml, error):
    """A stack of scikit-learn's frames would not say that files do as well."""
    openml.error = error
    with (
        pytest.warns((UserWarning, RuntimeWarning), match=r"Retrying|redownloading"),
        pytest.raises(ConnectionError) as raised,
    ):
        fetch_openml("cifar-10", tmp_path)
    for part in ("cifar-10", str(error), "load_cifar10"):
        assert part in str(raised.value)


def test_unknown_data_set_is_refused():
    """The names that are known should be listed before anything is fetched."""
    with pytest.raises(ValueError, match="name must be one of 'mnist', 'fashion-mnist', 'cifar-10', got 'imagenet'"):
        fetch_openml("imagenet")
