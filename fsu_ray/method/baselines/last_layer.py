"""EUBO and RKL for any classifier (section 4.2): its last layer becomes a Bayesian one, the rest of it stays.

theta are the weights and the bias of the last Linear layer, K x (F + 1), a row a class; the likelihood is the softmax
of features times theta; the prior is N(0, prior^2). q_full is what maximises the ELBO on all training data, by
reparameterised draws on minibatches, from the classifier's own weights; then EUBO and RKL (`variational`) see D_e and
q_full alone. Posteriors are mean-field, as Bayesian layers are: a full covariance would be 850 x 850 for LeNet5 but
5,130 x 5,130 for PreActResNet-18, and the two must mean the same.

Which lambda cuts anything depends on the dimension D of theta. Half the squared Mahalanobis distance of a draw of
q_full is about D / 2, so that at lambda = exp(-D / 2), 1e-184 for LeNet5, half of its own draws are cut away, and with
the 1e-9 of the moons all are: EUBO then moves nothing and RKL is refused. EUBO at lambda = 0 has a minimum, since the
log-likelihood falls linearly in theta and the KL rises as a square, but one far from where D_r is classified: the
likelihood of thousands of samples outweighs q_full. A lambda bounds how far it goes; hence `tuned` means: by lambda.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor, nn

from fsu_ray.errors import InvalidData, UnsupportedModel
from fsu_ray.method.baselines import variational
from fsu_ray.method.baselines.variational import Cut, Descent, Diagonal, LogLikelihood
from fsu_ray.models.classifier import Classifier

AT_ONCE = 1 << 22
"""Logits that are held at once where no gradient is wanted."""


@dataclass(frozen=True)
class Learning:
    """How q_full is found: the standard deviations of the `prior` and of q at its `start`, Adam's steps, draws and rate
    (of theta / prior) as in `Descent`, and the `batch` of training samples that a step sees."""

    prior: float = 1.0
    start: float = 0.05
    steps: int = 3000
    samples: int = 4
    lr: float = 0.03
    batch: int = 1000


@torch.no_grad()
def features(classifier: Classifier, pixels: Tensor, batch: int = 1000) -> Tensor:
    """What the last layer sees of pixels (N, C, H, W) uint8, and a 1 for its bias: (N, F + 1) float32, eval mode.

    Raises UnsupportedModel where no Linear layer with a bias gives the logits.
    """
    classifier.eval()
    layer, device = last_layer(classifier), next(classifier.parameters()).device
    features = []
    with _inputs(layer) as seen:
        for part in torch.split(pixels, batch):
            classifier(part.to(device).float() / 255)
            features.append(seen.pop().float().flatten(1))
    x = torch.cat(features)
    return torch.cat((x, torch.ones_like(x[:, :1])), 1)


@contextmanager
def _inputs(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """The inputs that `layer` is given within the block."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def last_layer(classifier: Classifier) -> nn.Linear:
    """The Linear layer whose output is the logits; raises UnsupportedModel where there is none with a bias."""
    ran: list[tuple[nn.Linear, Tensor]] = []
    linear = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    handles = [m.register_forward_hook(lambda m, inputs, output: ran.append((m, output))) for m in linear]
    spec, device = classifier.spec, next(classifier.parameters()).device
    try:
        logits = classifier.eval()(torch.zeros((1, spec.channels, spec.height, spec.width), device=device))
    finally:
        for handle in handles:
            handle.remove()
    if not ran or ran[-1][1].shape != logits.shape or not torch.equal(ran[-1][1], logits):
        raise UnsupportedModel(f"{spec.arch} does not end in a Linear layer with a bias, which EUBO and RKL replace")
    return ran[-1][0]


def cut_at(share: float, dimension: int) -> Decimal:
    """The lambda beyond which q_full's density is where half the squared distance is `share` times D / 2, that of its
    own draws: the scale on which lambda is tuned, whatever the network."""
    return Decimal(-share * dimension / 2).exp()


def weights(classifier: Classifier) -> Tensor:
    """theta as the classifier has it, (K * (F + 1),)."""
    layer = last_layer(classifier)
    return torch.cat((layer.weight.detach(), layer.bias.detach()[:, None]), 1).flatten().clone()


def install(classifier: Classifier, q: Diagonal) -> Classifier:
    """A copy of `classifier` whose last layer is q's mean."""
    bayesian = copy.deepcopy(classifier)
    layer = last_layer(bayesian)
    theta = q.mean.view(layer.out_features, -1)
    with torch.no_grad():
        layer.weight.copy_(theta[:, :-1])
        layer.bias.copy_(theta[:, -1])
    return bayesian


def likelihood(x: Tensor, y: Tensor, classes: int, batch: int | None = None, seed: int = 0) -> LogLikelihood:
    """log p(y | x, theta) summed over features x (N, F + 1) with y (N,) class numbers, for draws theta (S, D): (S,).

    With `batch`, an unbiased estimate by as many samples, others at each call, drawn by `seed`. Raises InvalidData
    where there are no samples, or not as many labels.
    """
    if not len(x) or len(x) != len(y):
        raise InvalidData(f"features (N, F + 1) with N labels are needed, not {len(x)} with {len(y)}")
    rng, y = torch.Generator().manual_seed(seed), y.to(x.device)

    def summed(theta: Tensor) -> Tensor:
        rows, labels = x, y
        if batch is not None and batch < len(x):
            chosen = torch.randint(len(x), (batch,), generator=rng).to(x.device)
            rows, labels = x[chosen], y[chosen]
        most = len(theta) if theta.requires_grad else max(1, AT_ONCE // (len(rows) * classes))
        parts = [_log_p(rows, labels, part.view(len(part), classes, -1)) for part in torch.split(theta, most)]
        return torch.cat(parts) * (len(x) / len(rows))

    return summed


def _log_p(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """(N, F), (N,), (S, K, F) -> (S,)."""
    logits = torch.einsum("nf,skf->snk", x, theta)
    right = logits.gather(2, y.expand(len(theta), -1)[..., None])[..., 0]
    return (right - logits.logsumexp(2)).sum(1)


def posterior(x: Tensor, y: Tensor, theta: Tensor, how: Learning, seed: int) -> Diagonal:
    """q_full, or q of any data: what maximises E_q[log p(y | x, theta)] - KL(q || N(0, prior^2)).

    x (N, F + 1) and y (N,) as in `likelihood`; it begins at N(theta (D,), start^2).
    """
    prior = Diagonal(torch.zeros_like(theta), torch.full_like(theta, how.prior))
    begin = Diagonal(theta, torch.full_like(theta, how.start))
    right = likelihood(x, y, len(theta) // x.shape[1], how.batch, seed)
    descent = Descent(how.steps, how.samples, how.lr)
    return variational.eubo_sampled(prior, lambda u: -right(u), 0, seed, descent, begin)


def eubo(full: Diagonal, x: Tensor, y: Tensor, cut: Cut, seed: int, how: Descent, batch: int | None = 1000) -> Diagonal:
    """`full` without D_e, by EUBO: x (N, F + 1) features of D_e, y (N,) the labels it was learned with.

    It stops after `how.steps`, whatever it has reached. Steps are in standard deviations of `full`, `how.lr` at most
    each. `batch` samples of D_e a step.
    """
    return variational.eubo_sampled(full, _of(full, x, y, batch, seed), cut, seed, how)


def rkl(full: Diagonal, x: Tensor, y: Tensor, cut: Cut, seed: int, batches: int = 100) -> tuple[Diagonal, float]:
    """`full` without D_e, by RKL, as for `eubo`; and how many draws of a batch of 1,000 its weights are worth.

    Where that is near 1, each batch is its draw that D_e is least likely under, and q is where such draws lie: RKL
    then goes as far as the best of 1,000 draws does, and no further.
    """
    likelihood = _of(full, x, y, None, seed)
    posterior = variational.rkl(full, likelihood, cut, seed, batches)
    return posterior, variational.effective_draws(full, likelihood, cut, seed, 5)


def _of(full: Diagonal, x: Tensor, y: Tensor, batch: int | None, seed: int) -> LogLikelihood:
    return likelihood(x, y, len(full.mean) // x.shape[1], batch, seed)


@torch.no_grad()
def predict(
    classifier: Classifier, q: Diagonal, pixels: Tensor, samples: int = 100, seed: int = 0, batch: int = 1000
) -> Tensor:
    """Class probabilities (N, K) of pixels (N, C, H, W) uint8, on the CPU: the mean over `samples` draws of q."""
    return averaged(q, features(classifier, pixels, batch), samples, seed).cpu()


@torch.no_grad()
def averaged(q: Diagonal, x: Tensor, samples: int = 100, seed: int = 0) -> Tensor:
    """Class probabilities (N, K) at features x (N, F + 1): the mean over `samples` draws of q."""
    noise = torch.randn((samples, len(q.mean)), generator=torch.Generator().manual_seed(seed), dtype=q.mean.dtype)
    theta = q.place(noise.to(q.mean.device)).view(samples, -1, x.shape[1])
    return torch.stack([(x @ each.T).softmax(1) for each in theta]).mean(0)
