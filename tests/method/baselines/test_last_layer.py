"""A Bayesian last layer: features and weights against the network, q_full, EUBO and RKL against quadrature."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsu_ray.errors import InvalidConfig, InvalidData, UnsupportedModel
from fsu_ray.method.baselines import last_layer
from fsu_ray.method.baselines.last_layer import Learning
from fsu_ray.method.baselines.variational import Descent, Diagonal
from fsu_ray.models.classifier import Classifier
from fsu_ray.records import ModelSpec

LONG = Learning(steps=1500, samples=20, lr=0.03)


def classifier(arch: str) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ModelSpec(arch=arch, channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.3,))).eval()


def pixels(number: int) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, 1, 32, 32), generator=rng, dtype=torch.uint8)


def samples(number: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, width), the last of them 1, with labels of a softmax of them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn((number, width), generator=rng, dtype=torch.float64)
    x[:, -1] = 1
    theta = torch.randn((classes, width), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x, torch.multinomial((x @ theta.T).softmax(1), 1, generator=rng)[:, 0]


@pytest.mark.parametrize(("arch", "width"), [("lenet5", 84), ("preactresnet18:4", 32)])
def test_features_and_weights_are_those_of_the_network(arch: str, width: int) -> None:
    """Features times weights are the logits; a layer that is put in is the one that acts, in a copy."""
    judge, images = classifier(arch), pixels(5)
    x = last_layer.features(judge, images, batch=2)
    assert x.shape == (5, width + 1)
    theta = last_layer.weights(judge)
    with torch.no_grad():
        logits = judge(images.float() / 255)
    torch.testing.assert_close(x @ theta.view(10, -1).T, logits, rtol=1e-4, atol=1e-4)
    seen: list[Tensor] = []
    layer = judge.network.get_submodule("fc3" if arch == "lenet5" else "linear")
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    judge(images.float() / 255)
    torch.testing.assert_close(x[:, :-1], seen[0])
    other = torch.randn(theta.shape, generator=torch.Generator().manual_seed(2))
    made = last_layer.install(judge, Diagonal(other, torch.ones_like(other)))
    with torch.no_grad():
        torch.testing.assert_close(made(images.float() / 255), x @ other.view(10, -1).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last_layer.weights(judge), theta)


def test_a_network_that_ends_otherwise_is_refused() -> None:
    """Where the last Linear layer's output is not the logits, there is nothing to replace."""
    judge = classifier("lenet5")
    judge.network = nn.Sequential(judge.network, nn.Softmax(1))
    with pytest.raises(UnsupportedModel, match="does not end in a Linear layer"):
        last_layer.features(judge, pixels(1))
    with pytest.raises(InvalidData, match="with N labels"):
        last_layer.likelihood(torch.ones(2, 3), torch.zeros(1), 2)


def test_likelihood_is_that_of_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw by draw, in one piece and in many; by minibatches it is right on average."""
    x, y = samples(50, 3, 4)
    theta = torch.randn((7, 12), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = torch.stack([-F.cross_entropy(x @ each.view(4, 3).T, y, reduction="sum") for each in theta])
    torch.testing.assert_close(last_layer.likelihood(x, y, 4)(theta), wanted)
    subset_forget = last_layer.likelihood(x, y, 4, batch=10, seed=1)
    torch.testing.assert_close(
        torch.stack([subset_forget(theta) for _ in range(3000)]).mean(0), wanted, rtol=0.02, atol=0
    )
    monkeypatch.setattr(last_layer, "AT_ONCE", 450)
    torch.testing.assert_close(last_layer.likelihood(x, y, 4)(theta), wanted)


# One feature and two classes: theta is (2,), and everything can be integrated on a grid.


def _optimum(loss: Callable[[Tensor, Tensor], Tensor]) -> Diagonal:
    """The mean-field q of dimension 2 where loss(mean, scale) is least."""
    mean, log = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimiser = torch.optim.LBFGS([mean, log], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def step() -> Tensor:
        optimiser.zero_grad()
        value = loss(mean, log.exp())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(step)  # type: ignore[no-untyped-call]
    return Diagonal(mean.detach(), log.detach().exp())


def _expected(x: Tensor, y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """E_q[log p(y | x, theta)] by 20 x 20 nodes."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    at = mean + scale * torch.cartesian_prod(nodes, nodes)
    signs = 2.0 * y - 1
    each = F.logsigmoid(signs * (at[:, 1] - at[:, 0])[:, None] * x[:, 0]).sum(1)
    return torch.cartesian_prod(weights, weights).prod(1) @ each / weights.sum() ** 2


def _kl(mean: Tensor, scale: Tensor, other: Diagonal) -> Tensor:
    p, q = torch.distributions.Normal(mean, scale), torch.distributions.Normal(other.mean, other.scale)
    return torch.distributions.kl_divergence(p, q).sum()


@pytest.fixture
def line() -> tuple[Tensor, Tensor]:
    """30 samples; the last 4 are to be erased."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn((30, 1), generator=rng, dtype=torch.float64)
    return x, (x[:, 0] + 0.7 * torch.randn(30, generator=rng, dtype=torch.float64) > 0).long()


def _full(x: Tensor, y: Tensor) -> Diagonal:
    prior = Diagonal(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    return _optimum(lambda mean, scale: -_expected(x, y, mean, scale) + _kl(mean, scale, prior))


def test_q_full_is_the_best_of_its_kind(line: tuple[Tensor, Tensor]) -> None:
    """The ELBO's optimum by quadrature, from far off, on minibatches too."""
    x, y = line
    wanted = _full(x, y)
    assert float(wanted.kl(Diagonal(torch.zeros(2), torch.ones(2)))) > 0.3
    begin = torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert float(last_layer.posterior(x, y, begin, LONG, 0).kl(wanted)) < 2e-3
    subset_forget = Learning(steps=1500, samples=20, lr=0.03, batch=10)
    assert float(last_layer.posterior(x, y, begin, subset_forget, 0).kl(wanted)) < 2e-2


def test_eubo_without_a_cut_is_the_best_of_its_kind(line: tuple[Tensor, Tensor]) -> None:
    """By quadrature: E_q[log p(D_e)] + KL(q || q_full)."""
    x, y = line
    full = _full(x, y)
    wanted = _optimum(lambda mean, scale: _expected(x[26:], y[26:], mean, scale) + _kl(mean, scale, full))
    found = last_layer.eubo(full, x[26:], y[26:], 0, 0, Descent(800, 20, 0.03))
    assert float(found.kl(wanted)) < 2e-3


def test_rkl_without_a_cut_has_the_moments_of_what_is_left(line: tuple[Tensor, Tensor]) -> None:
    """Mean and deviation of q_full / p(D_e) on a grid; all of a batch's weights are worth something here."""
    x, y = line
    full = _full(x, y)
    axes = [full.mean[i] + full.scale[i] * torch.linspace(-8, 8, 401, dtype=torch.float64) for i in (0, 1)]
    grid = torch.cartesian_prod(*axes)
    erased = F.logsigmoid((2.0 * y[26:] - 1) * (grid[:, 1] - grid[:, 0])[:, None] * x[26:, 0]).sum(1)
    log_q = -((grid - full.mean) / full.scale).square().sum(1) / 2
    weight = (log_q - erased).softmax(0)
    mean = weight @ grid
    scale = (weight @ (grid - mean).square()).sqrt()
    found, worth = last_layer.rkl(full, x[26:], y[26:], 0, 0, batches=300)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=5e-3)
    torch.testing.assert_close(found.scale, scale, rtol=0, atol=5e-3)
    assert 300 < worth < 1000


def _centred(theta: Tensor) -> Tensor:
    """Without what is the same for every class, which no likelihood knows."""
    return theta - theta.mean(0)


def test_with_much_data_the_mean_is_the_map() -> None:
    """Against L-BFGS on cross entropy and prior; the deviations are small."""
    x, y = samples(5000, 3, 3)
    theta = torch.zeros((3, 3), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(x @ theta.T, y, reduction="sum") + theta.square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(step)  # type: ignore[no-untyped-call]
    found = last_layer.posterior(x, y, torch.zeros(9, dtype=torch.float64), Learning(steps=600, lr=0.03), 0)
    torch.testing.assert_close(_centred(found.mean.view(3, 3)), _centred(theta.detach()), rtol=0, atol=0.03)
    assert float(found.scale.max()) < 0.1


def test_all_copies_of_a_sample_are_unlearned() -> None:
    """Data that hold a sample more often than the rest of them do come to the posterior of the rest, but for what a
    Gaussian that is diagonal cannot say: 3 copies of 400."""
    x, y = samples(400, 3, 3)
    copy_x, copy_y = x[:1].expand(3, -1), (y[:1] + 1).expand(3) % 3
    start, how = torch.zeros(9, dtype=torch.float64), Learning(steps=800, samples=8, lr=0.03)
    rest = last_layer.posterior(x, y, start, how, 0)
    full = last_layer.posterior(torch.cat((x, copy_x)), torch.cat((y, copy_y)), start, how, 0)
    far = float(full.kl(rest))
    assert far > 0.1
    assert float(last_layer.eubo(full, copy_x, copy_y, 0, 0, Descent(800, 8, 0.03)).kl(rest)) < 0.5 * far
    found, worth = last_layer.rkl(full, copy_x, copy_y, 0, 0, batches=50)
    assert float(found.kl(rest)) < 0.5 * far
    assert 300 < worth < 900


def test_lambda_is_a_matter_of_the_dimension() -> None:
    """In 850 dimensions 1e-9 cuts everything; half of q_full's own draws lie within exp(-425); less, and more goes."""
    full = Diagonal(torch.zeros(850), torch.ones(850))
    x, y = torch.ones((20, 85)), torch.zeros(20, dtype=torch.int64)
    how = Descent(100, 4, 0.1)
    moved = [float(last_layer.eubo(full, x, y, cut, 0, how).kl(full)) for cut in (1e-9, Decimal("1e-230"), 0)]
    assert moved[0] < 1e-3 < moved[1] < moved[2]
    with pytest.raises(InvalidConfig, match="cuts all draws away"):
        last_layer.rkl(full, x, y, 1e-9, 0, batches=1)
    found = [last_layer.rkl(full, x, y, Decimal("1e-185"), seed, batches=3)[0].mean.tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_prediction_is_the_mean_over_draws() -> None:
    """Against the network where q is a point, and against quadrature where it is not; the same by the same seed."""
    judge, images = classifier("lenet5"), pixels(4)
    theta = last_layer.weights(judge)
    with torch.no_grad():
        wanted = judge(images.float() / 255).softmax(1)
    point = Diagonal(theta, torch.full_like(theta, 1e-9))
    torch.testing.assert_close(last_layer.predict(judge, point, images, 3), wanted, rtol=1e-4, atol=1e-5)
    q = Diagonal(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64))
    x = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    exact = [float(weights @ torch.sigmoid(a + a * 5**0.5 * nodes) / weights.sum()) for a in (0.5, 2.0)]
    found = last_layer.averaged(q, x, 20_000)
    torch.testing.assert_close(found[:, 1], torch.tensor(exact, dtype=torch.float64), rtol=0, atol=0.01)
    one, two, other = (last_layer.averaged(q, x, 10, seed).tolist() for seed in (1, 1, 2))
    assert one == two != other
