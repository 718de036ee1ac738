"""Frank-Wolfe as a server step whose oracle the clients answer: they send scores, and weights only when chosen.

In this process the clients' models are at hand and each is asked as if it were far away; the bytes of the record are
those that would have travelled. Screening looks at all models, which a server on a network can only do on arrival.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..solvers import make_domain, make_solver
from .errors import FederationError
from .oracle import LocalScorer, federated_frank_wolfe
from .solving import OBJECTIVES, TEACHERS, WEIGHTS, SolveStep
from .step import Proposal, Round, ServerData, ServerStep


@dataclass(frozen=True)
class FederatedFrankWolfe(ServerStep):
    """Hard Frank-Wolfe from θ_t, with the clients' models as vertices that are sent when the oracle chooses them.

    objective: "cross-entropy" or "entropy" on the server's samples; blocks, domain, max_iter: as in `SolveStep`;
    step_rule: of Frank-Wolfe; uploads: "blocks" (what was chosen of a model) or "model" (all of it); gradient_dtype:
    "float32" or "bfloat16", of the gradients that are sent to the clients.
    """

    objective: Mapping[str, Any] = field(default_factory=lambda: {"name": "cross-entropy"})
    blocks: Any = "layer"
    domain: Any = "capped"
    step_rule: Any = "line-search"
    max_iter: int = 5
    uploads: str = "blocks"
    gradient_dtype: str = "float32"
    source: ClassVar[str] = "FW-Merging (Chen et al. 2025), with the oracle distributed"

    def __post_init__(self) -> None:
        spec = {"name": self.objective} if isinstance(self.objective, str) else dict(self.objective)
        if OBJECTIVES.get(spec.get("name", "")) in (TEACHERS, WEIGHTS):
            raise FederationError(
                f"the step 'fw-federated' cannot minimize {spec['name']!r}, which needs the clients' models at the "
                "server; minimize 'cross-entropy' or 'entropy', or use the preset 'fw-hard' with that objective."
            )
        object.__setattr__(self, "objective", spec)
        make_solver({"name": "frank-wolfe", "step_rule": self.step_rule})
        make_domain(self.domain)

    def _local(self) -> SolveStep:
        """The same objective as a plain solve has it."""
        return SolveStep(objective=self.objective, blocks=self.blocks, domain=self.domain, name="fw-federated")

    def check(self, data: ServerData) -> None:
        """What the objective needs."""
        self._local().check(data)

    def propose(self, round: Round) -> Proposal:
        """Ask the clients."""
        objective = self._local().loss(round, round.pool, round.draw)
        models = {reply.client: reply.weights for reply in round.replies}
        with round.watch.timed("objective"):
            result, weights, traffic = federated_frank_wolfe(
                round.anchor,
                [LocalScorer(name, model, round.anchor) for name, model in models.items() if model is not None],
                objective,
                solver={"name": "frank-wolfe", "step_rule": self.step_rule},
                blocks=self.blocks,
                domain=self.domain,
                start="base",
                max_iter=self.max_iter,
                uploads=self.uploads,
                gradient_dtype=self.gradient_dtype,
            )
        details = {
            "objective": result.objective,
            "gap": result.gap,
            "status": result.status,
            "iterations": result.nit,
            "traffic": traffic.to_dict(),
        }
        means = dict(zip(result.experts, np.mean(result.coefficients, axis=0).tolist(), strict=True))
        return Proposal(
            weights,
            means,
            details,
            dict(objective.data_used),
            bytes_up=traffic.up_bytes,
            bytes_down=traffic.down_bytes,
        )

    def describe(self) -> dict[str, Any]:
        """Return every option."""
        return {
            "name": "fw-federated",
            "objective": dict(self.objective),
            "blocks": self.blocks,
            "domain": make_domain(self.domain).describe(),
            "step_rule": make_solver({"name": "frank-wolfe", "step_rule": self.step_rule}).describe()["step_rule"],
            "max_iter": self.max_iter,
            "uploads": self.uploads,
            "gradient_dtype": self.gradient_dtype,
        }
