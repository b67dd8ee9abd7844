"""Both gates: every reason, and the values at their bounds."""

from __future__ import annotations

import pytest

from fsu_ray.gate import refuse_generator, refuse_result
from fsu_ray.recipes import GateRecipe

GATE = GateRecipe()
GOOD = {"starved": [], "agreement": 0.99, "coverage": 0.8, "acceptance": 0.3, "bn_distance": 0.2}
COUNTS = {"samples_given": 200, "samples_held_out": 40, "probes": 40}


def report(samples=0.0, probes=0.0, agreement=1.0, earlier=(), counts=COUNTS):
    """A report with the figures that the gate reads."""
    return {
        "forgetting": {"samples_in_target": samples, "probes_in_target": probes, **counts},
        "retention": {"agreement": agreement},
        "earlier": [{"behaviour": b, "probes_in_target": share, "recorded": then} for b, share, then in earlier],
    }


def test_good_figures_pass_both_gates():
    """Nothing to refuse: an empty answer, and None."""
    assert refuse_generator(GOOD, GATE) == ()
    assert refuse_result(report(), GATE) is None


@pytest.mark.parametrize(
    ("figure", "bound", "beyond", "says"),
    [
        ("agreement", 0.95, 0.9499, "agreement"),
        ("coverage", 0.3, 0.2999, "coverage"),
        ("acceptance", 0.01, 0.0099, "acceptance"),
        ("bn_distance", 1.0, 1.0001, "BN distance"),
    ],
)
def test_each_figure_of_a_generator_has_its_bound(figure, bound, beyond, says):
    """At the bound it passes, beyond it one reason names the figure."""
    assert refuse_generator(GOOD | {figure: bound}, GATE) == ()
    (reason,) = refuse_generator(GOOD | {figure: beyond}, GATE)
    assert reason.startswith(says)
    assert str(bound) in reason


def test_starved_classes_refuse_a_generator():
    """The reason names them."""
    assert refuse_generator(GOOD | {"starved": [3, 4]}, GATE) == ("starved classes [3, 4]",)


def test_all_reasons_come_together_and_in_order():
    """Most important first."""
    bad = {"starved": [1], "agreement": 0.0, "coverage": 0.0, "acceptance": 0.0, "bn_distance": 9.0}
    firsts = [reason.split()[0] for reason in refuse_generator(bad, GATE)]
    assert firsts == ["starved", "agreement", "coverage", "acceptance", "BN"]


@pytest.mark.parametrize("part", ["samples", "probes"])
def test_what_is_not_forgotten_is_refused(part):
    """At most 5 % may still get a target class; where nothing was measured nothing is held against it."""
    assert refuse_result(report(**{part: 0.05}), GATE) is None
    assert refuse_result(report(**{part: None}), GATE) is None
    reason = refuse_result(report(**{part: 0.0501}), GATE)
    assert reason.startswith(f"not_forgotten: {part}_in_target 0.050")
    assert refuse_result(report(**{part: 0.3}), GateRecipe(forgotten_max=0.3)) is None


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"samples": 0.2}, "samples_in_target 0.200 (of 40) > 0.05"),
        ({"samples": 0.2, "counts": COUNTS | {"samples_held_out": 0}}, "samples_in_target 0.200 (of 200) > 0.05"),
        ({"probes": 0.1}, "probes_in_target 0.100 (of 40) > 0.05"),
    ],
)
def test_a_refusal_says_of_how_many(metrics, says):
    """The number tells how much a share is worth."""
    assert says in refuse_result(report(**metrics), GATE)


@pytest.mark.parametrize(
    ("samples", "held_out", "probes", "found", "says"),
    [
        (0.0, 160, 0.25, 4, None),  # one of four, but of 164 in all
        (0.0, 160, 0.5, 18, "samples_in_target and probes_in_target 0.051 (of 178) > 0.05"),
        (0.0, 160, 0.5, 4, None),
        (0.0, 160, 0.75, 4, "probes_in_target 0.750 (of 4) > 0.5"),  # most of them must have left
        (0.2, 5, 0.0, 3, "samples_in_target and probes_in_target 0.125 (of 8) > 0.05"),
        (0.2, 5, 0.0, 15, None),  # one of 20 is not more than .05
        (0.2, 5, 0.0, 14, "samples_in_target and probes_in_target 0.053 (of 19) > 0.05"),
        (0.0, 160, 0.1, 20, "probes_in_target 0.100 (of 20) > 0.05"),  # enough to count alone
        (0.05000000074505806, 20, 0.0, 20, None),  # 1 of 20 in float32
        (None, 0, 0.1, 10, "probes_in_target 0.100 (of 10) > 0.05"),  # there is nothing to count them with
        (float("nan"), 5, 0.0, 40, "samples_in_target nan (of 5) > 0.5"),
    ],
)
def test_few_count_together_with_the_others(samples, held_out, probes, found, says):
    """A share of under 20 is 0 or more than 5 %; it can neither refuse a result alone nor pass one."""
    counts = {"samples_given": 5 * held_out, "samples_held_out": held_out, "probes": found}
    reason = refuse_result(report(samples, probes, counts=counts), GATE)
    assert (reason is None) if says is None else reason.startswith(f"not_forgotten: {says}")


@pytest.mark.parametrize(
    ("share", "recorded", "returned"),
    [
        (0.0, 0.0, False),
        (0.02, 0.0, False),
        (0.021, 0.0, True),
        (0.05, 0.04, False),
        (0.051, 0.04, True),
        (0.051, 0.05, True),
        (0.03, 0.05, False),
        (0.25, 0.25, False),
        (0.26, 0.25, True),
    ],
)
def test_an_earlier_erasure_must_not_return(share, recorded, returned):
    """Above 5 % and its own record, or more than 2 points above that; the reason names the behaviour."""
    reason = refuse_result(report(earlier=[("nine", 0.0, 0.0), ("crossed 7", share, recorded)]), GATE)
    assert (reason is not None) == returned
    if reason:
        assert reason.startswith(f"erasure_returned: crossed 7 is at {share:.3f}, {recorded:.3f}")


def test_retention_has_its_bound():
    """At least 97 % agreement with the parent."""
    assert refuse_result(report(agreement=0.97), GATE) is None
    reason = refuse_result(report(agreement=0.9699), GATE)
    assert reason.startswith("retention_lost: agreement with the parent 0.970 < 0.97")


def test_the_first_reason_is_the_one_that_is_given():
    """Forgetting before returning before retention."""
    bad = report(0.5, 0.5, 0.0, [("nine", 1.0, 0.0)])
    assert refuse_result(bad, GATE).startswith("not_forgotten: samples")
    assert refuse_result(bad, GateRecipe(forgotten_max=1)).startswith("erasure_returned")
    lenient = GateRecipe(forgotten_max=1, returned_max=1, returned_margin=1)
    assert refuse_result(bad, lenient).startswith("retention_lost")


def test_a_figure_that_is_no_number_is_refused() -> None:
    """NaN compares as neither above nor below: both gates treat it as a failure."""
    nan = float("nan")
    metrics = {"starved": [], "agreement": nan, "coverage": nan, "acceptance": nan, "bn_distance": nan}
    assert len(refuse_generator(metrics, GateRecipe())) == 4
    report = {
        "forgetting": {"samples_in_target": 0.0, "probes_in_target": 0.0, **COUNTS},
        "earlier": [],
        "retention": {"agreement": nan},
    }
    assert (refuse_result(report, GateRecipe()) or "").startswith("retention_lost")


def test_a_share_of_unknown_number_counts_as_one_of_few() -> None:
    """Most must have left; there is no number by which it could count together with others."""
    assert refuse_result(report(0.4, None, counts={}), GATE) is None
    assert (refuse_result(report(0.6, None, counts={}), GATE) or "").startswith(
        "not_forgotten: samples_in_target 0.600"
    )


@pytest.mark.parametrize(("share", "refused"), [(0.0500004, False), (0.050004, True)])
def test_shares_are_compared_to_six_places(share: float, refused: bool) -> None:
    """A float32 is not precise to more, and no less is forgiven."""
    assert (refuse_result(report(share), GATE) is not None) == refused
