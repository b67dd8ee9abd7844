"""Data sets and target samples: splits, draws, and every way in which a stranger's file can be wrong."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fsu_ray.errors import InvalidData, InvalidSamples
from fsu_ray.method.datasets import Images, _digits, draw, load, read_samples, write_samples

GREY, RGB = (1, 8, 12), (3, 8, 12)


def noise(n: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """(N, C, H, W) uint8."""
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encoded(sample: torch.Tensor, kind: str = "PNG", mode: str | None = None) -> bytes:
    """One sample (C, H, W) as an image file."""
    image = Image.fromarray(sample.permute(1, 2, 0).squeeze(-1).numpy())
    sink = io.BytesIO()
    (image.convert(mode) if mode else image).save(sink, kind)
    return sink.getvalue()


def parquet(path, **columns) -> str:
    """A Parquet file with these columns."""
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows(images: Images) -> set[bytes]:
    return {p.numpy().tobytes() for p in images.pixels}


def test_digits_are_split_by_seed_disjoint_and_complete():
    """75:25, no sample on both sides, none lost, the same for a seed."""
    train, test = load("digits", "train", (1, 32, 32)), load("digits", "test", (1, 32, 32))
    assert (len(train), len(test)) == (1348, 449)
    assert rows(train).isdisjoint(rows(test))
    assert len(rows(train)) + len(rows(test)) == 1797
    assert train.pixels.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert set(test.labels.tolist()) == set(range(10))
    again, other = load("digits", "train", (1, 32, 32), seed=0), load("digits", "train", (1, 32, 32), seed=1)
    assert torch.equal(again.pixels, train.pixels)
    assert rows(other) != rows(train)
    assert rows(other) | rows(load("digits", "test", (1, 32, 32), seed=1)) == rows(train) | rows(test)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 16, 20)])
def test_digits_come_at_any_size_and_as_rgb(shape):
    """Grey is repeated over the channels; at 8x8 the pixels are scikit-learn's, 16 being 255."""
    images = load("digits", "test", shape)
    assert images.pixels.shape[1:] == shape
    assert torch.equal(images.pixels, images.pixels[:, :1].expand(-1, shape[0], -1, -1))
    assert int(images.pixels.max()) > 230
    if shape == (1, 8, 8):
        assert set(images.pixels.unique().tolist()) <= {round(v * 255 / 16) for v in range(17)}


def test_the_digits_are_scikit_learns():
    """All of them, in its order: they are read past its own function, which takes seconds to import."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    made = _digits((1, 8, 8))
    assert torch.equal(made.pixels[:, 0], torch.from_numpy((bunch.images * (255 / 16)).round().astype("uint8")))
    assert torch.equal(made.labels, torch.from_numpy(bunch.target))


@pytest.mark.parametrize(("share", "number"), [(5, 5), (0.25, 10), (0.03, 1), (0.001, 1), (1000, 40)])
def test_a_draw_is_seeded_sorted_and_of_the_classes(share, number):
    """A share or a number of the samples of some classes, each once, in order."""
    images = Images(noise(60, GREY), torch.arange(60) % 3)
    index = draw(images, [2, 0, 2], share, 4)
    assert len(index) == number
    assert index.tolist() == sorted(set(index.tolist()))
    assert set(images.labels[index].tolist()) <= {0, 2}
    assert torch.equal(index, draw(images, [0, 2], share, 4))
    assert share == 1000 or not torch.equal(index, draw(images, [0, 2], share, 5))


def test_a_draw_from_nothing_is_refused():
    """The message names the classes."""
    with pytest.raises(InvalidData, match=r"\[7\]"):
        draw(Images(noise(3, GREY), torch.arange(3)), [7], 5, 0)


@pytest.mark.parametrize("shape", [GREY, RGB])
def test_samples_make_the_round_trip(tmp_path, shape):
    """Folder of PNGs, one file, Parquet with plain bytes or Hugging Face's struct: all without loss, in order."""
    pixels = noise(12, shape)
    write_samples(pixels, tmp_path / "new" / "folder")
    assert torch.equal(read_samples(str(tmp_path / "new" / "folder"), shape), pixels)
    assert torch.equal(read_samples(str(tmp_path / "new" / "folder" / "0003.png"), shape), pixels[3:4])
    data = [encoded(p) for p in pixels]
    assert torch.equal(read_samples(parquet(tmp_path / "a.parquet", image=data), shape), pixels)
    structs = [{"bytes": d, "path": None} for d in data]
    assert torch.equal(read_samples(parquet(tmp_path / "b.parquet", image=structs), shape), pixels)


def test_samples_in_subfolders_and_other_files_beside_them(tmp_path):
    """Images are found below the folder; a text file among them is no sample."""
    pixels = noise(2, GREY)
    write_samples(pixels, tmp_path / "deep" / "er")
    (tmp_path / "notes.txt").write_text("none")
    assert torch.equal(read_samples(str(tmp_path), GREY), pixels)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (encoded(noise(1, (1, 12, 8))[0]), "bad.png is 12x8, the model takes 8x12"),
        (encoded(noise(1, RGB)[0]), "bad.png has 3 channels, the model takes 1"),
        (encoded(noise(1, RGB)[0], mode="RGBA"), "bad.png has the colour mode RGBA"),
        (encoded(noise(1, GREY)[0], mode="1"), "bad.png has the colour mode 1"),
        (encoded(noise(1, GREY)[0], mode="I;16"), "bad.png has the colour mode I;16"),
        (encoded(noise(1, RGB)[0], "JPEG", "CMYK"), "bad.png has the colour mode CMYK"),
        (encoded(noise(1, GREY)[0])[:60], "bad.png is not a whole image"),
        (encoded(noise(1, GREY)[0], "JPEG")[:-40], "bad.png is not a whole image"),
        (b"hello", "bad.png is not a whole image"),
        (b"", "bad.png is not a whole image"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "file", "parquet"])
def test_a_bad_sample_is_named_in_one_line(tmp_path, data, says, kind):
    """Wrong size, channels, colour mode, or a damaged file, wherever it lies: InvalidSamples with its name."""
    folder = tmp_path / "samples"
    write_samples(noise(2, GREY), folder)
    (folder / "bad.png").write_bytes(data)
    place = {"folder": str(folder), "file": str(folder / "bad.png"), "parquet": str(tmp_path / "some.parquet")}[kind]
    if kind == "parquet":
        parquet(place, image=[encoded(noise(1, GREY)[0]), data])
        says = says.replace("bad.png", "some.parquet, row 1")
    with pytest.raises(InvalidSamples, match=says.replace(".", r"\.")) as caught:
        read_samples(place, GREY)
    assert "\n" not in str(caught.value)


def test_places_without_samples_are_refused_in_one_line(tmp_path):
    """Missing, an empty folder, a folder of other files, Parquet that is empty, broken or without the column."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "zero.parquet").touch()
    places = {
        str(tmp_path / "missing"): "no samples at",
        str(tmp_path / "empty"): "no image in",
        str(tmp_path / "text"): "no image in",
        str(tmp_path / "broken.parquet"): "not a Parquet file",
        str(tmp_path / "zero.parquet"): "not a Parquet file",
        parquet(tmp_path / "none.parquet", image=pa.array([], pa.binary())): "holds no samples",
        parquet(tmp_path / "other.parquet", label=[1, 2]): "no column 'image'",
        parquet(tmp_path / "null.parquet", image=pa.array([None], pa.binary())): "must hold the bytes",
    }
    for place, says in places.items():
        with pytest.raises(InvalidSamples, match=says) as caught:
            read_samples(place, GREY)
        assert "\n" not in str(caught.value)


def test_a_parquet_file_is_a_data_set(tmp_path):
    """Images and labels stay together over the split; nothing is lost."""
    pixels = noise(20, GREY)
    name = parquet(tmp_path / "set.parquet", image=[encoded(p) for p in pixels], label=list(range(20)))
    train, test = load(name, "train", GREY), load(name, "test", GREY)
    assert (len(train), len(test)) == (15, 5)
    assert sorted([*train.labels.tolist(), *test.labels.tolist()]) == list(range(20))
    for images in (train, test):
        assert torch.equal(images.pixels, pixels[images.labels])


def test_a_folder_of_classes_is_a_data_set(tmp_path):
    """One subfolder a class: by number where all are numbers (10 after 9), else in alphabetical order."""
    pixels = noise(3, RGB)
    for name, order in (("numbers", ["9", "10", "0"]), ("names", ["b", "c", "a"])):
        for sample, label in zip(pixels, order, strict=True):
            write_samples(sample[None], tmp_path / name / label)
        parts = [load(str(tmp_path / name), split, RGB) for split in ("train", "test")]
        found = {int(k): p for part in parts for k, p in zip(part.labels, part.pixels, strict=True)}
        numbers = [9, 10, 0] if name == "numbers" else [1, 2, 0]
        assert sorted(found) == sorted(numbers)
        for number, sample in zip(numbers, pixels, strict=True):
            assert torch.equal(found[number], sample)


def test_a_folder_keeps_its_own_split(tmp_path):
    """With `train` and `test` below it nothing is split again."""
    for split, n in (("train", 3), ("test", 2)):
        write_samples(noise(n, GREY), tmp_path / split / "0")
    assert [len(load(str(tmp_path), split, GREY)) for split in ("train", "test")] == [3, 2]


def test_data_sets_are_fitted_to_the_model(tmp_path):
    """Other sizes are scaled; RGB becomes grey and grey RGB. A flat image stays flat."""
    flat = torch.full((4, 3, 16, 16), 90, dtype=torch.uint8)
    name = parquet(tmp_path / "set.parquet", image=[encoded(p) for p in flat], label=[0, 1, 0, 1])
    for shape in (GREY, RGB, (1, 32, 32)):
        images = load(name, "train", shape)
        assert images.pixels.shape == (3, *shape)
        assert set(images.pixels.unique().tolist()) == {90}


def test_data_sets_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    """Unknown names, folders without classes, files that are no Parquet or lack a column, broken images."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    good = encoded(noise(1, GREY)[0])
    (tmp_path / "cut" / "0").mkdir(parents=True)
    (tmp_path / "cut" / "0" / "a.png").write_bytes(good[:50])
    cases = {
        "imagenet": "no data set 'imagenet'",
        str(tmp_path / "empty"): "no subfolder with images",
        str(tmp_path / "file.txt"): "not a Parquet file",
        str(tmp_path / "cut"): "not a whole image",
        parquet(tmp_path / "unlabelled.parquet", image=[good]): "no column 'label'",
        parquet(tmp_path / "zero.parquet", image=pa.array([], pa.binary()), label=pa.array([], pa.int64())): "no rows",
        parquet(tmp_path / "broken.parquet", image=[good, b"x"], label=[0, 1]): "row 1 is not a whole image",
    }
    for name, says in cases.items():
        with pytest.raises(InvalidData, match=says) as caught:
            load(name, "train", GREY)
        assert "\n" not in str(caught.value)


@pytest.mark.mnist
def test_mnist_is_padded_and_keeps_its_split(mnist):
    """60,000 and 10,000 digits; at 32x32 the border of two pixels is black and the middle is the original."""
    train, test = load("mnist", "train", (1, 32, 32)), load("mnist", "test", (1, 32, 32))
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    own = load("mnist", "test", (1, 28, 28))
    assert torch.equal(test.pixels[..., 2:-2, 2:-2], own.pixels)
    assert int(test.pixels.sum()) == int(own.pixels.sum())
    assert float(train.pixels[..., 2:-2, 2:-2][:5000].float().mean()) / 255 == pytest.approx(0.13, abs=0.01)


@pytest.mark.parametrize(
    ("column", "label"),
    [(["cat.png"], [0]), ([1], [0]), ([{"path": "x"}], [0]), ([b"x"], ["a"]), ([b"x"], [None]), ([b"x"], [1.5])],
)
def test_parquet_columns_of_the_wrong_kind(tmp_path: Path, column: list[object], label: list[object]) -> None:
    """Paths instead of bytes, and labels that are no class numbers, are named."""
    pq.write_table(pa.table({"image": column, "label": label}), tmp_path / "d.parquet")
    with pytest.raises(InvalidData, match="the column"):
        load(str(tmp_path / "d.parquet"), "train", (1, 16, 16))
