"""The cells of the tables, on a part of MNIST and with recipes that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors

from fsu_ray.errors import InvalidConfig
from fsu_ray.experiments import ablations, bayes, figures_7_8, images, mnist
from fsu_ray.experiments.catalogue import Row, find_cell_type
from fsu_ray.experiments.mnist import Bench
from fsu_ray.experiments.reproduce import _key
from fsu_ray.method.synthesize import Synthetic

INVERT = {"steps": 120, "batch": 60, "width": 4, "weights": {"entropy": 10.0}}
SYNTHESIZE = {"per_class": 20, "entropy_threshold": 2.3, "max_draws": 8, "starved_below": 0.0}


@pytest.mark.mnist
@pytest.mark.parametrize("scenario", ["class9", "crossed7"])
def test_from_a_classifier_to_an_erasure(part: Bench, store: Any, make: Any, scenario: str) -> None:
    """From classifier to erasure, each cell by its own recipe; D_e is erased or corrected, more or less."""
    original = {**images.classifier(scenario, "lenet5", 1, "small"), "epochs": 4}
    inverter = images.generator(original, INVERT)
    drawn = images.dataset(inverter, SYNTHESIZE)
    everything = {"relearn": {"epochs": 5, "lr": 0.01}, "filter": {"runner_up": 0.0}, "gate": {"agreement_min": 0.0}}
    few, full = (make(*images.erasure(drawn, rho, everything)) for rho in (0.2, images.FULL))
    before = make("classifier", original)
    assert before["D_r"] > 80
    weights = load_tensors(store.get(make("generator", inverter)["weights"]))
    assert weights["linear.weight"].shape[0] == 8 * 4 * 64
    row = make("dataset", drawn)
    dataset = Synthetic.from_bytes(store.get(row["dataset"]))
    assert len(dataset) <= 200
    assert set(row) >= {"acceptance", "coverage", "bn_distance", "agreement", "starved", "refused"}
    for after in (few, full):
        assert (after["before_D_r"], after["before_D_e"]) == (before["D_r"], before["D_e"])
        assert after["refused"] in ("", "nothing_found", "not_forgotten")
        assert (after["weights"] == before["weights"]) is (after["refused"] == "nothing_found")
    if scenario == "class9":
        assert full["D_e"] < 10 < before["D_e"]
    plus = images.gan(scenario, 1, "small")
    plus["gan"] |= {"steps": 60, "width": 4}
    borrowed = images.dataset(plus, SYNTHESIZE, original)
    after = make(*images.erasure(borrowed, images.FULL, everything))
    assert after["before_D_r"] == before["D_r"]
    assert make("dataset", borrowed)["generator"] == make("gan", plus)["weights"]
    for how in ("finetuned", "scratch"):
        oracle = make("oracle", {"classifier": original, "how": how, "epochs": 3, "seed": 1})
        assert oracle["D_r"] > 80
        if how == "scratch" and scenario == "class9":
            assert oracle["D_e"] == 0


@pytest.mark.mnist
def test_fisher_by_its_strength(part: Bench, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each strength: strength 0 changes nothing, a large one costs D_r too."""
    original = {**images.classifier("class9", "lenet5", 1, "small"), "epochs": 4}
    cell = {"classifier": original, "rho": images.FULL, "samples": 100, "alphas": [0.0, 1e-2], "seed": 1}
    seen: list[torch.Tensor] = []
    inner = images.fisher.information
    monkeypatch.setattr(
        images.fisher, "information", lambda judge, pixels: (seen.append(pixels), inner(judge, pixels))[1]
    )
    rows = make.rows("fisher", cell)
    nines = part.train.pixels[part.train.labels == 9].flatten(1)
    assert len(seen[0]) == 100
    assert not (seen[0].flatten(1)[:, None] == nines[None]).all(2).any(), "the information is that of D_r"
    before = make("classifier", original)
    assert (rows[0]["D_r"], rows[0]["D_e"]) == (before["D_r"], before["D_e"])
    assert rows[1]["D_r"] < 50
    erased = images.erased_of("class9", images.FULL, 1)
    assert torch.equal(part.train.labels[erased].unique(), torch.tensor([9]))
    assert 0 < int(images.erased_of("crossed7", 0.5, 1).sum()) < len(part.crossed_train)


@pytest.mark.mnist
def test_a_bayesian_last_layer_by_lambda(part: Bench, make: Any) -> None:
    """EUBO with nothing cut takes D_r along, with all cut it moves nothing; RKL moves little, or says why not."""
    original = {**images.classifier("class9", "lenet5", 1, "small"), "epochs": 4}
    learning = {"steps": 300, "lr": 0.03}

    def rows(method: str, **settings: Any) -> list[Row]:
        kind, cell = bayes.bayes_cell(original, method, images.FULL, learning=learning, **settings)
        assert find_cell_type(kind).needs(cell) == [("classifier", original)]
        return make.rows(kind, cell)

    far, near = rows("eubo", lambdas=["0", "1e-9"], steps=200)
    assert abs(near["full_D_r"] - make("classifier", original)["D_r"]) < 5
    assert near["full_D_e"] > 50
    assert near["D_r"] == pytest.approx(near["full_D_r"], abs=0.5)
    assert near["kl"] < 1 < far["kl"]
    assert far["D_e"] == far["mean_D_e"] == 0
    assert far["D_r"] < far["full_D_r"] - 10
    near, refused = rows("rkl", lambdas=[0, 1e-9], batches=3)
    assert near["D_r"] > near["full_D_r"] - 5
    assert 1 <= near["worth"] < 1000
    assert "cuts all draws away" in refused["refused"]
    assert (refused["D_e"], refused["kl"], near["refused"]) == (refused["full_D_e"], 0, "")
    assert bayes.lambda_at(original, 1) == "2.659777e-185"  # exp(-850 / 2)
    for method, settings in (("fisher", {}), ("rkl", {"steps": 1}), ("eubo", {"learning": {"step": 1}})):
        with pytest.raises(InvalidConfig):
            bayes.bayes_cell(original, method, 1.0, **settings)


@pytest.mark.mnist
def test_bayes_sees_the_labels_that_were_learned(part: Bench, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the crossed sevens those that are given, as 2, 3 or 7, the same that the original learned; q_full sees all."""
    original = {**images.classifier("crossed7", "lenet5", 1, "small"), "epochs": 1}
    seen: list[torch.Tensor] = []
    inner = bayes.last_layer.likelihood
    monkeypatch.setattr(
        bayes.last_layer, "likelihood", lambda x, y, *rest: (seen.append(y.cpu()), inner(x, y, *rest))[1]
    )
    _, cell = bayes.bayes_cell(original, "eubo", 0.5, steps=2, learning={"steps": 2})
    (row,) = make.rows("bayes", cell)
    learned = mnist.labels(part, True, 1)
    assert 0 <= row["D_e"] <= 100
    assert torch.equal(seen[0], learned)
    assert torch.equal(seen[1], learned[images.erased_of("crossed7", 0.5, 1)])
    assert set(seen[1].tolist()) == {2, 3, 7}


def test_pictures_of_time_and_of_fisher(tmp_path: Path) -> None:
    """From rows of two seeds: the tables, and a picture each."""
    kinds = ("classifier", "generator", "dataset", "erasure")
    rows = [{"piece": kind, "seed": seed, "seconds": 10.0 * n, "D_r": 99.0 - seed, "D_e": float(n), "arch": "lenet5"}
            for seed in (0, 1) for n, kind in enumerate(kinds, 1)]  # fmt: skip
    deep = [row | {"arch": "preactresnet18:8", "seconds": 2 * row["seconds"]} for row in rows[:4]]
    text = figures_7_8.TABLES["figure7"].report(rows + deep, tmp_path)
    assert "| lenet5 | 10.0 ± 0.0 | 20.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 90.0 | 40.0 |" in text
    assert "| preactresnet18:8 | 20.0 | 40.0 | 60.0 | 80.0 | 180.0 | 80.0 |" in text
    assert [work[0] for work in figures_7_8.TABLES["figure7"].cells("small", 2)] == list(kinds) * 3
    for seed in (0, 1):
        rows += [{"piece": "oracle", "how": how, "epochs": 6, "seed": seed, "D_r": 99.0, "D_e": 1.0}
                 for how in ("finetuned", "scratch")]  # fmt: skip
        rows += [{"piece": "fisher", "alpha": alpha, "seed": seed, "D_r": 90.0 - seed, "D_e": 50.0}
                 for alpha in figures_7_8.ALPHAS]  # fmt: skip
    text = figures_7_8.TABLES["figure8"].report(rows, tmp_path)
    assert "| Fisher 3.5e-07 | 89.50 ± 0.71 | 50.00 ± 0.00 |" in text
    assert "| Oracle, fine-tuned, 6 epochs | 99.00 ± 0.00 | 1.00 ± 0.00 |" in text
    for name in ("figure7", "figure8"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_variants_share_all_that_they_do_not_change() -> None:
    """A seed of Table 3 has one classifier, one generator and four D'; of Table 6, five generators; of Table 6bn, two,
    and two of the deep network, that other seeds share; of Table 7, one."""
    names = ("table3", "table6", "table6bn", "table7")
    for name, numbers in zip(names, ((1, 1, 4, 8), (1, 5, 5, 10), (2, 4, 4, 16), (1, 1, 1, 8)), strict=True):
        seen: dict[str, set[str]] = {}
        waiting = ablations.TABLES[name].cells("small", 1)
        while waiting:
            work = waiting.pop()
            seen.setdefault(work[0], set()).add(_key(work))
            waiting += find_cell_type(work[0]).needs(work[1])
        assert tuple(len(seen[kind]) for kind in ("classifier", "generator", "dataset", "erasure")) == numbers
    cells = [cell for _, cell in ablations.TABLES["table6bn"].cells("small", 2)]
    deep = [cell for cell in cells if cell["variant"] == "deep: without BN"]
    assert {cell["seed"] for cell in deep} == {0, 1}
    assert len({repr(cell["dataset"]) for cell in deep}) == 1


def test_a_variant_changes_what_it_says(tmp_path: Path) -> None:
    """Without a loss its weight is 0 and the others stay; the paper's size is the paper's."""
    cells = {(cell["variant"], cell["rho"]): cell for _, cell in ablations.TABLES["table6"].cells("small", 1)}
    weights = cells["without BN", 1.0]["dataset"]["generator"]["invert"]["weights"]
    all_five = cells["all five", 1.0]["dataset"]["generator"]["invert"]["weights"]
    assert weights == {**all_five, "bn": 0}
    assert all_five["bn"] > 0
    assert cells["all five", 1.0]["recipe"]["relearn"]["repeats"] == 1
    assert cells["all five", 0.03]["recipe"]["relearn"]["repeats"] == 5
    cells = {(cell["variant"], cell["rho"]): cell for _, cell in ablations.TABLES["table6bn"].cells("small", 1)}
    papers = cells["deep: without BN; the paper's filter, relearning", 1.0]
    assert papers["dataset"] == cells["deep: without BN", 1.0]["dataset"]
    assert papers["dataset"]["generator"]["classifier"]["arch"] == "preactresnet18:8"
    assert (papers["recipe"]["filter"]["policy"], papers["recipe"]["relearn"]["repeats"]) == ("knee", 0)
    _, large = ablations.TABLES["table6"].cells("paper", 1)[0]
    invert = large["dataset"]["generator"]["invert"]
    assert (invert["steps"], invert["width"], large["dataset"]["generator"]["classifier"]["epochs"]) == (7000, 16, 20)


def test_the_report_sets_ours_beside_the_papers(tmp_path: Path) -> None:
    """Full-shot and few-shot, each with the original; mean and deviation; what was refused is counted."""
    rows = [
        {"variant": name, "rho": rho, "seed": seed, "D_r": 99 + seed, "D_e": rho, "refused": "not_forgotten" * seed,
         "before_D_r": 99.0, "before_D_e": 98.0, "arch": "lenet5"}
        for name in ablations.METRICS for rho in (1.0, 0.03) for seed in (0, 1)
    ]  # fmt: skip
    text = ablations.TABLES["table7"].report(rows, tmp_path)
    assert text.count("| Original | 99.47 | 99.00 ± 0.00 | 99.31 | 98.00 ± 0.00 |  |") == 2
    assert "| cosine | 98.81 ± 0.15 | 99.50 ± 0.71 | 0.00 ± 0.00 | 1.00 ± 0.00 | 1 of 2 |" in text
    assert "| cosine | 98.85 ± 0.27 | 99.50 ± 0.71 | 0.00 ± 0.00 | 0.03 ± 0.00 | 1 of 2 |" in text
    assert "lenet5, few-shot (3 %)" in text
    rows += [row | {"arch": "preactresnet18:8", "D_e": 77.0} for row in rows if row["variant"] == "cosine"]
    first, deep = ablations.TABLES["table7"].report(rows, tmp_path).split("| preactresnet18:8, full-shot |")
    assert "77.00" not in first
    assert "| cosine | 98.81 ± 0.15 | 99.50 ± 0.71 | 0.00 ± 0.00 | 77.00 ± 0.00 | 1 of 2 |" in deep
