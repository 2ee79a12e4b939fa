"""Images held in memory for the examples: `load` finds out what a folder holds.

    digits                  scikit-learn's 1,797 real 8x8 digits, inside the package: nothing to download
    a folder with           Fashion-MNIST or MNIST: the four standard IDX files, gzipped or not
    a folder with           CIFAR-10 or CIFAR-100: the python version's or the binary version's files

Whatever is wrong with a file raises a ValueError that says what was expected and what was found.
"""

import gzip
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# format: (training files, test files, classes); each name also exists with .bin in the binary version
CIFAR_FILES = {
    "CIFAR-10": ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], 10),
    "CIFAR-100": (["train"], ["test"], 100),
}
# All that a pickled array of numbers needs. Anything else in a pickle is a program that would run here.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
PICKLE_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


@dataclass
class Images:
    """One split: images (n, channels, height, width) as stored, int64 labels (n,), and how to standardise.

    mean and std (channels, 1, 1) are those of the training split, in the units of `images`.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Images":
        return Images(*(t.to(device) for t in (self.images, self.labels, self.mean, self.std)))

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Standardised float32 images and labels at `index`. (Stored as bytes, CIFAR takes a quarter.)"""
        return (self.images[index].float() - self.mean) / self.std, self.labels[index]


@dataclass
class Dataset:
    name: str
    train: Images
    test: Images
    classes: int

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device | str) -> "Dataset":
        return Dataset(self.name, self.train.to(device), self.test.to(device), self.classes)


Arrays = tuple[np.ndarray, np.ndarray]  # images (n, channels, height, width), labels (n,)


def load(source: str = "digits", fm14: bool = False) -> Dataset:
    """The data set `source`: "digits" or a folder; fm14: the small Fashion-MNIST task of `reproduce.py`."""
    if fm14:
        return load_fm14(source)
    if source == "digits":
        return load_digits()
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f'expected "digits" or a folder with the data, found no folder {source!r}')
    names = {path.name for path in folder.iterdir()}
    if any(name.removesuffix(".gz") in sum(IDX_FILES.values(), ()) for name in names):
        return _dataset("IDX", _read_idx(folder, "train"), _read_idx(folder, "test"), classes=None)
    for kind, (train, test, classes) in CIFAR_FILES.items():
        for suffix, read in (("", _read_pickle), (".bin", _read_bin)):
            if any(name + suffix in names for name in train + test):
                splits = (_read_cifar(folder, [n + suffix for n in s], read, classes) for s in (train, test))
                return _dataset(kind, *splits, classes=classes)
    found = ", ".join(sorted(names)[:8]) or "nothing"
    raise ValueError(
        f"no known data in {source!r}: found {found}. Expected the four IDX files of Fashion-MNIST or MNIST "
        "(train-images-idx3-ubyte, ...), or the files of CIFAR-10 (data_batch_1 or data_batch_1.bin, ...) or "
        "CIFAR-100 (train or train.bin, ...). Unpack archives and give the folder that holds these files"
    )


def load_digits() -> Dataset:
    """scikit-learn's digits: 1,437 training and 360 test images, always the same split."""
    from sklearn.datasets import load_digits as bundled_digits

    bunch = bundled_digits()
    images, labels = bunch.images[:, None].astype(np.uint8), bunch.target
    # The file is in the order of its writers: unshuffled, the test would be on writers unseen in training.
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    return _dataset("digits", (images[train], labels[train]), (images[test], labels[test]), classes=10)


def load_fm14(folder: str) -> Dataset:
    """FM14: 12,800 fixed training images and all test images of Fashion-MNIST, mean-pooled to 14x14."""
    full = load(folder)
    if full.train.images.shape != (60000, 1, 28, 28):
        shape = "x".join(map(str, full.train.images.shape))
        raise ValueError(
            f"FM14 needs the 60000x1x28x28 training images of Fashion-MNIST, found {shape} ({full.name}) in "
            f"{folder!r}: give the folder with Fashion-MNIST's four IDX files"
        )
    chosen = np.random.default_rng(1234).permutation(60000)[:12800]

    def pooled(split: Images, index: np.ndarray | slice) -> Arrays:
        images = torch.nn.functional.avg_pool2d(split.images[index].float(), 2)
        return images.numpy(), split.labels[index].numpy()

    return _dataset("FM14", pooled(full.train, chosen), pooled(full.test, slice(None)), full.classes)


def _dataset(name: str, train: Arrays, test: Arrays, classes: int | None) -> Dataset:
    """Wrap both splits; mean and std come from the training images alone."""
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"training images are {train[0].shape[1:]} but test images {test[0].shape[1:]}")
    classes = int(train[1].max()) + 1 if classes is None else classes
    for which, (_, labels) in (("training", train), ("test", test)):
        if labels.max() >= classes or labels.min() < 0:
            raise ValueError(f"expected {which} labels 0 to {classes - 1}, found {labels.max()}; damaged?")
    # float64, one channel at a time: all of CIFAR at once would take a gigabyte
    channels = [torch.from_numpy(train[0][:, c]).double() for c in range(train[0].shape[1])]
    mean = torch.tensor([c.mean() for c in channels]).float().view(-1, 1, 1)
    std = torch.tensor([c.std(correction=0) for c in channels]).float().view(-1, 1, 1).clamp_min(1e-6)

    def split(images: np.ndarray, labels: np.ndarray) -> Images:
        return Images(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), mean, std)

    return Dataset(name, split(*train), split(*test), classes)


def _read_idx(folder: Path, split: str) -> Arrays:
    """One split from its pair of IDX files."""
    images, labels = (_read_idx_file(folder, name) for name in IDX_FILES[split])
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {split} images but {len(labels)} labels: mixed data sets?")
    return images[:, None], labels


def _read_idx_file(folder: Path, name: str) -> np.ndarray:
    """The uint8 array of an IDX file: 0, 0, type 8, dimensions; big-endian uint32 sizes; the values."""
    dimensions = 3 if "idx3" in name else 1
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: expected {name} or {name}.gz, found neither; get all four IDX files")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a complete gzip file ({error}); download it again") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes with {dimensions} dimensions (it starts "
            f"0000080{dimensions}), found {content[:4].hex() or 'an empty file'}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = int(np.prod(shape, dtype=object))  # python integers: a damaged header must not overflow
    if expected == 0 or len(content) - header != expected:
        raise ValueError(
            f"{path}: its header promises {shape} values, found {len(content) - header}: damaged or cut off"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _read_cifar(folder: Path, names: list[str], read: Callable[[Path, int], Arrays], classes: int) -> Arrays:
    """Concatenate the files of one CIFAR split."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: expected {', '.join(names)}; missing {', '.join(missing)}")
    parts = [read(folder / name, classes) for name in names]
    images = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([labels for _, labels in parts])


def _read_bin(path: Path, classes: int) -> Arrays:
    """CIFAR's binary version: rows of one label byte (CIFAR-100: coarse, fine) and 3,072 pixel bytes."""
    label_bytes = 2 if classes == 100 else 1
    content = np.fromfile(path, np.uint8)
    row = label_bytes + 3072
    if len(content) == 0 or len(content) % row:
        raise ValueError(f"{path}: expected rows of {row} bytes, found {len(content)} bytes: cut off?")
    rows = content.reshape(-1, row)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and numpy arrays; refuses every other global, hence all code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in PICKLE_ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return PICKLE_ALLOWED[module, name]  # looked up here: nothing is imported by name


def _read_pickle(path: Path, classes: int) -> Arrays:
    """CIFAR's python version: a dict with b"data" (n, 3072) uint8 and the labels, pickled by Python 2."""
    key = b"fine_labels" if classes == 100 else b"labels"
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        images, labels = np.asarray(content[b"data"]), np.asarray(content[key])
    except Exception as error:  # a damaged pickle raises nearly anything
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: refused, not a file of CIFAR's python version ({why})") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or len(images) == 0:
        raise ValueError(f"{path}: expected data of uint8 (n, 3072), found {images.dtype} {images.shape}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: wanted {len(images)} integer labels, found {labels.dtype} {labels.shape}")
    return images, labels
