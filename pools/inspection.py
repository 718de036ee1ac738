"""What is in a pool before it is merged: sizes, geometry of the task vectors, and models that look wrong.

One pass over the pool. Values that are not finite are counted and left out of norms and cosines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import KINDS
from .errors import listing
from .operator import Piece, gram_limit, piece_stack, pieces, segmented_gram
from .pool import Pool
from .sources import Scratch

Matrix = NDArray[np.float64]

# Root mean square of the rounding error relative to a value, for mantissas that are uniform on a logarithmic scale:
# ulp/√12 with ulp = 2^-b · 2^floor(log2 |x|), so 2^-b · √(3 / (8 ln 2)) / √12.
_RELATIVE_ROUNDING = {torch.bfloat16: 2.0**-7 * 0.2123, torch.float16: 2.0**-10 * 0.2123}

ROUNDING = 0.25  # of the task vector's norm: beyond that, rounding decides scores
DUPLICATE = 1e-3  # distance of two task vectors relative to their norm
STRANGER_COSINE = 0.8  # of an expert's weights with the base's; fine-tuned models stay above 0.98 or so
STRANGER_NORM = 2.5  # times the median norm of the others
ALIKE = 0.5  # mean cosine with the others above which a long task vector is a strong one, not a stranger
WRONG_BASE_COSINE = 0.9  # mean cosine of task vectors that consist of one common displacement


@dataclass(frozen=True)
class Flag:
    """Something that looks wrong: `kind` is stranger, base, duplicate, unchanged, nonfinite or rounding."""

    kind: str
    model: str
    """The expert, or "base"."""
    message: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `inspect` found; n experts in the order of `names`."""

    names: tuple[str, ...]
    parameters: int
    """Merged parameters of one model."""
    tensors: int
    """Merged tensors."""
    carried: int
    """Tensors that are taken from the base as they are."""
    nbytes: int
    """Bytes of the merged tensors as stored, all models together."""
    resident_nbytes: int
    """Memory that the resident backend needs."""
    storage: dict[str, str]
    """Element types of the merged tensors, by model ("base" and the experts)."""
    blocks: dict[str, int]
    """Rows of the coefficients, by kind of block."""
    base_norm: float
    norms: Matrix
    """‖τ_i‖, [n]."""
    base_cosines: Matrix
    """cos(θ_i, θ0), [n]: close to 1 for what was fine-tuned from the base."""
    cosines: Matrix
    """cos(τ_i, τ_j), [n, n]; 0 where a task vector is 0."""
    sign_conflicts: Matrix
    """Share of parameters that two experts move in opposite directions, of those that both move, [n, n]."""
    conflicted: float
    """Share of parameters that some experts raise and others lower, of those that any moves."""
    flags: tuple[Flag, ...]
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        plain: dict[str, Any] = {}
        for key, value in vars(self).items():
            if isinstance(value, np.ndarray):
                plain[key] = value.tolist()
            elif key == "flags":
                plain[key] = [{**vars(flag), "tensors": list(flag.tensors)} for flag in self.flags]
            else:
                plain[key] = list(value) if isinstance(value, tuple) else value
        return plain


def inspect(pool: Pool) -> Report:
    """Read the pool once and report sizes, norms, cosines, sign conflicts and flags."""
    found = _measure(pool)
    base_square, overlap, gram = found.gram[0, 0], found.gram[0, 1:], found.gram[1:, 1:]
    norms = np.sqrt(np.diag(gram))
    expert_norms = np.sqrt(np.maximum(base_square + 2 * overlap + norms**2, 0))
    cosines = _ratio(gram, np.outer(norms, norms))
    base_cosines = _ratio(base_square + overlap, np.sqrt(base_square) * expert_norms)
    flags = (
        *_nonfinite(pool, found),
        *_duplicates(pool.names, gram, norms),
        *_strangers(pool.names, norms, base_cosines, cosines),
        *_rounding(pool, norms, np.sqrt(base_square), expert_norms),
    )
    return Report(
        names=pool.names,
        parameters=sum(prod(shape) for shape in pool.tensors.values()),
        tensors=len(pool.tensors),
        carried=len(pool.carried),
        nbytes=pool.nbytes,
        resident_nbytes=pool.resident_nbytes,
        storage={name: listing(str(t).removeprefix("torch.") for t in kinds) for name, kinds in pool.storage.items()},
        blocks={kind: pool.blocks(kind).count for kind in KINDS},
        base_norm=float(np.sqrt(base_square)),
        norms=norms,
        base_cosines=base_cosines,
        cosines=cosines,
        sign_conflicts=_ratio(found.moved - found.signs, 2 * found.moved),
        conflicted=float(_ratio(found.conflicted, found.touched)),
        flags=flags,
        fingerprint=pool.fingerprint,
    )


class _Measured:
    """Sums over pieces of tensors: t tensors, n experts."""

    def __init__(self, t: int, n: int) -> None:
        self.gram = np.zeros((1 + n, 1 + n))
        """Inner products of θ0 and the task vectors."""
        self.signs = np.zeros((n, n))
        """Parameters moved alike minus parameters moved oppositely."""
        self.moved = np.zeros((n, n))
        """Parameters that both move."""
        self.conflicted = 0.0
        self.touched = 0.0
        self.nonfinite = np.zeros((t, 1 + n))
        """Values that are not finite, by tensor, of the base and the experts."""

    def add(self, t: int, piece: _Sums) -> None:
        """Add a piece of one tensor."""
        self.gram += piece.gram
        self.signs += piece.signs
        self.moved += piece.moved
        self.conflicted += piece.conflicted
        self.touched += piece.touched
        if piece.nonfinite is not None:
            self.nonfinite[t] += piece.nonfinite


@dataclass(frozen=True)
class _Sums:
    """The same sums over one piece."""

    gram: Matrix
    signs: Matrix
    moved: Matrix
    conflicted: float
    touched: float
    nonfinite: Matrix | None
    """[1 + n], or None where all values are finite."""


def _sums(base: torch.Tensor, stack: torch.Tensor) -> _Sums:
    """Take the sums over a piece: base [elements], task vectors [n, elements]."""
    nonfinite: Matrix | None = None
    finite_base = base.isfinite()
    if not (bool(finite_base.all()) and bool(stack.isfinite().all())):
        bad = torch.cat([~finite_base.unsqueeze(0), ~stack.isfinite() & finite_base])
        nonfinite = bad.sum(dim=1, dtype=torch.float64).numpy()
        stack = stack.nan_to_num(0.0, 0.0, 0.0)
        base = base.nan_to_num(0.0, 0.0, 0.0)
    gram = segmented_gram(torch.cat([base.unsqueeze(0), stack])).numpy()
    signs = stack.sign()
    moves = signs.abs()
    moved, balance = moves.sum(dim=0), signs.sum(dim=0)
    return _Sums(
        gram=gram,
        signs=torch.mm(signs, signs.t()).double().numpy(),  # counts below 2^24 are exact in float32
        moved=torch.mm(moves, moves.t()).double().numpy(),
        conflicted=float((balance.abs() < moved).sum()),
        touched=float((moved > 0).sum()),
        nonfinite=nonfinite,
    )


def _measure(pool: Pool) -> _Measured:
    source, workers = pool.engine()
    blocks = pool.blocks("tensor")
    total = _Measured(blocks.count, pool.n)

    def measure(piece: Piece, scratch: Scratch) -> _Sums:
        base = source.base(piece.name, piece.start, piece.stop, scratch)
        return _sums(base, piece_stack(source, piece, scratch, base))

    work = pieces(source, blocks, list(source.shapes), gram_limit(workers.limit, 2 * pool.n))
    workers.run(work, measure, then=lambda piece, found: total.add(piece.rows.start, found), serial=source.serial)
    return total


def _ratio(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(np.asarray(a, dtype=np.float64)), where=np.asarray(b) > 0)


def _nonfinite(pool: Pool, found: _Measured) -> list[Flag]:
    flags = []
    tensors = list(pool.tensors)
    for column, model in enumerate(("base", *pool.names)):
        counts = found.nonfinite[:, column]
        bad = [f"{tensors[t]!r} ({int(counts[t])})" for t in np.flatnonzero(counts)]
        if bad:
            who = "the base" if column == 0 else f"expert {model!r}"
            flags.append(
                Flag(
                    "nonfinite",
                    model,
                    f"{who} has NaN or infinite values in {listing(bad, 40)}; leave it out, or save it again.",
                    tuple(tensors[t] for t in np.flatnonzero(counts)),
                )
            )
    return flags


def _duplicates(names: Sequence[str], gram: Matrix, norms: Matrix) -> list[Flag]:
    flags = []
    for i, name in enumerate(names):
        if norms[i] == 0:
            flags.append(Flag("unchanged", name, f"expert {name!r} equals the base: its task vector is 0."))
            continue
        for j in range(i):
            distance = np.sqrt(max(gram[i, i] + gram[j, j] - 2 * gram[i, j], 0))
            if distance <= DUPLICATE * max(norms[i], norms[j]):
                flags.append(
                    Flag("duplicate", name, f"expert {name!r} is a duplicate of {names[j]!r}; leave one of them out.")
                )
                break
    return flags


def _strangers(names: Sequence[str], norms: Matrix, base_cosines: Matrix, cosines: Matrix) -> list[Flag]:
    n = len(names)
    others = [[j for j in range(n) if j != i and norms[j] > 0] for i in range(n)]
    closeness = np.array([cosines[i, others[i]].mean() if others[i] else 0.0 for i in range(n)])
    far = base_cosines < STRANGER_COSINE
    if n >= 2 and far.all() and closeness.min() > WRONG_BASE_COSINE:
        return [
            Flag(
                "base",
                "base",
                "the base is probably not the base of these experts: none resembles it, and all task vectors point the "
                f"same way (mean cosine {closeness.mean():.2f}). Give the checkpoint that they were fine-tuned from.",
            )
        ]
    flags = []
    for i, name in enumerate(names):
        usual = np.median(norms[others[i]]) if len(others[i]) >= 2 else np.inf
        outside = norms[i] > STRANGER_NORM * usual and closeness[i] < ALIKE
        if norms[i] > 0 and (far[i] or outside):
            compared = f", {norms[i] / usual:.1f} times the median of the others" if np.isfinite(usual) else ""
            flags.append(
                Flag(
                    "stranger",
                    name,
                    f"expert {name!r} does not seem to descend from the base: task vector of norm {norms[i]:.3g}"
                    f"{compared}, cosine {base_cosines[i]:.2f} with the base's weights, {closeness[i]:.2f} with the "
                    "other task vectors. Leave it out, or check where it comes from.",
                )
            )
    return flags


def _rounding(pool: Pool, norms: Matrix, base_norm: float, expert_norms: Matrix) -> list[Flag]:
    flags = []
    coarse = {
        name: max((_RELATIVE_ROUNDING.get(t, 0.0) for t in kinds), default=0.0) for name, kinds in pool.storage.items()
    }
    for i, name in enumerate(pool.names):
        error = np.hypot(coarse[name] * expert_norms[i], coarse["base"] * base_norm)
        if norms[i] > 0 and error > ROUNDING * norms[i]:
            flags.append(
                Flag(
                    "rounding",
                    name,
                    f"expert {name!r}: rounding of the stored values is about {error / norms[i]:.0%} of its task "
                    "vector, so scores are unreliable. Use checkpoints stored in float32.",
                )
            )
    return flags
