"""Concrete merging: one mask for all experts, learned so that what it leaves merges well on unlabelled inputs.

    θ(x, Λ) = θ0 + m̃ ⊙ Σ_i Λ_i τ_i,   m = σ((x + log u − log(1 − u)) / T),   m̃ = m / mean(m) of the tensor

Outer problem: Adam on the logits x, from one sampled (relaxed Bernoulli, "concrete") mask an iteration. Inner problem:
one gradient step of AdaMerging's coefficients on that mask, from the same Λ0 every time. Then a mask is drawn once and
for all, and the coefficients are found on it by AdaMerging. No graph runs through the merge: with D = Σ Λ τ,

    ∂ℓ/∂m̃ = ∇θ ⊙ D,   ∂m/∂x = m (1 − m) / T

so that an iteration is two gradients of the objective, two passes of A and one of Aᵀ, in the memory of a few models.
Source: Tang et al. (2023), Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion;
the rescaling by the mean and the defaults, but for the inner step (there one of Adam), are the released code's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .adaptive import AdaptiveGradient
from .domains import Domain
from .driver import solve
from .errors import check_choice, check_number
from .files import write_arrays
from .points import Point, start_point
from .problem import Problem
from .result import Result

if TYPE_CHECKING:
    from torch import Tensor

    from ..pools import Pool

Tensors = dict[str, "Tensor"]


@dataclass(frozen=True)
class Concrete:
    """Options of concrete merging.

    iterations: of the outer problem; lr: Adam's rate for the logits; temperature: T > 0; initial_logit: x at the start;
    scale: Λ0, the same for all; inner_lr: of the inner gradient step (0: none); mask: what is drawn at the end,
    "continuous" (m̃ of a relaxed mask) or "discrete" (0 or 1, by σ(x)); adapt: find the coefficients by AdaMerging
    (merge_iterations of Adam at merge_lr), or stay at task arithmetic of Λ0; seed: of the masks.
    """

    iterations: int = 1000
    lr: float = 1e-3
    temperature: float = 0.5
    initial_logit: float = 0.0
    scale: float = 0.3
    inner_lr: float = 1.0
    mask: str = "continuous"
    adapt: bool = True
    merge_iterations: int = 1000
    merge_lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "iterations", 0, math.inf, closed="left", integer=True)
        check_number(self, "lr", 0, math.inf, closed="neither")
        check_number(self, "temperature", 0, math.inf, closed="neither")
        check_number(self, "initial_logit", -math.inf, math.inf, closed="neither")
        check_number(self, "scale", -math.inf, math.inf, closed="neither")
        check_number(self, "inner_lr", 0, math.inf, closed="left")
        check_choice(self, "mask", ("continuous", "discrete"))
        check_choice(self, "adapt", (True, False))
        check_number(self, "merge_iterations", 0, math.inf, closed="left", integer=True)
        check_number(self, "merge_lr", 0, math.inf, closed="neither")
        check_number(self, "seed", 0, math.inf, closed="left", integer=True)


@dataclass
class ConcreteMerge:
    """What `concrete_merge` returns.

    mask_file: the mask m̃, which `pool.transform(make_transform({"name": "mask", "path": mask_file}))` applies; pool:
    that pool; result: the solve on it, so that `pool.materialize(result.coefficients, pool.blocks(...), path)` writes
    the model; losses: of the outer problem, one an iteration; gradients: of the objective, for mask and coefficients.
    """

    mask_file: Path
    pool: Pool
    result: Result
    losses: list[float] = field(repr=False)
    gradients: int
    seconds: float


def concrete_merge(
    pool: Pool,
    objective: Any,
    mask_file: str | Path,
    *,
    blocks: str | Sequence[str] = "tensor",
    domain: str | Domain = "free",
    options: Concrete | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> ConcreteMerge:
    """Learn a mask on the objective's data, write it to `mask_file` (safetensors), and merge under it.

    objective: as a rule `Entropy` with a batch size of 16; any will do. blocks, domain: of the coefficients.
    progress: called with the number and the loss of every outer iteration.
    Raises OptionError for options out of range, FloatingPointError where the loss is not finite.
    """
    from ..pools.transforms import make_transform

    options = options or Concrete()
    began = time.monotonic()
    path = Path(mask_file)
    start = f"task-arithmetic:{options.scale}"
    before = Problem(pool, objective, blocks, domain)  # found out now, and not after the mask is learned
    before.check(start_point(before, start), "the starting point")
    learner = MaskLearner(pool, objective, blocks, options)
    losses = []
    for iteration in range(options.iterations):
        losses.append(learner.step(iteration))
        if progress is not None:
            progress(iteration, losses[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"method": "concrete", "iterations": options.iterations, "pool": pool.fingerprint}
    mask = learner.final()
    write_arrays(path, {name: tensor.cpu().numpy() for name, tensor in mask.items()}, about)
    masked = pool.transform(make_transform({"name": "mask", "path": str(path)}))
    result = solve(
        Problem(masked, objective, blocks, domain),
        AdaptiveGradient(lr=options.merge_lr) if options.adapt else Point(),
        start=start,
        max_iter=options.merge_iterations if options.adapt else 0,
    )
    gradients = learner.gradients + result.counts["gradients"]
    return ConcreteMerge(path, masked, result, losses, gradients, time.monotonic() - began)


class MaskLearner:
    """The outer problem: logits x, Adam's moments, and one step at a time."""

    def __init__(self, pool: Pool, objective: Any, blocks: str | Sequence[str], options: Concrete) -> None:
        self._pool, self._objective, self._options = pool, objective, options
        self._blocks = pool.blocks(blocks)
        self._start = np.full((self._blocks.count, pool.n), options.scale)
        self._base: Tensors = pool.combine(np.zeros_like(self._start), self._blocks)
        self._sum: Tensors = pool.displacement(self._start, self._blocks)
        self.logits: Tensors = {name: tensor * 0 + options.initial_logit for name, tensor in self._base.items()}
        self._first: Tensors = {name: tensor * 0 for name, tensor in self._base.items()}
        self._second: Tensors = {name: tensor * 0 for name, tensor in self._base.items()}
        self.gradients = 0

    def step(self, iteration: int) -> float:
        """One mask, one inner step, one Adam step of the logits; returns the loss after the inner step."""
        mask = self.sample(iteration)
        scaled = rescaled(mask)
        merged = self._sum
        if self._options.inner_lr > 0:
            gradient = self._gradient(scaled, merged, 2 * iteration)[1]
            scores = self._pool.correlate({name: gradient[name] * scaled[name] for name in scaled}, self._blocks)
            merged = self._pool.displacement(self._start - self._options.inner_lr * scores, self._blocks)
        loss, gradient = self._gradient(scaled, merged, 2 * iteration + 1)
        for name, m in mask.items():
            self._descend(name, iteration, self._pulled_back(m, gradient[name] * merged[name]))
        return loss

    def _gradient(self, mask: Mapping[str, Tensor], merged: Mapping[str, Tensor], draw: int) -> tuple[float, Tensors]:
        """Loss and ∇θ at θ0 + m̃ ⊙ D, on a batch of its own."""
        self._objective.draw(draw)
        weights = {name: base + mask[name] * merged[name] for name, base in self._base.items()}
        evaluation = self._objective.value_and_grad(weights)
        self.gradients += 1
        if not math.isfinite(evaluation.loss):
            raise FloatingPointError(
                f"concrete: the objective became {evaluation.loss}; lower inner_lr or lr, or inspect the pool."
            )
        return float(evaluation.loss), evaluation.gradient

    def _pulled_back(self, m: Tensor, outer: Tensor) -> Tensor:
        """∂ℓ/∂x from ∂ℓ/∂m̃ of one tensor: through m̃ = m / mean(m), then through the sigmoid."""
        mean = m.mean()
        inner = outer / mean - (outer * m).sum() / (mean**2 * m.numel())
        return inner * m * (1 - m) / self._options.temperature

    def _descend(self, name: str, iteration: int, gradient: Tensor) -> None:
        """Adam, with the usual moments."""
        first, second, t = self._first[name], self._second[name], iteration + 1
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        rate = self._options.lr / (1 - 0.9**t)
        self.logits[name].addcdiv_(first, (second / (1 - 0.999**t)).sqrt_().add_(1e-8), value=-rate)

    def sample(self, iteration: int) -> Tensors:
        """A relaxed mask, entries in (0, 1), by the seed and the iteration."""
        import torch

        generator = torch.Generator().manual_seed((self._options.seed * 1_000_003 + iteration) % 2**63)
        mask = {}
        for name, logits in self.logits.items():
            uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-6, 1 - 1e-6).to(logits.device)
            mask[name] = ((logits + uniform.logit()) / self._options.temperature).sigmoid_()
        return mask

    def final(self) -> Tensors:
        """The mask that is kept, rescaled: drawn after the last iteration."""
        mask = self.sample(self._options.iterations)
        if self._options.mask == "discrete":  # σ((x + logit(u)) / T) > 1/2 with probability σ(x)
            mask = {name: (m > 0.5).to(m.dtype) for name, m in mask.items()}
        return rescaled(mask)


def rescaled(mask: Mapping[str, Tensor]) -> Tensors:
    """m / mean(m) of every tensor; one that is 0 everywhere stays so."""
    return {name: m / m.mean() if bool(m.any()) else m for name, m in mask.items()}
