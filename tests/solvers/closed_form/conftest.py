"""Sampled pools, and every method written a second time: plainly, in float64 NumPy, on whole tensors.

The references see base and task vectors as dictionaries of arrays, {tensor: [*shape]} and {tensor: [n, *shape]}, with
the task vectors rounded to float32 as the differences of what is stored, so that ties and signs are decided on the
same numbers. They share no code with the package.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form import MERGES

SHAPES = {
    "conv.weight": (4, 3, 2, 2),
    "a.weight": (7, 11),
    "a.bias": (11,),
    "b.weight": (60, 50),
    "b.bias": (1500,),
    "one": (1,),
    "wide": (1, 9),
    "tall": (9, 1),
    "scale": (),
    "empty": (0, 3),
}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values()) + 5  # with what is the same in all models
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def states(kind="normal", n=4, dtype="float32", seed=0):
    """(base, {expert: state}). `normal`: almost no zeros. `grid`: few values, so zeros, ties and sums of 0 abound.

    On the grid every value, difference and sum is exact in all types. One expert leaves one tensor alone, and one
    tensor is the same in all models.
    """
    rng = np.random.default_rng([seed, n])

    def draw(shape, step):
        if kind == "grid":
            return rng.integers(-8, 9, shape) * step
        return rng.normal(size=shape) * 8 * step

    base = {name: draw(shape, 0.25) for name, shape in SHAPES.items()}
    experts = {f"e{i}": {name: value + draw(value.shape, 0.125) for name, value in base.items()} for i in range(n)}
    experts["e0"]["a.bias"] = base["a.bias"]
    base["frozen"] = draw((5,), 0.25)
    for state in experts.values():
        state["frozen"] = base["frozen"]

    def stored(state):
        found = {name: torch.from_numpy(np.array(value)).to(DTYPES[dtype]) for name, value in state.items()}
        return {**found, "steps": torch.tensor([3, 4])}

    return stored(base), {name: stored(state) for name, state in experts.items()}


def arrays(base, experts):
    """Base and task vectors for the references: float32 differences of what is stored, as float64."""
    names = [name for name in SHAPES if any(not torch.equal(state[name], base[name]) for state in experts.values())]
    plain = {name: base[name].float().numpy() for name in names}
    taus = {
        name: np.stack([state[name].float().numpy() - plain[name] for state in experts.values()]).astype(np.float64)
        for name in names
    }
    return {name: value.astype(np.float64) for name, value in plain.items()}, taus


def same(found, wanted, atol=2e-6, rtol=2e-6):
    """Assert that the merged tensors (torch) are those of the reference (NumPy)."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert tuple(found[name].shape) == np.shape(value), name
        np.testing.assert_allclose(found[name].numpy(), value, atol=atol, rtol=rtol, err_msg=name)


# References


def per_tensor(function):
    """Make a reference of function(base [*shape], taus [n, *shape], **options) -> merged [*shape]."""

    def reference(base, taus, names, **options):
        return {name: function(base[name], taus[name], **options) for name in base}

    return reference


def linear(coefficients):
    """Make a reference of the coefficients [n] that coefficients(names, **options) returns."""

    def reference(base, taus, names, **options):
        weights = np.asarray(coefficients(names, **options), dtype=np.float64)
        return {name: base[name] + np.tensordot(weights, taus[name], 1) for name in base}

    return reference


def given(weights, names, default=1.0):
    return np.array([(weights or {}).get(name, default) for name in names])


def average(names, weights=None, normalize=True):
    found = given(weights, names)
    return found / found.sum() if normalize else found


def swa(names, first=0, every=1):
    chosen = [i for i in range(first, len(names)) if (i - first) % every == 0]
    return [1 / len(chosen) if i in chosen else 0 for i in range(len(names))]


def ema(names, decay=0.9, start="first"):
    """The recursion itself, on unit vectors; the base is what is left to 1."""
    eye = np.eye(len(names))
    running = eye[0] if start == "first" else (1 - decay) * eye[0]
    for row in eye[1:]:
        running = decay * running + (1 - decay) * row
    return running


def largest(values, k):
    """A mask of exactly k entries of largest magnitude; of equal ones, the first."""
    order = np.argsort(-np.abs(values).ravel(), kind="stable")
    mask = np.zeros(values.size, dtype=bool)
    mask[order[:k]] = True
    return mask.reshape(values.shape)


def trimmed(taus, density, per):
    if density == 1:
        return taus
    n = len(next(iter(taus.values())))
    if per == "tensor":
        return {
            name: np.stack([row * largest(row, max(1, int(density * row.size))) for row in rows])
            for name, rows in taus.items()
        }
    flat = np.concatenate([rows.reshape(n, -1) for rows in taus.values()], axis=1)
    size = flat.shape[1]
    place = min(size, int(density * SIZE) + 1)
    cuts = [np.sort(np.abs(row))[size - place] for row in flat]
    return {
        name: np.stack([row * (np.abs(row) >= cut) for row, cut in zip(rows, cuts, strict=True)])
        for name, rows in taus.items()
    }


def election(base, taus, names, scale=0.3, merge="mean", weights=None, zero="drop"):
    """Sign election in loops over experts."""
    w = given(weights, names)
    weighted = {name: np.stack([a * row for a, row in zip(w, rows, strict=True)]) for name, rows in taus.items()}
    balance = sum(np.sign(rows.sum(0)).sum() for rows in weighted.values())
    merged = {}
    for name, rows in weighted.items():
        sign = np.sign(rows.sum(0))
        if zero == "plus":
            sign = np.where(sign == 0, 1, sign)
        if zero == "majority":
            sign = np.where(sign == 0, 1 if balance > 0 else -1, sign)
        total, divisor = np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:])
        for a, row in zip(w, rows, strict=True):
            agrees = (np.sign(row) == sign) & (row != 0)
            total += np.where(agrees, row, 0)
            divisor += np.where(agrees, a, 0)
        if merge == "mean":
            total = total / np.where(divisor == 0, 1, divisor)
        merged[name] = base[name] + scale * total
    return merged


def ties(base, taus, names, density=0.2, trim="model", **options):
    return election(base, trimmed(taus, density, trim), names, **options)


def magmax(base, rows, scale=0.5):
    flat = rows.reshape(len(rows), -1)
    chosen = np.array([max(column, key=lambda x: (abs(x), x)) for column in flat.T])
    return base + scale * chosen.reshape(base.shape)


def emr(base, rows, scale=1.0):
    sign = np.sign(rows.sum(0))
    agreeing = np.where(np.sign(rows) == sign, np.abs(rows), 0)
    return base + scale * sign * agreeing.max(0)


def random_bits(seed, expert, name, size):
    """32 bits an entry: the Philox stream whose key is a hash of seed and names, drawn by NumPy in one go."""
    key = np.frombuffer(hashlib.sha256(f"{seed}\0{expert}\0{name}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).integers(0, 2**32, size=size, dtype=np.uint32)


def dropped(taus, names, density=0.1, rescale="density", seed=0):
    found = {}
    for name, rows in taus.items():
        found[name] = np.empty_like(rows)
        for i, expert in enumerate(names):
            mask = random_bits(seed, expert, name, rows[i].size).reshape(rows[i].shape) < density * 2**32
            kept = rows[i] * mask
            if density < 1 and rescale == "density":
                kept = kept / density
            if density < 1 and rescale == "l1" and np.abs(kept).sum() > 0:
                kept = kept * (np.abs(rows[i]).sum() / np.abs(kept).sum())
            found[name][i] = kept
    return found


def pruned(taus, names, density=0.5, epsilon=0.2, rescale="probability", window="paper", seed=0):
    """DELLA row by row: ranks by a stable sort, probabilities from the formula."""
    if density == 1:
        return taus
    found = {}
    for name, stack in taus.items():
        found[name] = np.empty_like(stack)
        for i, expert in enumerate(names):
            chance = random_bits(seed, expert, name, stack[i].size) / 2**32
            rows = stack[i].reshape(stack[i].shape[0], -1) if stack[i].ndim > 1 else stack[i].reshape(1, -1)
            out = []
            for row, u in zip(rows, chance.reshape(rows.shape), strict=True):
                m = len(row)
                rank = np.empty(m)
                rank[np.argsort(np.abs(row), kind="stable")] = np.arange(1, m + 1)
                if window == "paper":
                    p = density - epsilon / 2 + epsilon * rank / m
                else:
                    p = density - epsilon + 2 * epsilon * (rank - 1) / (m - 1) if m > 1 else np.array([density])
                kept = row * (u < p)
                if rescale == "probability":
                    kept = np.where(p > 0, kept / np.where(p > 0, p, 1), 0)
                out.append(kept)
            left = np.abs(out).sum()
            if rescale == "l1" and left > 0:
                out = np.stack(out) * (np.abs(rows).sum() / left)
            found[name][i] = np.stack(out).reshape(stack[i].shape)
    return found


def crumbs(taus, density=0.14, top=0.01):
    """Of each tensor, the first int(density · size) entries after the outliers, in order of magnitude."""
    found = {}
    for name, stack in taus.items():
        size = stack[0].size
        keep = int(density * size)
        skip = min(int(top * size), size - keep)
        found[name] = np.stack([row * (largest(row, skip + keep) & ~largest(row, skip)) for row in stack])
    return found


def agreed(taus, tall=0.4, agree=2, multitask=1.0):
    found = {}
    for name, rows in taus.items():
        total = multitask * rows.sum(0)
        active = sum((np.abs(row) >= tall * np.abs(total - row)).astype(int) for row in rows)
        found[name] = rows * (active >= agree)
    return found


def task_arithmetic(base, taus, names, scale=0.3, weights=None):
    w = given(weights, names)
    return {name: base[name] + scale * np.tensordot(w, taus[name], 1) for name in base}


def after(transform, merge, own, *, named=False):
    """Make a reference of a transform, which takes the options `own`, and a merge, which takes the others."""

    def reference(base, taus, names, **options):
        mine = {key: options.pop(key) for key in own if key in options}
        changed = transform(taus, names, **mine) if named else transform(taus, **mine)
        return merge(base, changed, names, **options)

    return reference


def metagpt(base, taus, names):
    squares = sum((rows.reshape(len(names), -1) ** 2).sum(1) for rows in taus.values())
    return {name: base[name] + np.tensordot(squares / squares.sum(), taus[name], 1) for name in base}


def model_stock(base, rows, average="cosine"):
    n = len(rows)
    if n == 1:
        return base + rows[0]
    flat = rows.reshape(n, -1)
    found = []
    for i in range(n):
        for j in range(i):
            length = np.linalg.norm(flat[i]) * np.linalg.norm(flat[j])
            found.append(np.clip(flat[i] @ flat[j] / length, -1, 1) if length > 0 else 0.0)
    cosine = np.mean(found) if average == "cosine" else np.cos(np.mean(np.arccos(found)))
    below = 1 + (n - 1) * cosine
    return base + (0 if abs(below) < 1e-6 else n * cosine / below) * rows.mean(0)


def slerp(base, rows, t=0.5, of="weights", parallel=0.9995):
    """On the vectors themselves: the angle by arctan2 of sine and cosine parts, not by arccos."""
    one, other = (base + rows) if of == "weights" else rows
    length = np.linalg.norm(one) * np.linalg.norm(other)
    angle = np.pi / 2
    if length > 0:
        u, v = one / np.linalg.norm(one), other / np.linalg.norm(other)
        angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    if abs(np.cos(angle)) > parallel:
        found = (1 - t) * one + t * other
    else:
        found = (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)
    return found if of == "weights" else base + found


def spherical_mean(base, rows, of="weights"):
    """Minimize the sum of squared angles over the sphere by Buss and Fillmore's iteration, on vectors."""
    vectors = (rows + base if of == "weights" else rows).reshape(len(rows), -1)
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors[norms > 0] / norms[norms > 0, None]
    if len(units) == 0:
        return base if of == "task-vectors" else 0 * base
    chord = units.mean(0)
    if np.linalg.norm(chord) < 1e-8 or (units @ chord).min() <= 0:
        found = vectors.mean(0)
    else:
        point = chord / np.linalg.norm(chord)
        for _ in range(1000):
            angles = np.arccos(np.clip(units @ point, -1, 1))
            across = units - np.outer(units @ point, point)
            lengths = np.linalg.norm(across, axis=1)
            steps = np.divide(angles, lengths, out=np.zeros_like(angles), where=lengths > 1e-12)
            tangent = (steps[:, None] * across).mean(0)
            size = np.linalg.norm(tangent)
            if size > 0:
                point = np.cos(size) * point + np.sin(size) * tangent / size
        found = norms.mean() * point
    return found.reshape(base.shape) + (base if of == "task-vectors" else 0)


def spectral(matrix):
    """Make a reference of matrix(rows [n, m, p], **options) -> [m, p], with the mean for what is no matrix."""

    def reference(base, rows, scale=1.0, **options):
        return base + scale * (matrix(rows, **options) if base.ndim == 2 else rows.mean(0))

    return per_tensor(reference)


def svd(matrix):
    """Singular triples that are not 0, largest first."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept], s[kept], vh[kept]


def polar(matrix):
    """The partial isometry A (AᵀA)^{-1/2}, by the pseudoinverse of the root."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    kept = values > 1e-12 * values[-1]
    return matrix @ (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def tsv_m(rows):
    n, size = len(rows), min(rows.shape[1:])
    if size < n:
        return rows.mean(0)
    triples = [svd(row) for row in rows]
    left = np.concatenate([u[:, : size // n] for u, _, _ in triples], axis=1)
    values = np.concatenate([s[: size // n] for _, s, _ in triples])
    right = np.concatenate([vh[: size // n] for _, _, vh in triples])
    return polar(left) @ np.diag(values) @ polar(right)


def iso_c(rows):
    total = rows.sum(0)
    if not total.any():
        return total
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total)


def iso_cts(rows, common=0.8):
    n, size = len(rows), min(rows.shape[1:])
    own = min(round((size - int(common * size)) / n), size // n)
    shared = size - own * n
    u, s, vh = (x for x in svd(rows.sum(0)))
    u, s, vh = u[:, :shared], s[:shared], vh[:shared]
    left, values, right = [u], list(s), [vh]
    for row in rows:
        w, x, zh = svd(row - u @ u.T @ row)
        left.append(w[:, :own])
        values += list(x[:own])
        right.append(zh[:own])
    return sum(values) / size * polar(np.concatenate(left, axis=1)) @ polar(np.concatenate(right))


def knots(base, taus, names, inner="ties", density=0.2, weights=None, scale=1.0):
    w = given(weights, names)
    merged = {}
    for name, rows in taus.items():
        if base[name].ndim != 2:
            merged[name] = base[name] + scale * np.tensordot(w, rows, 1) / len(rows)
            continue
        u, _, _ = svd(np.concatenate(list(rows), axis=1))
        turned = np.stack([u.T @ row for row in rows])  # S V_iᵀ, without rounding where U is ±1
        if inner == "linear":
            found = np.tensordot(w, turned, 1)
        else:
            if density < 1:
                k = max(1, int(density * turned[0].size))
                turned = np.stack([row * largest(row, k) for row in turned])
            turned = w.reshape(-1, 1, 1) * turned
            agrees = np.sign(turned) == np.sign(turned.sum(0))
            divisor = (agrees * w.reshape(-1, 1, 1)).sum(0)
            found = (turned * agrees).sum(0) / np.where(divisor == 0, 1, divisor)
        merged[name] = base[name] + scale * u @ found
    return merged


def pcb(base, taus, names, density=0.1, scale=1.2):
    """Flat vectors, with zeros for what is the same in all models, sorted outright."""
    n = len(names)
    flat = np.concatenate([rows.reshape(n, -1) for rows in taus.values()], axis=1)
    size = flat.shape[1]
    flat = np.concatenate([flat, np.zeros((n, SIZE - size))], axis=1)

    def unit(x, original):
        low, high = x.min(), x.max()
        return (x - low) / (high - low) if high > low else (original >= low).astype(float)

    def clamp(x, low, high):
        ordered = np.sort(x)
        return np.clip(x, ordered[int(SIZE * low)], ordered[max(0, int(SIZE * (1 - high) - 1))])

    total = flat.sum(0)
    weights, clipped = np.empty_like(flat), np.empty_like(flat)
    for i, row in enumerate(flat):
        magnitude = clamp(np.abs(row), 1e-4, 1e-4)
        clipped[i] = np.sign(row) * magnitude
        score = np.exp(n * unit(magnitude, np.abs(row)) ** 2) * np.tanh(row * total)
        weights[i] = unit(clamp(score, 1 - density, 0), score)
    merged = (weights * clipped).sum(0) / np.maximum(weights.sum(0), 1e-12)
    found, start = {}, 0
    for name, value in base.items():
        found[name] = value + scale * merged[start : start + value.size].reshape(value.shape)
        start += value.size
    return found


def flattened(taus):
    n = len(next(iter(taus.values())))
    return np.concatenate([rows.reshape(n, -1) for rows in taus.values()], axis=1)


def ordered_mean(base, rows, cut):
    """cut(n) values left out at both ends of each entry, by sorting."""
    k = cut(len(rows))
    return base + np.sort(rows, axis=0)[k : len(rows) - k].mean(0)


def geometric_median(base, taus, names, weights=None, smoothing=1e-6):
    """Weiszfeld's steps on the vectors themselves, many of them; returned as the vector that they end at."""
    vectors, w = flattened(taus), given(weights, names)
    point = w @ vectors / w.sum()
    for _ in range(3000):
        pulls = w / np.maximum(np.linalg.norm(vectors - point, axis=1), smoothing)
        point = pulls @ vectors / pulls.sum()
    merged, start = {}, 0
    for name, value in base.items():
        merged[name] = value + point[start : start + value.size].reshape(value.shape)
        start += value.size
    return merged


def krum(base, taus, names, byzantine=None, keep=1):
    vectors, n = flattened(taus), len(names)
    f = (n - 3) // 2 if byzantine is None else byzantine
    scores = []
    for i, one in enumerate(vectors):
        distances = sorted(np.sum((one - other) ** 2) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    best = np.argsort(scores, kind="stable")[:keep]
    return {name: base[name] + rows[best].mean(0) for name, rows in taus.items()}


def fedexp(base, taus, names, cap=1.5, epsilon=0.0):
    vectors = flattened(taus)
    spread = (np.linalg.norm(vectors, axis=1) ** 2).sum()
    step = max(1, spread / (2 * len(names) * (np.linalg.norm(vectors.mean(0)) ** 2 + epsilon)))
    return {name: base[name] + min(step, cap or np.inf) * rows.mean(0) for name, rows in taus.items()}


def stable(base, taus, names, safety=1.0):
    """The bound is the squared spectral norm of the matrix of unit vectors."""
    vectors = flattened(taus)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    largest = np.linalg.norm((vectors / np.where(norms > 0, norms, 1))[norms[:, 0] > 0], 2) ** 2
    return {name: base[name] + safety / largest * rows.sum(0) for name, rows in taus.items()}


DARE = ("density", "rescale", "seed")
DELLA = ("density", "epsilon", "rescale", "window", "seed")
CRUMBS = ("density", "top")

REFERENCES = {
    "average": linear(average),
    "task-arithmetic": task_arithmetic,
    "negation": linear(lambda names, scale=1.0: -scale * np.ones(len(names))),
    "analogy": linear(
        lambda names, a=None, b=None, c=None, scale=1.0: (
            [-scale, scale, scale] if a is None else [scale * ((x in (b, c)) - (x == a)) for x in names]
        )
    ),
    "paint": linear(
        lambda names, alpha=None, weights=None: given(weights, names, 1 / (len(names) + 1) if alpha is None else alpha)
    ),
    "wise-ft": linear(lambda names, alpha=0.5: [alpha]),
    "expo": linear(lambda names, alpha=0.3: [1 + alpha]),
    "swa": linear(swa),
    "ema": linear(ema),
    "ties": ties,
    "magmax": per_tensor(magmax),
    "emr": per_tensor(emr),
    "dare": after(dropped, task_arithmetic, DARE, named=True),
    "dare-ties": after(dropped, election, DARE, named=True),
    "della": after(pruned, election, DELLA, named=True),
    "della-linear": after(pruned, task_arithmetic, DELLA, named=True),
    "breadcrumbs": after(crumbs, task_arithmetic, CRUMBS),
    "breadcrumbs-ties": after(crumbs, election, CRUMBS),
    "tall-mask": linear(lambda names: [1.0]),  # of one expert; more are in test_masks.py
    "consensus": after(agreed, task_arithmetic, ("tall", "agree", "multitask")),
    "pcb": pcb,
    "metagpt": metagpt,
    "model-stock": per_tensor(model_stock),
    "slerp": per_tensor(slerp),
    "spherical-mean": per_tensor(spherical_mean),
    "tsv-m": spectral(tsv_m),
    "iso-c": spectral(iso_c),
    "iso-cts": spectral(iso_cts),
    "knots": knots,
    "quadratic": linear(lambda names, weights=None, anchor=0.0: (w := given(weights, names)) / (w.sum() + anchor)),
    "trimmed-mean": per_tensor(lambda base, rows, share=0.2: ordered_mean(base, rows, lambda n: int(share * n))),
    "median": per_tensor(lambda base, rows: base + np.median(rows, axis=0)),
    "geometric-median": geometric_median,
    "krum": krum,
    "fedexp": fedexp,
    "stable": stable,
}
W = {"e0": 0.5, "e1": 2.0, "e2": -0.25}

CASES = {
    "average": [{}, {"weights": W}, {"weights": W, "normalize": False}],
    "task-arithmetic": [{}, {"scale": -1.5}, {"scale": 1, "weights": W}],
    "negation": [{}, {"scale": 0.3}],
    "analogy": [{}, {"scale": 0.7}, {"a": "e2", "b": "e0", "c": "e1"}],
    "paint": [{}, {"alpha": 0.25}, {"alpha": 0.1, "weights": {"e1": 0.6}}],
    "wise-ft": [{}, {"alpha": 0.25}],
    "expo": [{}, {"alpha": 0.25}],
    "swa": [{}, {"first": 1, "every": 2}],
    "ema": [{}, {"decay": 0.5, "start": "base"}],
    "ties": [
        {},
        {"trim": "tensor", "density": 0.5, "zero": "plus", "scale": 1.0},
        {"trim": "tensor", "density": 0.01, "merge": "sum"},
        {"density": 0.3, "merge": "sum", "zero": "majority"},
        {"density": 1.0, "weights": W},
        {"density": 1e-9, "scale": 1},
    ],
    "magmax": [{}, {"scale": -1.0}],
    "emr": [{}, {"scale": 0.3}],
    "dare": [{}, {"density": 0.5, "rescale": "l1", "seed": 3}, {"rescale": "none", "weights": W}, {"density": 1.0}],
    "dare-ties": [{}, {"density": 0.5, "rescale": "l1", "zero": "plus"}, {"density": 0.25, "merge": "sum", "seed": 9}],
    "della": [
        {},
        {"window": "symmetric", "rescale": "l1", "zero": "plus", "seed": 5},
    ],
    "della-linear": [
        {},
        {"density": 0.9, "epsilon": 0.1, "window": "symmetric"},
        {"density": 0.1, "epsilon": 0.2},
        {"rescale": "none"},
        {"density": 1.0},
    ],
    "breadcrumbs": [{}, {"density": 0.9, "top": 0.3, "scale": 1.0}, {"density": 0.5, "top": 0.0}, {"density": 1.0}],
    "breadcrumbs-ties": [{}, {"density": 0.6, "top": 0.1, "merge": "sum", "zero": "plus"}],
    "tall-mask": [{}],
    "consensus": [{}, {"tall": 1.0, "agree": 1, "multitask": 0.3}, {"agree": 3}],
    "pcb": [{}, {"density": 0.7, "scale": 1.0}, {"density": 1.0}],
    "metagpt": [{}],
    "model-stock": [{}, {"average": "angle"}],
    "slerp": [{}, {"t": 0.25, "of": "task-vectors"}, {"t": 1.0, "parallel": 0.0}],
    "spherical-mean": [{}, {"of": "task-vectors"}],
    "tsv-m": [{}, {"scale": -0.5}],
    "iso-c": [{}, {"scale": 0.3}],
    "iso-cts": [{}, {"common": 0.0}, {"common": 1.0}, {"common": 0.4, "scale": 2.0}],
    "knots": [{}, {"density": 0.6, "weights": W}, {"inner": "linear", "scale": 0.3, "weights": W}, {"density": 1.0}],
    "quadratic": [{}, {"weights": {"e0": 0.5, "e1": 2.0}, "anchor": 1.5}],
    "trimmed-mean": [{}, {"share": 0.0}, {"share": 0.49}],
    "median": [{}],
    "geometric-median": [{}, {"weights": {"e0": 0.5, "e1": 2.0}}],
    "krum": [{}, {"byzantine": 1, "keep": 3}],
    "fedexp": [{}, {"cap": None, "epsilon": 0.5}],
    "stable": [{}, {"safety": 1.9}],
}
"""Options that each method is tried with: the defaults first, then what its variants need."""

FEWEST = {"krum": 5}
"""Methods that need some experts at least, with the options that they are tried with."""


class Counts(dict):
    """How many experts a method takes; `get` says how many to try it with instead of n."""

    def get(self, method, n):
        return max(FEWEST.get(method, 1), super().get(method, n))


EXPERTS = Counts({"analogy": 3, "wise-ft": 1, "expo": 1, "slerp": 2, "tall-mask": 1})
"""Methods for a certain number of experts."""

ORDERED = {"analogy", "swa", "ema", "slerp"}
"""Methods for which the order of the experts means something."""

DECOMPOSING: dict[str, float] = {"tsv-m": 5e-6, "iso-c": 3e-6, "iso-cts": 1e-5, "knots": 5e-6, "pcb": 3e-5}
"""Methods whose formulas magnify the rounding of float32, and by how much for the samples."""

SUMMING: dict[str, float] = dict.fromkeys(
    ["metagpt", "model-stock", "slerp", "spherical-mean", "geometric-median", "fedexp", "stable"], 1e-6
)
"""Methods whose coefficients are sums over many entries, and the relative error that another order of them may make."""

INEXACT: dict[str, float] = {
    **dict.fromkeys(["slerp", "tsv-m", "iso-c", "iso-cts", "knots"], 2e-6),
    "spherical-mean": 1e-3,
}
"""Methods by which entries that are the same in all models change: by rounding, or with the norm of the tensor."""


def pytest_generate_tests(metafunc):
    """Run a test on every registered method without statistics (`method`), or with each set of options (`case`)."""
    methods = [name for name, entry in MERGES.items() if not entry.needs]
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", methods)
    if "case" in metafunc.fixturenames:
        found = [(name, options) for name in methods for options in CASES.get(name, [{}])]
        metafunc.parametrize(
            "case", found, ids=lambda case: f"{case[0]}({', '.join(f'{k}={v}' for k, v in case[1].items())})"
        )


@pytest.fixture(scope="session")
def sampled():
    """Factory of states, kept."""
    kept = {}

    def make(kind="normal", n=4, dtype="float32"):
        key = kind, n, dtype
        if key not in kept:
            kept[key] = states(*key)
        return kept[key]

    return make


@pytest.fixture(scope="session")
def oracle(sampled):
    """Factory: (pool, merged tensors by the reference) of a method with options."""

    def make(name, options, kind="normal", n=4, dtype="float32", **pool):
        base, experts = sampled(kind, n, dtype)
        plain, taus = arrays(base, experts)
        wanted = REFERENCES[name](plain, taus, list(experts), **options)
        return Pool.from_state_dicts(base, experts, **pool), wanted

    return make


@pytest.fixture(scope="session")
def tables():
    """What this file knows of the methods."""
    return SimpleNamespace(
        references=REFERENCES,
        cases=CASES,
        experts=EXPERTS,
        ordered=ORDERED,
        summing={**SUMMING, **DECOMPOSING},
        decomposing=DECOMPOSING,
        inexact=INEXACT,
        same=same,
        states=states,
        arrays=arrays,
    )
