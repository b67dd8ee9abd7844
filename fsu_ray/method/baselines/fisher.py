"""Fisher scrubbing (Golatkar, Achille and Soatto, CVPR 2020): noise on the weights that the kept data do not determine.

w' = w + sqrt(v) N(0, 1), v = alpha min(1 / (F + 1e-8), 1e3), F the diagonal of the Fisher information on D_r. As in its
authors' code the last layer's variance is capped at 1e2 instead, variances are averaged over a weight's input
channels, and those of the last layer and of one-dimensional parameters are ten times as large. It needs D_r. The paper
calls alpha lambda.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from fsu_ray.errors import InvalidConfig
from fsu_ray.models.classifier import Classifier

CAP, LAST_CAP, LOUDER = 1e3, 1e2, 10.0


def information(classifier: Classifier, pixels: Tensor, chunk: int = 32) -> dict[str, Tensor]:
    """The diagonal of the Fisher information at `classifier` on pixels (N, C, H, W) uint8: a tensor a parameter.

    E_x sum_k p_k(x) (d log p_k(x) / dw)^2: the labels are the classifier's own, over all of which the sum goes, so
    that nothing is drawn. In eval mode; memory grows with chunk x parameters.
    """
    classifier.eval()
    device = next(classifier.parameters()).device
    parameters = {name: p.detach() for name, p in classifier.named_parameters()}
    buffers = {name: b.detach() for name, b in classifier.named_buffers()}

    def squares(x: Tensor) -> dict[str, Tensor]:
        """The sum over k of one image."""

        def log_p(weights: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(classifier, (weights, buffers), (x[None],))
            return logits.float().log_softmax(1)[0]

        log_probabilities, pull = vjp(log_p, parameters)  # type: ignore[misc]
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        eye = torch.eye(len(log_probabilities), device=device)
        for one, p in zip(eye, log_probabilities.detach().exp(), strict=True):
            (slopes,) = pull(one)
            total = {name: total[name] + p * slope.square() for name, slope in slopes.items()}
        return total

    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for part in torch.split(pixels, chunk):
        x = part.to(device).float() / 255
        for name, square in vmap(squares)(x).items():
            total[name] += square.sum(0)
    return {name: sum_ / len(pixels) for name, sum_ in total.items()}


def scrub(classifier: Classifier, fisher: dict[str, Tensor], alpha: float, seed: int) -> Classifier:
    """A copy of `classifier` with noise of strength `alpha` added; raises InvalidConfig for one below 0."""
    if alpha < 0:
        raise InvalidConfig(f"the strength of Fisher's noise is 0 or more, not {alpha:g}")
    scrubbed, rng = copy.deepcopy(classifier), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in scrubbed.named_parameters():
            last = p.shape[0] == classifier.spec.classes
            variance = alpha * (1 / (fisher[name] + 1e-8)).clamp(max=LAST_CAP if last else CAP)
            if p.dim() > 1:
                variance = variance.mean(1, keepdim=True).expand_as(p)
            if last or p.dim() == 1:
                variance = LOUDER * variance
            p.add_(variance.sqrt() * torch.randn(p.shape, generator=rng).to(p.device))
    return scrubbed
