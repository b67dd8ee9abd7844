"""Labelled images as uint8 tensors: scikit-learn's digits, MNIST, CIFAR-10, image folders, Parquet files.

A data set is named by `digits`, `mnist`, `cifar10`, or a path: a folder of images (one subfolder a
class for labelled ones) or a Parquet file with the columns `image` (encoded bytes) and `label`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fsu_ray.errors import InvalidData, InvalidSamples

Split = Literal["train", "test"]
NAMED = ("digits", "mnist", "cifar10")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Images:
    """pixels (N, C, H, W) uint8; labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Tensor) -> Images:
        """The samples at `index` (positions or a bool mask), in that order."""
        return Images(self.pixels[index], self.labels[index])


def load(name: str, split: Split, shape: tuple[int, int, int], seed: int = 0) -> Images:
    """The data set `name` at `shape` (C, H, W).

    digits and single files are split 75:25 by `seed`; MNIST and CIFAR-10 keep their own split; a
    folder with `train` and `test` subfolders too. Raises InvalidData where it cannot be read.
    """
    if name == "digits":
        return _split(_digits(shape), split, seed)
    if name == "mnist":
        return _torchvision("MNIST", split, shape)
    if name == "cifar10":
        return _cifar10(split, shape)
    path = Path(name).expanduser()
    if path.is_dir():
        own = path / split
        return _folder(own, shape) if own.is_dir() else _split(_folder(path, shape), split, seed)
    if path.is_file():
        return _split(_parquet(path, shape), split, seed)
    raise InvalidData(f"no data set {name!r}: use digits, mnist, cifar10, an image folder or a Parquet file")


def draw(images: Images, classes: Iterable[int], share: float | int, seed: int) -> Tensor:
    """Positions of target samples drawn at random from `classes`: a share below 1, or a number. Sorted.

    The draw depends on `seed` alone; raises InvalidData where there are none to draw from.
    """
    wanted = torch.tensor(sorted(set(classes)))
    members = torch.isin(images.labels, wanted).nonzero().flatten()
    number = share if isinstance(share, int) else round(share * len(members))
    number = min(max(number, 1), len(members))
    if not len(members):
        raise InvalidData(f"the data set has no sample of the classes {wanted.tolist()}")
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
    return members[order[:number]].sort().values


def read_samples(location: str, shape: tuple[int, int, int]) -> Tensor:
    """Target samples from a folder, one image file or a Parquet file: (M, C, H, W) uint8.

    Nothing is resized or converted: a sample that does not have the model's size and channels is an
    error, because a resized sample is no longer the one that the model was trained on.
    Raises InvalidSamples, naming the file.
    """
    path = Path(location).expanduser()
    if not path.exists():
        raise InvalidSamples(f"no samples at {location}: give a folder of images, an image or a Parquet file")
    if path.is_dir():
        files = _image_files(path)
        if not files:
            raise InvalidSamples(
                f"no image in {location}: give a folder that holds {', '.join(sorted(SUFFIXES))} files"
            )
        rows = [_decode(file.read_bytes(), shape, file.name) for file in files]
    elif path.suffix.lower() == ".parquet":
        try:
            column = _read_parquet(path, ["image"])["image"]
        except InvalidData as error:
            raise InvalidSamples(str(error)) from None
        if not column:
            raise InvalidSamples(f"{path.name} holds no samples: give at least one")
        rows = [_decode(data, shape, f"{path.name}, row {i}") for i, data in enumerate(column)]
    else:
        rows = [_decode(path.read_bytes(), shape, path.name)]
    return torch.stack(rows)


def moons(number: int, noise: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's two moons: points (N, 2) float64 and labels (N,) of 0 and 1."""
    from sklearn.datasets import make_moons

    points, labels = (torch.from_numpy(each) for each in make_moons(number, noise=noise, random_state=seed))
    return points, labels.double()


def write_samples(pixels: Tensor, folder: Path) -> None:
    """Write (M, C, H, W) uint8 as PNG files that `read_samples` reads back without loss."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, sample in enumerate(pixels):
        array = sample.permute(1, 2, 0).squeeze(-1).numpy()
        Image.fromarray(array).save(folder / f"{i:04d}.png")


def _decode(data: bytes, shape: tuple[int, int, int], name: str) -> Tensor:
    """One encoded image as (C, H, W) uint8; refuses what does not fit."""
    channels, rows, columns = shape
    try:
        with Image.open(io.BytesIO(data)) as file:
            with warnings.catch_warnings():  # what PIL thinks of odd metadata is nothing to a requester
                warnings.simplefilter("ignore")
                file.load()
            image: Image.Image = file
            bands = len(image.getbands())
            if image.mode == "P":
                image = image.convert("RGB")
                bands = 3
            if image.mode not in ("L", "RGB"):
                raise InvalidSamples(f"{name} has the colour mode {image.mode}: save it as greyscale or RGB, 8 bits")
            array = np.array(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        raise InvalidSamples(f"{name} is not a whole image: remove it or save it again") from None
    if bands != channels:
        raise InvalidSamples(f"{name} has {bands} channels, the model takes {channels}")
    if array.shape[:2] != (rows, columns):
        size = f"{array.shape[0]}x{array.shape[1]}"
        raise InvalidSamples(f"{name} is {size}, the model takes {rows}x{columns} (height x width): resize it")
    return torch.from_numpy(array.reshape(rows, columns, channels)).permute(2, 0, 1).contiguous()


def _image_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())


def _fit(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(N, C', H', W') uint8 at the size and channels of `shape`: bilinear, grey from the mean, RGB by repeating."""
    channels, rows, columns = shape
    if pixels.shape[1] != channels:
        if channels == 1:
            pixels = pixels.float().mean(1, keepdim=True).round().byte()
        elif pixels.shape[1] == 1:
            pixels = pixels.expand(-1, channels, -1, -1)
        else:
            raise InvalidData(f"images with {pixels.shape[1]} channels cannot be fed to a model of {channels}")
    if pixels.shape[2:] != (rows, columns):
        size = (rows, columns)
        scaled = F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        pixels = scaled.round().clamp(0, 255).byte()
    return pixels.contiguous()


def _split(images: Images, split: Split, seed: int) -> Images:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = round(0.75 * len(images))
    return images.take((order[:cut] if split == "train" else order[cut:]).sort().values)


def _digits(shape: tuple[int, int, int]) -> Images:
    """scikit-learn's 1,797 digits of 8x8 pixels with 17 grey levels, from the file in its wheel: importing it costs
    seconds."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations
    table = np.loadtxt(Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", delimiter=",")
    pixels = torch.from_numpy(np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return Images(_fit(pixels, shape), torch.from_numpy(table[:, -1].astype(np.int64)))


def _data_root() -> Path:
    """Where downloads lie: FSU_DATA, else the user's cache."""
    return Path(os.environ.get("FSU_DATA") or Path.home() / ".cache" / "fsu_ray").expanduser()


def _torchvision(kind: str, split: Split, shape: tuple[int, int, int]) -> Images:
    """MNIST at 32x32 is padded by 2 as is usual for LeNet5, not stretched."""
    import gzip

    from torchvision import datasets

    root = _data_root()
    raw = root / kind / "raw"
    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    if all((raw / f"{name}.gz").exists() for name in names):  # read in place: the folder may be read-only
        image_bytes, label_bytes = (gzip.decompress((raw / f"{name}.gz").read_bytes()) for name in names)
        pixels = torch.frombuffer(bytearray(image_bytes[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
        labels = torch.frombuffer(bytearray(label_bytes[8:]), dtype=torch.uint8).long()
    else:
        try:
            mnist = datasets.MNIST(str(root), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise InvalidData(f"MNIST is neither in {root} nor can it be downloaded ({error}); set FSU_DATA") from None
        pixels, labels = mnist.data[:, None], mnist.targets.long()
    if shape[1:] == (32, 32):
        pixels = F.pad(pixels, (2, 2, 2, 2))
    return Images(_fit(pixels, shape), labels)


def _cifar10(split: Split, shape: tuple[int, int, int]) -> Images:
    """CIFAR-10 from FSU_DATA/CIFAR10/{split}.parquet, else from torchvision's own files, else downloaded."""
    from torchvision import datasets

    root = _data_root()
    file = root / "CIFAR10" / f"{split}.parquet"
    if file.exists():
        return _parquet(file, shape)
    try:
        cifar = datasets.CIFAR10(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise InvalidData(f"CIFAR-10 is neither in {root} nor can it be downloaded ({error}); set FSU_DATA") from None
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    return Images(_fit(pixels, shape), torch.tensor(cifar.targets))


def _folder(path: Path, shape: tuple[int, int, int]) -> Images:
    """One subfolder a class, numbered in the order of their names (numerically where all are numbers)."""
    names = [d.name for d in path.iterdir() if d.is_dir() and _image_files(d)]
    names.sort(key=(lambda n: (int(n), n)) if all(n.isdigit() for n in names) else (lambda n: (0, n)))
    if not names:
        raise InvalidData(f"{path} has no subfolder with images: put the images of each class into a folder of its own")
    numbers = [int(n) for n in names] if all(n.isdigit() for n in names) else list(range(len(names)))
    rows, labels = [], []
    for name, number in zip(names, numbers, strict=True):
        for file in _image_files(path / name):
            rows.append(_open(file.read_bytes(), shape, str(file)))
            labels.append(number)
    return Images(torch.cat(rows), torch.tensor(labels))


def _read_parquet(path: Path, columns: list[str]) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InvalidData(f"{path} is not a Parquet file that can be read ({str(error).splitlines()[0]})") from None
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise InvalidData(f"{path} has no column {missing[0]!r}: it needs `image` (encoded bytes) and `label`")
    # Hugging Face's files keep the bytes in a struct
    rows = {c: table[c].to_pylist() for c in columns}
    rows["image"] = [row.get("bytes") if isinstance(row, dict) else row for row in rows["image"]]
    if not all(isinstance(row, bytes) for row in rows["image"]):
        raise InvalidData(f"{path}: the column `image` must hold the bytes of encoded images (PNG, JPEG)")
    if not all(isinstance(row, int) and row >= 0 for row in rows.get("label", [])):
        raise InvalidData(f"{path}: the column `label` must hold class numbers from 0")
    return rows


def _parquet(path: Path, shape: tuple[int, int, int]) -> Images:
    columns = _read_parquet(path, ["image", "label"])
    if not columns["image"]:
        raise InvalidData(f"{path} holds no rows")
    rows = [_open(data, shape, f"{path}, row {i}") for i, data in enumerate(columns["image"])]
    return Images(torch.cat(rows), torch.tensor(columns["label"], dtype=torch.int64))


def _open(data: bytes, shape: tuple[int, int, int], name: str) -> Tensor:
    """One image of a training or test set, fitted to `shape`: (1, C, H, W)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            array = np.array(image.convert("L" if shape[0] == 1 else "RGB"))
    except (UnidentifiedImageError, OSError, ValueError, TypeError):
        raise InvalidData(f"{name} is not a whole image") from None
    pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
    return _fit(pixels[None], shape)
