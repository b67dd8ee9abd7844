"""Filtration: distances by brute force, thresholds and their bounds, masks, relabelling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsu_ray.errors import StorageError
from fsu_ray.method.filter import (
    Mask,
    allowed_classes,
    bandwidth,
    distances,
    extract_features,
    knee,
    knee_threshold,
    least_share,
    leave_one_out,
    own_share,
    relabel,
    select,
)
from fsu_ray.models.hooks import observe
from fsu_ray.recipes import FilterRecipe
from fsu_ray.records import Behaviour

METRICS = ["rbf", "cosine", "l2"]


def cloud(n: int, seed: int, centre: float = 0.0, dims: int = 4) -> torch.Tensor:
    """Points around `centre`."""
    return centre + torch.randn((n, dims), generator=torch.Generator().manual_seed(seed))


def by_hand(a: torch.Tensor, b: torch.Tensor, metric: str, width: float) -> float:
    """One distance, from the definition."""
    x, y = a.double().tolist(), b.double().tolist()
    squared = sum((p - q) ** 2 for p, q in zip(x, y, strict=True))
    if metric == "l2":
        return math.sqrt(squared)
    if metric == "rbf":
        return 1 - math.exp(-squared / (2 * width))
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return 1 - dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


@pytest.mark.parametrize("metric", METRICS)
def test_distances_agree_with_double_loops(metric):
    """Mean over the examples of each definition, and the same over chunks."""
    features, examples = cloud(9, 1), cloud(5, 2, 0.5)
    width = bandwidth(examples)
    expected = [sum(by_hand(f, e, metric, width) for e in examples) / 5 for f in features]
    assert distances(features, examples, metric).tolist() == pytest.approx(expected, abs=1e-5)
    many = features.repeat(1000, 1)  # above one chunk
    assert distances(many, examples, metric).view(1000, 9)[-1].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_leave_one_out_agrees_with_double_loops(metric):
    """Mean distance of each example to the others, never to itself."""
    examples = cloud(6, 3)
    width = bandwidth(examples)
    expected = [
        sum(by_hand(a, b, metric, width) for j, b in enumerate(examples) if j != i) / 5 for i, a in enumerate(examples)
    ]
    assert leave_one_out(examples, metric).tolist() == pytest.approx(expected, abs=1e-5)


def test_bandwidth_is_the_median_squared_distance():
    """Three points with squared distances 1, 4 and 9: the middle one. One point, or equal ones, divide by no zero."""
    assert bandwidth(torch.tensor([[0.0], [1.0], [3.0]])) == pytest.approx(4)
    assert bandwidth(torch.zeros(1, 3)) == 1
    assert bandwidth(torch.zeros(4, 3)) > 0
    assert leave_one_out(torch.zeros(1, 3)).tolist() == [0]
    assert torch.isfinite(distances(cloud(3, 0), torch.zeros(4, 4))).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("policy", ["leave-one-out", "knee", "manual"])
def test_the_near_are_selected_and_the_far_are_not(metric, policy):
    """The sign of eq. 9: samples like the examples are D_e-like; the paper's literal form selects the others."""
    examples = cloud(30, 1, 3.0)
    features = torch.cat((cloud(20, 2, 3.0) * 0.1 + 2.7, -cloud(20, 3, 30.0)))  # close to the centre, and far off
    threshold = {"rbf": 0.6, "cosine": 0.5, "l2": 5.0}[metric] if policy == "manual" else None
    recipe = FilterRecipe(policy=policy, metric=metric, threshold=threshold)
    behaviour = Behaviour(name="some", kind="subset", targets=(1,))
    mask = select(recipe, behaviour, features, torch.ones(40, dtype=torch.long), examples)
    assert mask.is_forget[:20].float().mean() > 0.5
    assert not bool(mask.is_forget[20:].any())
    assert mask.policy == policy
    assert not mask.whole_class
    assert mask.threshold is not None


def test_leave_one_out_takes_the_quantile():
    """t_f is the quantile of the leave-one-out distances, the largest one at 1; `<=` holds at t_f itself."""
    examples, features = cloud(10, 1), cloud(200, 2)
    behaviour = Behaviour(name="some", kind="subset", targets=(0,))
    seen = torch.zeros(200, dtype=torch.long)
    found, own = distances(features, examples), leave_one_out(examples)
    for quantile in (0.25, 0.85, 1.0):
        mask = select(FilterRecipe(quantile=quantile), behaviour, features, seen, examples)
        assert mask.policy == "leave-one-out"
        assert mask.threshold == pytest.approx(float(own.quantile(quantile)))
        assert torch.equal(mask.is_forget, found <= mask.threshold)
    assert mask.threshold == float(own.max())


def test_manual_takes_the_threshold_it_is_given():
    """The policy manual decides by the number of the recipe alone."""
    features, examples = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(2, 1)
    behaviour = Behaviour(name="some", kind="subset", targets=(0,))
    recipe = FilterRecipe(policy="manual", metric="l2", threshold=2.0)
    mask = select(recipe, behaviour, features, torch.zeros(4, dtype=torch.long), examples)
    assert mask.threshold == 2.0
    assert mask.is_forget.tolist() == [True, True, True, False]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_the_knee_stays_within_its_bounds(metric, seed):
    """Mean leave-one-out <= t_f <= the largest, wherever kneed finds a knee or none."""
    examples = cloud(12, seed)
    own = leave_one_out(examples, metric)
    curves = [
        distances(torch.cat((cloud(50, seed + 9), cloud(200, seed + 10, 4.0))), examples, metric),
        distances(cloud(300, seed + 11), examples, metric),
        torch.linspace(0, 1, 40),
        torch.full((30,), 0.5),
        torch.rand(2),
    ]
    for found in curves:
        threshold = knee_threshold(found, examples, metric)
        assert float(own.mean()) - 1e-6 <= threshold <= float(own.max()) + 1e-6


def test_class_policy_takes_every_sample_of_the_targets():
    """`auto` is `class` for a class: no distance decides, and the targets go everywhere."""
    predicted = torch.tensor([0, 1, 2, 1, 0])
    behaviour = Behaviour(name="ones and twos", kind="class", targets=(2, 1))
    mask = select(FilterRecipe(), behaviour, cloud(5, 0), predicted, cloud(3, 1, 50.0))
    assert mask.is_forget.tolist() == [False, True, True, True, False]
    assert (mask.policy, mask.whole_class, mask.threshold, mask.targets) == ("class", True, None, (1, 2))
    allowed = allowed_classes([mask], 5, 4)
    assert not bool(allowed[:, [1, 2]].any())
    assert bool(allowed[:, [0, 3]].all())


def test_a_subset_acts_on_its_samples_alone():
    """Near samples whose predicted class is no target are left alone, and so are all others' labels."""
    examples = cloud(10, 1)
    features = torch.cat((examples.mean(0, keepdim=True), examples.mean(0, keepdim=True), examples[:1] + 40))
    behaviour = Behaviour(name="some", kind="subset", targets=(1,))
    mask = select(FilterRecipe(), behaviour, features, torch.tensor([1, 0, 1]), examples)
    assert mask.is_forget.tolist() == [True, False, False]
    assert allowed_classes([mask], 3, 3).tolist() == [[True, False, True], [True] * 3, [True] * 3]


@pytest.mark.parametrize("policy", ["auto", "knee", "manual"])
def test_nothing_found_is_an_empty_mask(policy):
    """Far samples only: the mask is empty and changes no label."""
    recipe = FilterRecipe(policy=policy, metric="l2", threshold=0.1 if policy == "manual" else None)
    behaviour = Behaviour(name="some", kind="subset", targets=(0,))
    mask = select(recipe, behaviour, cloud(20, 1, 100.0), torch.zeros(20, dtype=torch.long), cloud(5, 2))
    assert int(mask.is_forget.sum()) == 0
    assert bool(allowed_classes([mask], 20, 3).all())


@pytest.mark.parametrize("whole_class", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.1 + 0.2])
def test_a_mask_makes_the_round_trip(whole_class, threshold):
    """to_bytes and from_bytes keep every field, and the same mask gives the same bytes."""
    mask = Mask(torch.rand(17) < 0.5, (3, 7), whole_class, "knee", threshold)
    again = Mask.from_bytes(mask.to_bytes())
    assert torch.equal(again.is_forget, mask.is_forget)
    assert again.is_forget.dtype == torch.bool
    assert (again.targets, again.whole_class, again.policy, again.threshold) == ((3, 7), whole_class, "knee", threshold)
    assert again.to_bytes() == mask.to_bytes()


@pytest.mark.parametrize("data", [b"", b"no mask", Mask(torch.ones(3) > 0, (1,), True, "class", None).to_bytes()[:-1]])
def test_other_bytes_are_no_mask(data):
    """Whatever to_bytes did not write is a StorageError."""
    with pytest.raises(StorageError):
        Mask.from_bytes(data)


def test_masks_commute():
    """The allowed classes are the same in every order of the masks, and only shrink."""
    g = torch.Generator().manual_seed(0)
    masks = [
        Mask(torch.rand(30, generator=g) < 0.4, targets, whole_class, "x", None)
        for targets, whole_class in (((0,), True), ((1, 2), False), ((2, 3), False), ((4,), True))
    ]
    whole = allowed_classes(masks, 30, 6)
    assert torch.equal(whole, allowed_classes(masks[::-1], 30, 6))
    assert torch.equal(whole, allowed_classes([masks[2], masks[0], masks[3], masks[1], masks[0]], 30, 6))
    expected = torch.ones(30, 6, dtype=torch.bool)
    for i in range(30):
        for mask in masks:
            for target in mask.targets if mask.whole_class or bool(mask.is_forget[i]) else ():
                expected[i, target] = False
    assert torch.equal(whole, expected)
    assert bool(allowed_classes([], 30, 6).all())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_relabel_moves_mass_and_makes_none(data):
    """No mass on what is not allowed, the rest in the old proportions, every row a distribution."""
    n, k = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    numbers = st.floats(-20, 20, width=32)
    logits = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=k, max_size=k), min_size=n, max_size=n)))
    kept = data.draw(st.lists(st.sets(st.integers(0, k - 1), min_size=1), min_size=n, max_size=n))
    allowed = torch.tensor([[c in row for c in range(k)] for row in kept])
    labels = relabel(logits, allowed)
    assert float(labels[~allowed].abs().sum()) == 0
    assert bool((labels >= 0).all())
    torch.testing.assert_close(labels.sum(1), torch.ones(n))
    old = logits.double().softmax(1) * allowed
    torch.testing.assert_close(labels.double(), old / old.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_features_are_those_of_the_hook_in_any_batch(classifier):
    """extract_features agrees with `observe` on the same pixels, whole or in parts, and leaves no gradient."""
    judge = classifier()
    pixels = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8)
    with torch.no_grad(), observe(judge) as seen:
        judge(pixels.float() / 255)
    for batch in (3, 1000):
        features = extract_features(judge, pixels, batch)
        torch.testing.assert_close(features, seen.features)
        assert not features.requires_grad


def test_a_subset_is_told_from_real_members_of_its_target() -> None:
    """Without the target class, a crossed seven is a seven with some probability; a real two is something else."""
    examples = torch.tensor([[0.0, 5.0, 3.0], [0.0, 5.0, 4.0]])  # labelled 1, really 2
    found = torch.tensor(
        [
            [0.0, 5.0, 3.0],  # like them
            [3.0, 5.0, 0.0],  # a real member of class 1 that resembles class 0
            [0.0, 30.0, 1.0],  # sees class 2 behind it, but next to no probability is left for it
        ]
    )
    shares = own_share(found, examples, (1,))
    torch.testing.assert_close(shares[0], found[0].softmax(0)[2])
    assert float(shares[1]) == 0.0
    assert 0 < float(shares[2]) < 1e-9


SHARES = [0.3, 0.0, 0.12, 0.01, 0.21, 0.04]


@pytest.mark.parametrize(
    ("runner_up", "fewest", "taken"),
    [
        (0.2, 0, [0, 4]),
        (0.2, 2, [0, 4]),
        (0.2, 3, [0, 2, 4]),
        (0.2, 6, [0, 2, 4, 5]),  # .01 is under a tenth of .2
        (0.1, 1, [0, 2, 4]),  # all that reach it, not the fewest alone
        (0.9, 1, [0]),
    ],
)
def test_a_subset_takes_the_likeliest_where_few_look_like_it(runner_up, fewest, taken):
    """A D' that is sure of its classes still gives samples, down to a tenth of what is asked for."""
    recipe = FilterRecipe(runner_up=runner_up, fewest=fewest)
    shares = torch.tensor(SHARES)
    assert (shares >= least_share(shares, recipe)).nonzero().flatten().tolist() == taken


def test_the_likeliest_are_of_the_target_and_near():
    """Those that are seen as another class, or lie far from the examples, do not count among the fewest."""
    examples = cloud(10, 1)
    middle = examples.mean(0, keepdim=True)
    features = torch.cat((middle, middle, examples[:1] + 40, middle))
    logits = torch.tensor([[0.0, 5.0, 1.9], [0.0, 2.0, 9.0], [0.0, 5.0, 4.9], [0.0, 5.0, 1.0]])
    behaviour = Behaviour(name="some", kind="subset", targets=(1,))
    seen = torch.tensor([0.0, 5.0, 3.0]).expand(10, 3)
    found = {
        fewest: select(FilterRecipe(fewest=fewest), behaviour, features, logits.argmax(1), examples, (logits, seen))
        for fewest in (0, 1, 2)
    }
    assert found[0].is_forget.tolist() == [False] * 4
    assert found[1].is_forget.tolist() == [True, False, False, False]
    assert found[2].is_forget.tolist() == [True, False, False, False], ".02 is a tenth of .2, and the last one has less"


def test_features_are_those_of_eval_mode(classifier) -> None:
    """BatchNorm takes its running statistics, whatever mode the classifier was in."""
    judge = classifier("preactresnet18:2")
    pixels = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8)
    expected = extract_features(judge, pixels)
    torch.testing.assert_close(extract_features(judge.train(), pixels), expected)
    assert not judge.training


def test_two_examples_have_each_other() -> None:
    """Two are enough for a leave-one-out distance."""
    assert leave_one_out(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "l2").tolist() == [5.0, 5.0]


def test_a_higher_sensitivity_finds_a_later_knee() -> None:
    """The ladder climbs to the knee at 0.8, past the one at 0.5 that is below the examples' mean of 2/3; their largest
    distance of 3/4 bounds it."""
    curve = torch.tensor([0.0, 0.3, 0.5, 0.55, 0.58, 0.8, 0.9, 0.95, 0.96, 0.97])
    assert [knee(curve.double(), sensitivity) for sensitivity in (1.0, 2.0, 5.0)] == pytest.approx([0.5, 0.8, None])
    examples = torch.tensor([[0.0], [0.5], [1.0]])
    assert knee_threshold(curve, examples, "l2") == pytest.approx(0.75)


def test_the_policy_knee_takes_the_knee() -> None:
    """Where it lies between its bounds, it is neither of them."""
    examples = cloud(12, 3)
    features = torch.cat((cloud(50, 12), cloud(200, 13, 4.0)))
    behaviour = Behaviour(name="some", kind="subset", targets=(0,))
    recipe = FilterRecipe(policy="knee", metric="l2")
    mask = select(recipe, behaviour, features, torch.zeros(250, dtype=torch.long), examples)
    assert mask.threshold == knee_threshold(distances(features, examples, "l2"), examples, "l2")
    own = leave_one_out(examples, "l2")
    assert float(own.mean()) < (mask.threshold or 0) < float(own.max())


def test_a_knee_at_the_examples_mean_distance_is_late_enough() -> None:
    """The ladder climbs no further: the next knee would be above the largest distance of the examples."""
    curve = torch.tensor([0.0, 0.3, 0.5, 0.55, 0.58, 0.8, 0.9, 0.95, 0.96, 0.97])
    examples = torch.tensor([[0.0], [0.375], [0.75]])
    assert leave_one_out(examples, "l2").tolist() == [0.5625, 0.375, 0.5625]
    assert knee_threshold(curve, examples, "l2") == 0.5


def test_a_class_of_fewer_than_a_tenth_of_the_examples_does_not_count() -> None:
    """Of 20 examples 2 have class 2 beneath the target, which is a tenth, and 1 has class 3, which is less."""
    examples = torch.zeros(20, 4)
    examples[:17, 0] = examples[17:19, 2] = examples[19, 3] = 5.0
    shares = own_share(torch.eye(4) * 3.0, examples, (1,))
    own = float(torch.tensor([3.0, 0.0, 0.0, 0.0]).softmax(0)[0])
    assert shares[0] == shares[2] == pytest.approx(own)
    assert shares[3] == 0
