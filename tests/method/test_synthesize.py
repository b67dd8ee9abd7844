"""Synthesis: the two tests of eq. 8, D' as bytes, starved classes, seeds."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from fsu_ray.errors import StorageError
from fsu_ray.method import synthesize as synthesis
from fsu_ray.method.augment import seeded
from fsu_ray.method.fit import predict
from fsu_ray.method.synthesize import Synthetic, entropy, starved_classes, synthesize, trustworthy
from fsu_ray.recipes import SynthesizeRecipe
from fsu_ray.records import ModelSpec

SPEC = ModelSpec(arch="lenet5", channels=1, height=16, width=16, classes=3)
pytestmark = pytest.mark.usefixtures("one_thread")


class Judge(nn.Module):
    """A classifier that is sure of `brightest` for bright samples: logits from the mean of the pixels."""

    spec = SPEC

    def __init__(self, blind: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.blind = blind  # a class of which it is never sure

    def forward(self, pixels: Tensor) -> Tensor:
        found = (pixels.mean((1, 2, 3)) * 3).long().clamp(max=2)
        sure = torch.where(found == self.blind, 0.0, 9.0) if self.blind is not None else torch.full_like(found, 9.0)
        return nn.functional.one_hot(found, 3) * sure[:, None].float()


class Painter(nn.Module):
    """A generator that draws flat images, bright as their class, with a little of z in them."""

    latent = 4

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        bright = (y.float() + 0.5) / 3 + 0.02 * z[:, 0].tanh()
        return bright.view(-1, 1, 1, 1).expand(-1, 1, 16, 16) + 0.001 * z[:, 1].sigmoid().view(-1, 1, 1, 1)


def recipe(**changes: object) -> SynthesizeRecipe:
    """Small and without rotation, which would darken flat images at the border."""
    return SynthesizeRecipe(**{"per_class": 20, "entropy_threshold": 0.867, "rotation": 0.0, "max_draws": 30} | changes)


def same(a: Synthetic, b: Synthetic) -> bool:
    """Bit for bit."""
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def test_entropy_is_in_nats():
    """[.91, .01 x 9] has .500 (the method sheet's t_ent), the uniform distribution log K, a sure one 0."""
    sheet = torch.tensor([[0.91] + [0.01] * 9]).log()
    assert float(entropy(sheet)) == pytest.approx(0.500, abs=5e-4)
    assert float(entropy(sheet + 7)) == pytest.approx(float(entropy(sheet)), abs=1e-5)
    for k in (2, 10):
        assert float(entropy(torch.zeros(1, k))) == pytest.approx(math.log(k))
    assert float(entropy(torch.tensor([[1000.0, 0.0]]))) == 0


class Scripted(nn.Module):
    """Gives logits that depend on the view alone: plain, turned left, turned right."""

    def __init__(self, views: list[list[float]]) -> None:
        super().__init__()
        self.views = torch.tensor(views)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.views.repeat_interleave(len(pixels) // 3, 0)


SURE, OTHER, UNSURE = [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("views", "passes"),
    [
        ([SURE, SURE, SURE], True),
        ([UNSURE, SURE, SURE], False),
        ([SURE, UNSURE, SURE], False),
        ([SURE, SURE, UNSURE], False),
        ([SURE, OTHER, SURE], False),
        ([SURE, SURE, OTHER], False),
        ([OTHER, SURE, SURE], False),
        ([OTHER, OTHER, OTHER], True),
    ],
)
def test_every_view_must_be_sure_and_of_one_mind(views, passes):
    """High entropy on any view, or another class on any view, refuses a sample."""
    passed, logits, uncertainty = trustworthy(Scripted(views), torch.zeros(2, 1, 16, 16), recipe())
    assert passed.tolist() == [passes, passes]
    assert torch.equal(logits, torch.tensor([views[0]] * 2))
    highest = max(float(entropy(torch.tensor([view]))) for view in views)
    assert uncertainty.tolist() == pytest.approx([highest] * 2)


def test_the_views_are_plain_left_and_right(monkeypatch):
    """The two turned views are `rotation` degrees to either side."""
    asked = []
    monkeypatch.setattr(synthesis, "rotated", lambda pixels, degrees: asked.append(degrees) or pixels)
    trustworthy(Scripted([SURE] * 3), torch.zeros(1, 1, 16, 16), recipe(rotation=15.0))
    assert sorted(asked) == [-15.0, 15.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_data_set_makes_the_round_trip_exactly(channels):
    """Parquet and back: all five columns, dtypes included."""
    torch.manual_seed(0)
    n = 11
    made = Synthetic(
        torch.randint(0, 256, (n, channels, 16, 12), dtype=torch.uint8),
        torch.randn(n, 3),
        torch.rand(n),
        torch.arange(n) % 3,
        torch.arange(n) % 4 == 0,
    )
    again = Synthetic.from_bytes(made.to_bytes())
    assert same(made, again)
    assert [getattr(again, f).dtype for f in made.__dataclass_fields__] == [
        torch.uint8,
        torch.float32,
        torch.float32,
        torch.int64,
        torch.bool,
    ]
    assert again.to_bytes() == made.to_bytes()
    assert torch.equal(again.predicted, made.logits.argmax(1))


@pytest.mark.parametrize("data", [b"", b"no parquet", b"PAR1PAR1"])
def test_other_bytes_are_a_storage_error(data):
    """Whatever is not a synthetic data set ends in StorageError."""
    with pytest.raises(StorageError):
        Synthetic.from_bytes(data)


def test_every_class_gets_its_number():
    """A willing generator fills each class; the figures say so, and holdout is about its share."""
    made, metrics = synthesize(Judge(), Painter(), recipe(per_class=300, holdout=0.2))
    assert metrics == {"acceptance": [1.0, 1.0, 1.0], "count": [300, 300, 300]}
    assert made.condition.tolist() == sorted(made.condition.tolist())
    assert torch.equal(made.condition, made.predicted)
    assert made.pixels.dtype == torch.uint8
    assert made.pixels.shape == (900, 1, 16, 16)
    assert 0.12 < float(made.holdout.float().mean()) < 0.28
    assert float(made.entropy.max()) < 0.5


def test_a_class_that_never_passes_ends_and_is_starved():
    """Draws stop at max_draws * per_class; the class is empty, named starved, and the others are whole."""
    calls = []
    painter = Painter()
    painter.register_forward_pre_hook(lambda _, inputs: calls.append(int(inputs[1][0])))
    asked = recipe(per_class=100, max_draws=10)
    made, metrics = synthesize(Judge(blind=1), painter, asked)
    assert metrics == {"acceptance": [1.0, 0.0, 1.0], "count": [100, 0, 100]}
    assert calls == [0, 1, 2, 1, 1, 1]  # 4 chunks of 250 are the 1,000 draws
    assert starved_classes(metrics["count"], asked) == [1]
    assert len(made) == 200


@pytest.mark.parametrize(("count", "starved"), [([10, 9, 0], [1, 2]), ([10, 100, 10], []), ([0, 0, 0], [0, 1, 2])])
def test_starved_is_below_a_share_of_the_number_asked(count, starved):
    """starved_below * per_class itself is enough."""
    assert starved_classes(count, recipe(per_class=100, starved_below=0.1)) == starved


def test_the_same_seed_draws_the_same_data_set():
    """Two draws agree bit for bit whatever torch's own stream is at; another seed draws others."""
    torch.manual_seed(1)
    first, _ = synthesize(Judge(), Painter(), recipe())
    torch.manual_seed(2)
    again, _ = synthesize(Judge(), Painter(), recipe())
    other, _ = synthesize(Judge(), Painter(), recipe(seed=1))
    assert first.to_bytes() == again.to_bytes()
    assert not torch.equal(first.pixels, other.pixels)


def test_a_classes_draws_do_not_depend_on_the_other_classes():
    """Each chunk has a seed of its own: class 2 is the same whether class 1 took one chunk or many."""
    whole, _ = synthesize(Judge(), Painter(), recipe())
    gap, _ = synthesize(Judge(blind=1), Painter(), recipe())
    assert torch.equal(whole.pixels[whole.condition == 2], gap.pixels[gap.condition == 2])


def test_labels_are_those_of_the_stored_bytes(classifier):
    """The logits agree with the classifier on the uint8 pixels, not on what the generator drew before rounding."""
    judge = classifier(size=16)
    asked = recipe(entropy_threshold=5.0, rotation=15.0)
    made, _ = synthesize(judge, Painter(), asked)
    assert len(made) > 0
    torch.testing.assert_close(predict(judge, made.pixels), made.logits, rtol=1e-4, atol=1e-5)
    passed, _, uncertainty = trustworthy(judge, made.pixels.float() / 255, asked)
    assert bool(passed.all())
    torch.testing.assert_close(uncertainty, made.entropy, rtol=1e-4, atol=1e-5)


def test_an_empty_data_set_round_trips_and_strange_bytes_are_named() -> None:
    """All classes starved gives an empty D', which is read back; anything else is StorageError on one line."""
    none = Synthetic(
        torch.zeros((0, 1, 16, 16), dtype=torch.uint8), torch.zeros((0, 3)), torch.zeros(0), torch.zeros(0).long(),
        torch.zeros(0) > 0,
    )  # fmt: skip
    back = Synthetic.from_bytes(none.to_bytes())
    assert (len(back), back.pixels.shape, back.logits.shape) == (0, (0, 1, 16, 16), (0, 3))
    for data in (b"", b"PAR1 nonsense PAR1", none.to_bytes()[:-20]):
        with pytest.raises(StorageError) as error:
            Synthetic.from_bytes(data)
        assert "\n" not in str(error.value)


def test_the_last_class_is_counted_though_it_is_empty() -> None:
    """The count has an entry for each class."""
    _, metrics = synthesize(Judge(blind=2), Painter(), recipe(per_class=10, max_draws=25))
    assert metrics == {"acceptance": [1.0, 1.0, 0.0], "count": [10, 10, 0]}


def test_an_entropy_at_the_threshold_does_not_pass() -> None:
    """Eq. 8: it must be below."""
    uniform = [[0.0, 0.0, 0.0]] * 3
    at = float(entropy(torch.zeros(1, 3)))
    for threshold, passes in ((at, False), (at + 1e-6, True)):
        passed, _, _ = trustworthy(Scripted(uniform), torch.zeros(1, 1, 16, 16), recipe(entropy_threshold=threshold))
        assert passed.tolist() == [passes]


def test_a_class_that_has_its_number_draws_no_more() -> None:
    """One chunk of 250 is enough for 250; progress tells of the class that has least, and how many lacked samples."""
    calls: list[tuple[int, int, dict[str, float]]] = []
    asked = recipe(per_class=250)
    synthesize(Judge(), Painter(), asked, on_step=lambda *values: calls.append(values))
    assert calls == [(250, 250, {"lacking": 3.0})]


def test_a_chunk_is_250_draws_with_a_seed_of_its_own() -> None:
    """The first sample of the second chunk is drawn by the seed, the class and the chunk's number."""
    made, _ = synthesize(Judge(), Painter(), recipe(per_class=251, seed=4))
    z = torch.randn((250, Painter.latent), generator=seeded(4, 2, 1))
    expected = (Painter()(z, torch.full((250,), 2)) * 255).round().byte()
    assert torch.equal(made.pixels[made.condition == 2][250], expected[0])


def test_the_artifact_is_compressed_by_zstd() -> None:
    made, _ = synthesize(Judge(), Painter(), recipe())
    column = pq.ParquetFile(pa.BufferReader(made.to_bytes())).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
