"""Inversion: the five losses by hand, the single pass against a plain reference, determinism, resuming."""

from __future__ import annotations

import hashlib
import io
import math

import pytest
import torch
import torch.nn.functional as F

from fsu_ray.method import invert as inversion
from fsu_ray.method.augment import random_view, seeded
from fsu_ray.method.group import Group
from fsu_ray.method.invert import (
    augmentation_loss,
    begin,
    bn_loss,
    diversity_loss,
    entropy_loss,
    invert,
    losses,
    tv_loss,
)
from fsu_ray.models.hooks import observe
from fsu_ray.recipes import InvertRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(**changes: object) -> InvertRecipe:
    """A recipe of seconds."""
    return InvertRecipe(**{"steps": 5, "batch": 12, "width": 2, "latent": 8, "precision": "float32"} | changes)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all values, by name."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def through_a_file(state: dict[str, object]) -> dict[str, object]:
    """What a checkpoint gives back: read with weights_only, so the state holds nothing but tensors and numbers."""
    sink = io.BytesIO()
    torch.save(state, sink)
    sink.seek(0)
    return torch.load(sink, weights_only=True)


def test_entropy_loss_is_mean_cross_entropy():
    """Eq. 3 by hand: -log of the probability of the label, mean over the batch."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    assert float(entropy_loss(logits, torch.tensor([0, 1]))) == pytest.approx((math.log(2) + math.log(5)) / 2)


@pytest.mark.parametrize(("squared", "expected"), [(False, (0.5 + 0.1 + 0.2) / 2), (True, (0.25 + 0.01 + 0.04) / 2)])
def test_augmentation_loss_sums_views_and_means_the_batch(squared, expected):
    """Eq. 4: norms (or their squares) of each row's difference; two views of two samples."""
    plain = torch.tensor([[0.3, 0.4], [0.5, 0.5]])
    views = plain + torch.tensor([[[0.3, 0.4], [0.0, 0.0]], [[0.1, 0.0], [0.0, -0.2]]])
    assert float(augmentation_loss(plain, views, squared)) == pytest.approx(expected, abs=1e-5)


def test_augmentation_loss_without_views_is_zero():
    """No view, no loss, and no error."""
    assert float(augmentation_loss(torch.rand(3, 2), torch.zeros(0, 3, 2))) == 0


def test_diversity_loss_agrees_with_loops():
    """Eq. 5 with means over ordered pairs of different samples, dimensions of z and of f_e, class by class."""
    torch.manual_seed(0)
    k, m = 3, 4
    z, f = torch.randn(k * m, 5).double(), torch.randn(k * m, 7).double()
    expected = 0.0
    for c in range(k):
        total = 0.0
        for i in range(c * m, c * m + m):
            for j in range(c * m, c * m + m):
                if i != j:
                    total += float((z[i] - z[j]).square().mean() * (f[i] - f[j]).abs().mean())
        expected += math.exp(-total / (m * (m - 1)))
    assert float(diversity_loss(z, f, k)) == pytest.approx(expected, rel=1e-9)


def test_diversity_loss_lies_between_collapse_and_spread():
    """Collapsed features give exactly the number of classes, far ones nothing."""
    torch.manual_seed(0)
    z = torch.randn(60, 8)
    assert float(diversity_loss(z, torch.ones(60, 9), 10)) == 10
    assert float(diversity_loss(z, 1e4 * torch.randn(60, 9), 10)) < 1e-6
    half = torch.cat((torch.ones(30, 9), 1e4 * torch.randn(30, 9)))
    assert float(diversity_loss(z, half, 10)) == pytest.approx(5)


@pytest.mark.parametrize(("form", "expected"), [("norm", 5 + 2 + 13 + 0), ("squared", 25 + 4 + 169 + 0)])
def test_bn_loss_sums_norms_over_layers(form, expected):
    """Eq. 6: mean and variance of two layers, differences (3, 4), (0, 2), (5, 12), 0."""
    zero = torch.zeros(2)
    layers = [
        (torch.tensor([3.0, 4.0]), torch.tensor([1.0, 3.0]), zero, torch.ones(2)),
        (torch.tensor([5.0, 13.0]), torch.ones(2), torch.tensor([0.0, 1.0]), torch.ones(2)),
    ]
    assert float(bn_loss(layers, form)) == pytest.approx(expected, abs=1e-4)


def test_a_relative_bn_loss_grows_neither_with_depth_nor_with_the_statistics():
    """Two halves of the running deviation and variance a layer make 1, of one layer as of fifty, of small as of large
    statistics; a layer that is dead counts nothing while it stays so."""
    layers = [
        (
            torch.tensor([0.5 * scale, 0.0]),
            torch.tensor([1.5 * scale**2, 0.0]),
            torch.zeros(2),
            torch.tensor([scale**2, 0.0]),
        )
        for scale in (1.0, 300.0)
    ]
    assert float(bn_loss(layers[:1], "relative")) == pytest.approx(1, abs=1e-3)
    assert float(bn_loss(layers * 25, "relative")) == pytest.approx(1, abs=1e-3)
    dead = (torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2))
    assert float(bn_loss([layers[0], dead], "relative")) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("form", ["norm", "squared", "relative"])
def test_bn_loss_is_zero_at_equality_with_a_finite_gradient(form):
    """The norm form has its kink at equality; the gradient there is 0, not nan."""
    mean, variance = torch.rand(3).requires_grad_(), torch.rand(3).requires_grad_()
    loss = bn_loss([(mean, variance, mean.detach().clone(), variance.detach().clone())], form)
    assert float(loss.detach()) < 1e-5
    for gradient in torch.autograd.grad(loss, (mean, variance)):
        assert torch.equal(gradient, torch.zeros(3))


@pytest.mark.parametrize(("squared", "expected"), [(False, (math.sqrt(2 * 9 + 2 * 16) + 0) / 2), (True, (50 + 0) / 2)])
def test_tv_loss_is_the_norm_of_neighbouring_differences(squared, expected):
    """Eq. 7: rows differ by 3, columns by 4 on one image; the other is flat."""
    pixels = torch.tensor([[[[0.0, 4.0], [3.0, 7.0]]], [[[0.5, 0.5], [0.5, 0.5]]]], requires_grad=True)
    loss = tv_loss(pixels, squared)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, pixels)
    assert torch.isfinite(gradient).all()


def plain_losses(classifier, generator, made: InvertRecipe, step: int) -> dict[str, torch.Tensor]:
    """The same step the plain way: float32, one classifier pass a view, cross entropy and norms spelled out."""
    k = classifier.spec.classes
    each = max(2, made.batch // k)
    rng = seeded(made.seed, step)
    z = torch.randn((each * k, made.latent), generator=rng)
    y = torch.tensor([label for label in range(k) for _ in range(each)])
    pixels = generator(z, y)
    with observe(classifier) as seen:
        logits = classifier(pixels)
    p = logits.softmax(1)
    moved = torch.zeros(())
    power = 2 if made.form == "squared" else 1
    for _ in range(made.views):
        view = random_view(pixels, rng, classifier.spec.flip)
        moved = moved + ((classifier(view).softmax(1) - p).norm(dim=1) ** power).mean()
    if made.form == "relative":
        shares = [(m - rm).norm() / rv.sum().sqrt() + (v - rv).norm() / rv.norm() for m, v, rm, rv in seen.statistics]
        bn = sum(shares) / len(shares)
    else:
        bn = sum((m - rm).norm() ** power + (v - rv).norm() ** power for m, v, rm, rv in seen.statistics)
    rows, columns = pixels.diff(dim=2).flatten(1), pixels.diff(dim=3).flatten(1)
    return {
        "bn": bn,
        "entropy": -logits.log_softmax(1)[torch.arange(each * k), y].mean(),
        "augmentation": moved,
        "diversity": diversity_loss(z, seen.features, k),
        "tv": (torch.cat((rows, columns), 1).norm(dim=1) ** power).mean(),
    }


@pytest.mark.parametrize("form", ["norm", "squared", "relative"])
@pytest.mark.parametrize(
    ("arch", "views", "flip"), [("lenet5", 2, True), ("lenet5", 0, False), ("preactresnet18:2", 1, False)]
)
def test_the_single_pass_agrees_with_one_pass_a_view(classifier, form, arch, views, flip):
    """Losses and the generator's gradient are those of the plain reference in float32."""
    judge = classifier(arch, flip=flip, mean=(0.3,), std=(0.5,)).requires_grad_(False)
    made = recipe(form=form, views=views)
    generator = begin(judge, made).generator
    found = losses(judge, generator, made, 3)
    expected = plain_losses(judge, generator, made, 3)
    assert list(found) == ["bn", "entropy", "augmentation", "diversity", "tv"]
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    parameters = list(generator.parameters())
    for mine, reference in zip(
        torch.autograd.grad(sum(found.values()), parameters),
        torch.autograd.grad(sum(expected.values()), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=2e-3, atol=2e-4)


def test_statistics_come_from_the_plain_samples_alone(classifier, monkeypatch):
    """Views that are nothing like the samples do not move the BatchNorm loss."""
    judge, made = classifier(), recipe()
    generator = begin(judge, made).generator
    before = losses(judge, generator, made, 0)
    monkeypatch.setattr(inversion, "moved", lambda pixels, draws, flip: 50 + 0 * pixels)
    after = losses(judge, generator, made, 0)
    torch.testing.assert_close(after["bn"], before["bn"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["diversity"], before["diversity"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after["augmentation"], before["augmentation"])


def test_every_class_is_in_every_batch_at_least_twice(classifier, monkeypatch):
    """The batch is rounded down to whole samples a class, and never below two."""
    judge = classifier()
    asked = []
    monkeypatch.setattr(
        inversion, "entropy_loss", lambda logits, y: asked.append(y.tolist()) or F.cross_entropy(logits, y)
    )
    for batch in (4, 11):
        made = recipe(batch=batch)
        losses(judge, begin(judge, made).generator, made, 0)
    assert asked == [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize(("precision", "threads"), [("float32", 1), ("bf16", 1), ("float32", 2)])
def test_the_same_seed_gives_the_same_generator(classifier, precision, threads):
    """Two runs end with one digest; another seed ends with another."""
    torch.set_num_threads(threads)
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(digests))  # torch's own stream decides nothing
        judge, made = classifier(), recipe(precision=precision, seed=seed, steps=5 if threads == 1 else 2)
        digests.append(digest(invert(judge, made, begin(judge, made)).state_dict()))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_resumed_run_ends_like_an_undisturbed_one(classifier, precision):
    """State taken at 3 of 6 and restored into a new run, through a file: the same bits at the end."""
    judge, made = classifier(), recipe(steps=6, precision=precision)
    states = []
    whole = begin(judge, made)
    generator = invert(judge, made, whole, checkpoint=lambda run: states.append(through_a_file(run.state())), every=3)
    assert [state["step"] for state in states] == [3]
    resumed = begin(judge, made)
    resumed.restore(states[0])
    again = invert(judge, made, resumed)
    assert digest(again.state_dict()) == digest(generator.state_dict())
    assert digest(states[0]["generator"]) != digest(generator.state_dict())


def test_progress_and_checkpoints_come_when_promised(classifier):
    """A checkpoint every `every` steps but not at the end; progress at tens and at the end, with all five losses."""
    judge, made = classifier(), recipe(steps=12)
    heard, kept = [], []
    invert(judge, made, begin(judge, made), lambda *a: heard.append(a), lambda run: kept.append(run.step), every=4)
    assert kept == [4, 8]
    assert [(step, total) for step, total, _ in heard] == [(10, 12), (12, 12)]
    assert set(heard[0][2]) == {"bn", "entropy", "augmentation", "diversity", "tv"}


def test_a_warm_start_takes_what_fits_alone(classifier):
    """Weights of another width: only tensors of the same name and shape are taken over."""
    judge = classifier()
    wide = begin(judge, recipe(width=3, seed=9)).generator.state_dict()
    cold = begin(judge, recipe()).generator.state_dict()
    warm = begin(judge, recipe(), {k: v + 1 for k, v in wide.items()} | {"other": torch.ones(1)}).generator.state_dict()
    fits = {name for name in cold if wide[name].shape == cold[name].shape}
    assert "conv3.bias" in fits
    assert "conv1.weight" not in fits
    for name, value in warm.items():
        assert torch.equal(value, wide[name] + 1 if name in fits else cold[name]), name
    same = begin(judge, recipe(), dict(cold)).generator.state_dict()
    assert digest(same) == digest(cold)


def test_inversion_leaves_the_classifier_as_it_was(classifier):
    """Weights, running statistics, mode and requires_grad are the same afterwards; no gradient, no hook is left."""
    judge, made = classifier("preactresnet18:2"), recipe()
    before = digest(judge.state_dict())
    generator = invert(judge, made, begin(judge, made))
    assert digest(judge.state_dict()) == before
    assert not judge.training
    assert not generator.training
    assert all(p.requires_grad and p.grad is None for p in judge.parameters())
    assert all(not m._forward_pre_hooks for m in judge.modules())


def test_inversion_lowers_the_loss(classifier):
    """Sixty steps bring the weighted sum below where it began."""
    judge, made = classifier(), recipe(steps=60, lr=1e-2)
    weights = made.weights.model_dump()
    run = begin(judge, made)

    def total() -> float:
        with torch.no_grad():
            found = [losses(judge, run.generator.train(), made, step) for step in range(100, 104)]
        return sum(weights[name] * float(value) for loss in found for name, value in loss.items())

    first = total()
    invert(judge, made, run)
    assert total() < 0.9 * first


def test_the_optimiser_is_that_of_the_recipe(classifier):
    """Adam with its rate, betas and decay; the fused one on a GPU alone, where its results are the same."""
    made = recipe(lr=0.02, betas=(0.4, 0.8), weight_decay=0.3)
    options = begin(classifier(), made).optimiser.defaults
    assert (options["lr"], options["betas"], options["weight_decay"]) == (0.02, (0.4, 0.8), 0.3)
    assert options["fused"] is None


def test_losses_of_a_share_count_by_its_weight(classifier):
    """Those of the whole batch, eq. 5 and 6, are the same on every rank."""

    class Half(Group):
        def weight(self, own: int, n: int) -> float:
            return 0.5

    judge, made = classifier(), recipe()
    generator = begin(judge, made).generator
    whole, half = (losses(judge, generator, made, 0, group) for group in (Group(), Half()))
    for name, value in whole.items():
        share = 0.5 if name in ("entropy", "augmentation", "tv") else 1.0
        torch.testing.assert_close(half[name], share * value)


def test_without_views_nothing_is_compared(classifier):
    """Not even a sample with itself, whose distance has a root that is not 0."""
    judge, made = classifier(), recipe(views=0)
    assert float(losses(judge, begin(judge, made).generator, made, 0)["augmentation"]) == 0.0


def test_a_generator_is_trained_in_train_mode(classifier):
    """Whatever mode it came in."""
    judge, made = classifier(), recipe()
    run = begin(judge, made)
    run.generator.eval()
    ended = digest(invert(judge, made, run).state_dict())
    assert ended == digest(invert(judge, made, begin(judge, made)).state_dict())


@pytest.mark.parametrize(
    ("done", "share"), [(0.0, 1.0), (0.49, 1.0), (0.5, 1.0), (2 / 3, 0.75), (0.75, 0.5), (1.0, 0.0)]
)
def test_the_learning_rate_is_held_and_then_falls_by_half_a_cosine(done: float, share: float) -> None:
    assert inversion.decay(done) == pytest.approx(share)


def test_total_variation_is_a_norm_unless_it_is_squared() -> None:
    """One step of height .3 in each of two rows of an image: the norm of two differences."""
    pixels = torch.zeros(1, 1, 2, 2)
    pixels[..., 1] = 0.3
    assert float(tv_loss(pixels)) == pytest.approx(0.3 * math.sqrt(2))
    assert float(tv_loss(pixels, squared=True)) == pytest.approx(2 * 0.09)


def test_draws_without_views_have_no_moves_of_four_numbers() -> None:
    z, moves = inversion.draws(3, recipe(views=0), 0)
    assert (z.shape, moves.shape) == ((12, 8), (0, 12, 4))


def test_the_generators_batch_norms_are_those_of_the_whole_batch(classifier) -> None:
    """The group is told of the generator before the first step (`Group.synchronise`)."""
    told = []

    class Noting(Group):
        def synchronise(self, module: torch.nn.Module) -> None:
            told.append(module)

    run = begin(classifier(), recipe(steps=1))
    invert(classifier(), recipe(steps=1), run, group=Noting())
    assert told == [run.generator]
