"""Distance from weights that are to be kept, without any data: ℓ(θ) = ½ Σ_p F_p (θ_p − c_p)².

With F = 1 it is half the squared Euclidean distance (the proximal term of federated learning); with F the diagonal
Fisher of the centre it is the EWC anchor: to second order, the price of forgetting what the centre knew, since a
coordinate costs as much as the predictions depend on it. As a constraint it is a trust region around the centre.
Source: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, eq. 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .errors import DataError, some
from .models import Weights
from .objective import Source, SumObjective, Term


class Proximity(SumObjective):
    """½ Σ F (θ − c)² over the floating-point tensors of the weights it is given, accumulated in float64.

    center: c, by tensor name; the weights may be a part of it. metric: F ≥ 0, in the names and shapes of the centre,
    as `fisher_diagonal` returns it; None is F = 1. device: where to compute; None: where the centre is. The centre may
    stay elsewhere, and then travels tensor by tensor. Raises DataError for a metric that does not fit, and for weights
    that the centre lacks.
    """

    tasks = ("proximity",)

    def __init__(
        self, center: Weights, metric: Weights | None = None, *, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        self.center = {name: tensor.detach() for name, tensor in center.items() if tensor.is_floating_point()}
        if not self.center:
            raise DataError("Proximity: the center has no floating-point tensor; give the weights to stay close to.")
        self.metric = None if metric is None else {name: tensor.detach() for name, tensor in metric.items()}
        for name, tensor in (self.metric or {}).items():
            if name in self.center and tensor.shape != self.center[name].shape:
                raise DataError(
                    f"Proximity: the metric of {name!r} has shape {list(tensor.shape)}, its center "
                    f"{list(self.center[name].shape)}; give one entry a parameter (a diagonal)."
                )
            if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
                raise DataError(f"Proximity: the metric of {name!r} has entries that are negative or not finite.")
        self.task_weights = np.ones(1)
        self.device = torch.device(device) if device is not None else next(iter(self.center.values())).device

    def terms(self) -> Sequence[Term]:
        """The one term."""
        return [Term("proximity", 1.0, self._accumulate)]

    def prepare(self, weights: Weights) -> None:
        """Check that the centre, and the metric if there is one, have all of these weights."""
        names = [name for name, tensor in weights.items() if tensor.is_floating_point()]
        for what, known in (("center", self.center), ("metric", self.metric)):
            missing = [] if known is None else [name for name in names if name not in known]
            if missing:
                raise DataError(
                    f"Proximity: the {what} lacks {some(missing)} of the weights; it needs every tensor that is merged."
                )
        for name in names:
            if weights[name].shape != self.center[name].shape:
                raise DataError(
                    f"Proximity: {name!r} has shape {list(weights[name].shape)}, in the center "
                    f"{list(self.center[name].shape)}; both must be of one architecture."
                )

    def differentiable(self, name: str) -> bool:
        """Whether the tensor is in the centre."""
        return name in self.center

    @torch.no_grad()
    def _accumulate(self, tensors: Weights, scale: float | None) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            offset = tensor.double() - self.center[name].to(self.device, torch.float64)
            pull = offset if self.metric is None else offset * self.metric[name].to(self.device, torch.float64)
            total += 0.5 * (offset * pull).sum()
            if scale is not None:  # the gradient is known, so no graph is built for it
                gradient = (scale * pull).to(tensor.dtype)
                tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        return float(total)

    def sources(self) -> Sequence[Source]:
        """None: weights are not examples."""
        return []

    @property
    def stochastic(self) -> bool:
        """Never."""
        return False

    def draw(self, iteration: int | None) -> None:
        """There are no batches."""

    @cached_property
    def fingerprint(self) -> str:
        """Identifies centre and metric, by their bytes."""
        digest = hashlib.sha256()
        for part in (self.center, self.metric or {}):
            for name in sorted(part):
                digest.update(f"{name}:{part[name].dtype}:{list(part[name].shape)}".encode())
                digest.update(part[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Class, metric, and what centre it is."""
        return {
            "objective": "Proximity",
            "tasks": [{"name": "proximity"}],
            "metric": "euclidean" if self.metric is None else "diagonal",
            "fingerprint": self.fingerprint,
        }
