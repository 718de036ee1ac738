"""One round of the server, as a function: no network, no files, no clock besides the record's seconds.

θ_{t+1}, state, record = merge_round(θ_t, replies, state, step)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..solvers import memory
from ..solvers.problem import cosines
from .errors import FederationError
from .phases import conflict
from .replies import Reply, Weights
from .screening import Screening, pool_of, screen
from .state import ServerState
from .step import Proposal, Round, ServerData, ServerStep, Watch


def merge_round(
    anchor: Weights,
    replies: Sequence[Reply],
    state: ServerState,
    step: ServerStep,
    *,
    data: ServerData | None = None,
    screening: Screening | None = None,
    seed: int = 0,
    backend: str = "auto",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, torch.Tensor], ServerState, dict[str, Any]]:
    """Merge what the clients sent into the next global model; also return the next state and the round's record.

    anchor: θ_t, all tensors. The new model has its names and element types; tensors that are not merged (integers, and
    what no client changed) are the anchor's. The order of the replies does not matter. With fewer than
    `screening.minimum` acceptable replies the record says `repeat`, and model and state are what they were.
    Raises FederationError for a step that the round does not allow, or that gives a model that is not finite.
    """
    screening = screening or Screening()
    data = data or ServerData()
    number = state.round + 1
    watch, began = Watch(), time.perf_counter()
    memory.reset_peak()
    with watch.timed("screen"):
        screened = screen(
            anchor,
            replies,
            number=number,
            options=screening,
            last=state.fingerprints,
            norms=state.norms,
            device=device,
        )
    record: dict[str, Any] = {
        "round": number,
        "repeat": len(screened.accepted) < screening.minimum,
        "accepted": [reply.client for reply in screened.accepted],
        "rejected": [rejection.describe() for rejection in screened.rejected],
    }
    if record["repeat"] or screened.pool is None:
        traffic = _traffic(anchor, replies, screened.received, Proposal({}))
        return (
            dict(anchor),
            state,
            {**record, "repeat": True, "bytes": traffic, "seconds": _seconds(watch, began, replies)},
        )

    if backend == "auto":  # by what is free in the first round; later ones must not round differently
        backend = state.backend or pool_of(anchor, screened.accepted, "auto", device).backend
    round_ = Round(
        number,
        screened.pool,
        screened.accepted,
        screened.gram,
        anchor,
        state.origin,
        data,
        state.memory,
        seed,
        watch,
        progress,
        backend,
    )
    norms = np.sqrt(np.diagonal(screened.gram))
    with watch.timed("screen"):
        cancelled = conflict(screened.pool)
    proposal = step.propose(round_)
    with watch.timed("combine"):
        weights = _next(anchor, proposal, step)
    record |= {
        "cosines": cosines(screened.gram).tolist(),
        "norms": dict(zip(screened.pool.names, norms.tolist(), strict=True)),
        "conflict": cancelled,
        "step_length": distance(weights, anchor),
        "distance": distance(weights, state.origin),
        "coefficients": None if proposal.coefficients is None else dict(proposal.coefficients),
        "method": dict(proposal.details),
        "data": {**proposal.data_used, **{k: proposal.data_used.get(k, 0) + n for k, n in round_.ledger.items()}},
        "metrics": {reply.client: dict(reply.metrics) for reply in screened.accepted},
        "seconds": _seconds(watch, began, replies),
        "bytes": _traffic(anchor, replies, screened.received, proposal),
        "peak_memory": memory.peak(),
    }
    return weights, state.after(proposal.memory, screened.fingerprints, norms.tolist(), backend), record


def distance(a: Weights, b: Weights) -> float:
    """Return ‖a − b‖ over all floating-point tensors, accumulated in float64."""
    total = 0.0
    for name, tensor in a.items():
        if tensor.is_floating_point():
            ours, theirs = tensor.detach(), b[name].detach().to(tensor.device)
            total += float((ours.float() - theirs.float()).square().sum(dtype=torch.float64))
    return float(np.sqrt(total))


def _next(anchor: Weights, proposal: Proposal, step: ServerStep) -> dict[str, torch.Tensor]:
    weights = dict(anchor)
    for name, tensor in proposal.weights.items():
        weights[name] = tensor.detach().to(anchor[name].device, anchor[name].dtype)
        if not bool(torch.isfinite(weights[name]).all()):  # as it is stored: float16 ends at 65504
            raise FederationError(
                f"the server step {step.describe().get('name')!r} gave NaN or infinity in {name!r}; take smaller steps "
                "(its scale or rate), or choose another step."
            )
    return weights


def _traffic(anchor: Weights, replies: Sequence[Reply], received: int, proposal: Proposal) -> dict[str, int]:
    """Bytes between server and clients: the model to each that replied, and their models back."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in anchor.values())
    up = proposal.bytes_up
    if up is None:
        fishers = [reply.fisher for reply in replies if reply.fisher is not None]
        up = received + sum(t.numel() * t.element_size() for fisher in fishers for t in fisher.values())
    return {"down": size * len(replies) + proposal.bytes_down, "up": up}


def _seconds(watch: Watch, began: float, replies: Sequence[Reply]) -> dict[str, float]:
    """By part; "server" is the whole round at the server, "clients" the sum of what they say that they took."""
    spent = time.perf_counter() - began
    return {**watch.seconds, "server": spent, "clients": sum(reply.seconds for reply in replies)}
