"""The examples' data loading, on tiny files that each test writes itself, and the size of their network."""

import gzip
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from support import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import data
from resnet import ResNet

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
IDX_TRAIN, IDX_TEST = data.IDX_FILES["train"], data.IDX_FILES["test"]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def labels(n: int, classes: int = 10) -> np.ndarray:
    """Every class occurs if n >= classes."""
    return (np.arange(n) % classes).astype(np.uint8)


def write_idx(folder: Path, gz: bool = False, size: int = 6) -> dict[str, np.ndarray]:
    arrays = {}
    for (image_file, label_file), n in ((IDX_TRAIN, 12), (IDX_TEST, 5)):
        arrays |= {image_file: pixels(n, size, size), label_file: labels(n)}
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(content) if gz else content)
    return arrays


def python2_pickle(images: np.ndarray, numbers: list[int], key: bytes) -> bytes:
    """What Python 2 wrote for CIFAR: protocol 2, byte strings, numpy.core. Python 3 cannot write it."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = number(images.shape[0]) + number(images.shape[1]) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    array += number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, numbers)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + listed + b"u."


def write_cifar(folder: Path, classes: int, form: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All files of CIFAR-10 or -100, 2 images each; form: python2, python3 or bin. Returns the contents."""
    train, test, _ = data.CIFAR_FILES[f"CIFAR-{classes}"]
    contents = {}
    for name in train + test:
        images, numbers = pixels(2, 3072), RNG.integers(0, classes, 2, dtype=np.uint8)
        contents[name] = images, numbers
        key = b"labels" if classes == 10 else b"fine_labels"
        if form == "bin":
            coarse = [np.full((2, 1), 7, np.uint8)] * (classes == 100)
            np.concatenate([*coarse, numbers[:, None], images], 1).tofile(folder / f"{name}.bin")
        elif form == "python2":
            (folder / name).write_bytes(python2_pickle(images, numbers.tolist(), key))
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": images, key: numbers.tolist()}, protocol=4))
    return contents


@pytest.mark.parametrize("gz", [False, True])
def test_idx(tmp_path: Path, gz: bool) -> None:
    arrays = write_idx(tmp_path, gz)
    dataset = data.load(str(tmp_path))
    assert (dataset.classes, dataset.channels, len(dataset.train), len(dataset.test)) == (10, 1, 12, 5)
    np.testing.assert_array_equal(dataset.train.images[:, 0], arrays[IDX_TRAIN[0]])
    np.testing.assert_array_equal(dataset.test.labels, arrays[IDX_TEST[1]])
    images, numbers = dataset.train.batch(slice(None))
    assert images.dtype == torch.float32 and numbers.dtype == torch.int64
    # 432 values of order 1 in float32: the mean is exact to about 1e-7, far below this
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["python2", "python3", "bin"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int, form: str) -> None:
    contents = write_cifar(tmp_path, classes, form)
    dataset = data.load(str(tmp_path))
    train, test, _ = data.CIFAR_FILES[f"CIFAR-{classes}"]
    assert (dataset.name, dataset.classes, dataset.channels) == (f"CIFAR-{classes}", classes, 3)
    for split, names in ((dataset.train, train), (dataset.test, test)):
        images, numbers = (np.concatenate(part) for part in zip(*(contents[n] for n in names), strict=True))
        np.testing.assert_array_equal(split.images.flatten(1), images)
        np.testing.assert_array_equal(split.labels, numbers)
    # the mean is each channel's own
    torch.testing.assert_close(dataset.train.mean.flatten(), dataset.train.images.float().mean((0, 2, 3)))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_code_is_refused(tmp_path: Path, protocol: int) -> None:
    write_cifar(tmp_path, 10, "python3")
    marker = tmp_path / "ran"
    content = pickle.dumps({b"data": pixels(2, 3072), b"labels": [1, Malicious(marker)]}, protocol=protocol)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_3: refused"):
        data.load(str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize("path", ["os.system", "builtins.eval", "numpy.load", "numpy.ndarray.__class__"])
def test_pickled_globals_are_refused(tmp_path: Path, path: str) -> None:
    write_cifar(tmp_path, 10, "python3")
    module, name = path.split(".", 1)
    # protocol 4 resolves dotted names: STACK_GLOBAL of two short unicode strings
    parts = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)]
    (tmp_path / "test_batch").write_bytes(b"\x80\x04" + b"".join(parts) + b"\x93.")
    with pytest.raises(ValueError, match=f"asks for {path}, which no CIFAR file needs"):
        data.load(str(tmp_path))


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='expected "digits" or a folder'):
        data.load(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="found nothing. Expected the four IDX files"):
        data.load(str(tmp_path))
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(ValueError, match=r"found cifar-10-python.tar.gz.*Unpack archives"):
        data.load(str(tmp_path))


def cut(content: bytes) -> bytes:
    return content[:-1]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IDX_TRAIN[0], None, "expected train-images-idx3-ubyte or train-images-idx3-ubyte.gz, found neither"),
        (IDX_TRAIN[0], cut, r"promises \(12, 6, 6\) values, found 431"),
        (IDX_TRAIN[0], lambda c: b"\x1f\x8b" + c[2:], "starts 00000803.*found 1f8b0803"),
        (IDX_TRAIN[0], lambda c: b"", "found an empty file"),
        (IDX_TRAIN[0], lambda c: c[:4] + b"\xff" * 12 + c[16:], "cut off"),  # size overflows 64 bits
        (IDX_TRAIN[0], lambda c: idx(pixels(12, 6, 7)), "training images are .* but test images"),
        (IDX_TEST[1], lambda c: idx(labels(4)), "5 test images but 4 labels"),
        (IDX_TEST[1], lambda c: idx(labels(5) + 9), "expected test labels 0 to 9, found 13"),
    ],
)
def test_damaged_idx(tmp_path: Path, name: str, damage, message: str) -> None:
    write_idx(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path))


@pytest.mark.parametrize("damage", [cut, lambda c: b"no gzip", lambda c: c[:30] + b"\0\0\0" + c[33:]])
def test_damaged_gzip(tmp_path: Path, damage) -> None:
    write_idx(tmp_path, gz=True)
    path = tmp_path / f"{IDX_TEST[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz: not a complete gzip file"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": pixels(2, 3072)}, "refused.*KeyError"),
        ({b"data": pixels(2, 3071), b"labels": [1, 2]}, r"\(n, 3072\), found uint8 \(2, 3071\)"),
        ({b"data": pixels(2, 3072).astype(np.float32), b"labels": [1, 2]}, "found float32"),
        ({b"data": pixels(2, 3072), b"labels": [1]}, "wanted 2 integer labels"),
        ({b"data": pixels(2, 3072), b"labels": [1, 10]}, "expected training labels 0 to 9, found 10"),
        ([1, 2], "refused.*TypeError"),
    ],
)
def test_wrong_pickle(tmp_path: Path, content: object, message: str) -> None:
    write_cifar(tmp_path, 10, "python3")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path))


def test_damaged_cifar(tmp_path: Path) -> None:
    write_cifar(tmp_path, 10, "python3")
    path = tmp_path / "data_batch_2"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="data_batch_2: refused"):
        data.load(str(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match="missing data_batch_2"):
        data.load(str(tmp_path))


def test_damaged_cifar_bin(tmp_path: Path) -> None:
    write_cifar(tmp_path, 100, "bin")
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="expected rows of 3074 bytes, found 6149 bytes"):
        data.load(str(tmp_path))


def test_digits() -> None:
    pytest.importorskip("sklearn")
    first, second = data.load(), data.load("digits")
    assert (len(first.train), len(first.test), first.classes) == (1437, 360, 10)
    assert first.train.images.shape[1:] == (1, 8, 8)
    assert torch.equal(first.train.images, second.train.images)  # one fixed split
    assert set(first.test.labels.tolist()) == set(range(10))


def test_fm14(tmp_path: Path) -> None:
    """A stand-in of full size whose image i has all pixels i % 256, but for one corner of 2x2."""
    with pytest.raises(ValueError, match="FM14 needs the 60000x1x28x28"):
        write_idx(tmp_path, size=28)
        data.load(str(tmp_path), fm14=True)
    images = np.zeros((60000, 28, 28), np.uint8) + (np.arange(60000) % 256).astype(np.uint8)[:, None, None]
    images[:, :2, :2] = [[0, 1], [2, 4]]
    (tmp_path / IDX_TRAIN[0]).write_bytes(idx(images))
    (tmp_path / IDX_TRAIN[1]).write_bytes(idx(labels(60000)))
    dataset = data.load(str(tmp_path), fm14=True)
    chosen = np.random.default_rng(1234).permutation(60000)[:12800]
    assert dataset.train.images.shape == (12800, 1, 14, 14) and len(dataset.test) == 5
    np.testing.assert_array_equal(dataset.train.images[:, 0, 5, 5], chosen % 256)
    np.testing.assert_array_equal(dataset.train.labels, chosen % 10)
    assert (dataset.train.images[:, 0, 0, 0] == 7 / 4).all()
    # exact in float64 (multiples of 1/4), then rounded once to float32
    torch.testing.assert_close(dataset.train.mean.flatten()[0].double(), dataset.train.images.double().mean())


def test_resnet() -> None:
    net = ResNet(channels=1, classes=10, width=8)
    assert sum(p.numel() for p in net.parameters()) == 19_074
    for size in (8, 14, 15, 32):  # odd sizes too: the shortcut must subsample like the convolution
        assert net(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert ResNet(channels=3, classes=100, blocks=3)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
