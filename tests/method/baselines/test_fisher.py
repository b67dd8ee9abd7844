"""Fisher scrubbing: the information in closed form where there is one, and the noise that it asks for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fsu_ray.errors import InvalidConfig
from fsu_ray.method.baselines import fisher
from fsu_ray.method.fit import predict
from fsu_ray.models.classifier import Classifier


@pytest.fixture(scope="module")
def classifier(trained: Any) -> Classifier:
    return Classifier.from_bytes(trained.spec, trained.weights)


def last_layer(classifier: Classifier) -> str:
    return next(
        name for name, p in classifier.named_parameters() if p.dim() == 2 and p.shape[0] == classifier.spec.classes
    )


def test_the_last_layer_has_that_of_softmax_regression(trained: Any, classifier: Classifier) -> None:
    """d log p_j / dW_ki = (1[j = k] - p_k) f_i, so F_ki = E f_i^2 p_k (1 - p_k), with f what the layer is given."""
    pixels = trained.train.pixels[:50]
    name = last_layer(classifier)
    found = fisher.information(classifier, pixels, chunk=16)
    p = predict(classifier, pixels).softmax(1)
    seen = []
    layer = classifier.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    predict(classifier, pixels)
    handle.remove()
    f = torch.cat(seen)
    wanted = torch.einsum("nk,ni->ki", p * (1 - p), f.square()) / len(pixels)
    torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6)
    bias = name.removesuffix("weight") + "bias"
    torch.testing.assert_close(found[bias], (p * (1 - p)).mean(0), rtol=1e-3, atol=1e-6)


def test_any_layer_has_that_of_one_sample_after_another(trained: Any, classifier: Classifier) -> None:
    """By plain backward passes, a class and a sample at a time."""
    pixels = trained.train.pixels[:3]
    found = fisher.information(classifier, pixels)
    wanted = {name: torch.zeros_like(p) for name, p in classifier.named_parameters()}
    for x in pixels:
        for k in range(10):
            log_p = classifier(x[None].float() / 255).log_softmax(1)[0]
            slopes = torch.autograd.grad(log_p[k], list(classifier.parameters()))
            for (name, total), slope in zip(wanted.items(), slopes, strict=True):
                wanted[name] = total + log_p[k].exp().detach() * slope.square() / 3
    for name, each in wanted.items():
        torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-7)


def test_the_noise_is_as_loud_as_the_information_is_low(trained: Any, classifier: Classifier) -> None:
    """Caps and averages as its authors have them; measured over many seeds on chosen information."""
    name = last_layer(classifier)
    known = {each: torch.full_like(p, 1e6) for each, p in classifier.named_parameters()}
    conv = next(each for each, p in classifier.named_parameters() if p.dim() == 4)
    flat = next(each for each, p in classifier.named_parameters() if p.dim() == 1 and p.shape[0] != 10)
    known[name][0], known[conv][0], known[flat][0] = 0.0, 0.01, 0.25
    known[name][1, ::2] = 0.02  # half of a row at 1/50, the others at next to nothing: on average 25
    alpha = 1e-4
    moved: dict[str, list[torch.Tensor]] = {name: [], conv: [], flat: []}
    for seed in range(60):
        made = dict(fisher.scrub(classifier, known, alpha, seed).named_parameters())
        for each, seen in moved.items():
            seen.append((made[each] - dict(classifier.named_parameters())[each]).detach())
    spread = {each: torch.stack(seen) for each, seen in moved.items()}
    assert float(spread[name][:, 0].var()) == pytest.approx(10 * alpha * 1e2, rel=0.1)
    assert float(spread[name][:, 1].var()) == pytest.approx(10 * alpha * 25, rel=0.1)
    assert float(spread[conv][:, 0].var()) == pytest.approx(alpha * 100, rel=0.15)
    assert float(spread[flat][:, 0].var()) == pytest.approx(10 * alpha * 4, rel=0.5)
    assert float(spread[conv][:, 1].abs().max()) < 1e-3


def test_it_forgets_everything_as_it_grows(trained: Any, classifier: Classifier) -> None:
    """None: nothing changes. Much: accuracy falls on what was to be kept as well, which is the paper's point. The
    original stays as it was; the same seed makes the same."""
    kept = trained.train.labels != 8
    known = fisher.information(classifier, trained.train.pixels[kept][:200])
    before = copy.deepcopy(classifier.state_dict())

    def right(alpha: float, seed: int = 0) -> float:
        logits = predict(fisher.scrub(classifier, known, alpha, seed), trained.test.pixels)
        return float((logits.argmax(1) == trained.test.labels).float().mean())

    assert right(0) > 0.95
    assert right(1e-9) > 0.95 > 0.5 > right(1e-3)
    assert right(1e-6) == right(1e-6)
    assert all(torch.equal(classifier.state_dict()[each], value) for each, value in before.items())
    with pytest.raises(InvalidConfig, match="0 or more"):
        right(-1)
