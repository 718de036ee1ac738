"""Statistics of a model on a task, for merges that weigh the experts by them: Fisher diagonals and Grams.

    fisher_diagonal   F = E_x E_{y ~ p(y|x)} [(∇_θ log p(y|x))²], element by element
    grams             G = mean over the rows x (samples × tokens) of x xᵀ, for the inputs of each linear map

Of labels, only the empirical Fisher makes use. Squares are taken sample by sample: the square of a batch's mean
gradient is not the Fisher. Sources: Matena and Raffel (2022), Merging Models with Fisher-Weighted Averaging; Jin et al.
(2023), Dataless Knowledge Fusion by Merging Weights of Language Models; and for the estimators, Kunstner et al. (2019),
Limitations of the Empirical Fisher Approximation for Natural Gradient Descent.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import DataError, nearest, some
from .models import Model, Weights
from .objective import checked_count, frozen_randomness, readable_out_of_memory
from .task import Indices, Task

ESTIMATORS = ("exact", "sampled", "empirical")
"""Expectation over the labels: summed over all classes, one draw from the predictions, or the task's own labels."""

ROWS = 4096  # of one product in single precision; their sum is in double precision
PATCHES = 1 << 24  # elements of unfolded patches at a time
SMALL = 1 << 24  # gradient elements in a pass, below which threads wait for each other more than they compute

Progress = Callable[[str, int, int], Any]
"""progress(task name, samples done, samples in all)"""


@dataclass(frozen=True)
class Statistic:
    """One kind of statistic of one model on one task.

    tensors: by name of the weights, float32, on the CPU: a Fisher diagonal in the weight's shape, or a Gram [d, d].
    axes: for Grams, which axis of the weight meets the input: 1 for W.reshape(out, d) @ x, 0 for x @ W.reshape(d, out).
    rows: how many rows (samples, or samples × tokens) each tensor is the mean of.
    left_out: weights of linear maps that a single Gram does not describe, and why.
    """

    kind: str
    tensors: Weights
    task: str
    task_fingerprint: str
    samples: int
    seed: int
    estimator: str | None = None
    axes: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """What it was computed from, for the header of a file."""
        found = {
            "statistics": self.kind,
            "task": self.task,
            "task_fingerprint": self.task_fingerprint,
            "samples": str(self.samples),
            "seed": str(self.seed),
            "rows": json.dumps(dict(self.rows)),
            "mergesolve": version("mergesolve"),
        }
        if self.estimator is not None:
            found["estimator"] = self.estimator
        if self.kind == "gram":
            found["axes"] = json.dumps(dict(self.axes))
        return found


# -- Fisher ------------------------------------------------------------------------------------------------------------


def fisher_diagonal(
    model: Model,
    weights: Weights,
    task: Task,
    *,
    estimator: str = "exact",
    microbatch: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistic:
    """The diagonal of the Fisher matrix at these weights: the mean over the samples of squared gradients of log p(y|x).

    estimator: 'exact' sums over all classes, weighted by the predictions (one backward pass a class); 'sampled' draws
        one class a sample from them; 'empirical' takes the labels, and is no estimate of the Fisher unless the model
        predicts them well.
    microbatch: samples in one pass. With 1 (the default on a CPU, where more is not faster) a plain loop; with B more,
        `torch.func.vmap`, which not every module goes through. The result does not depend on it, to rounding.
    samples: at most so many, balanced over the classes, drawn from `seed`; all of them if not given.

    Memory: beside the weights, 8 bytes a parameter for the sums, one gradient at most, the activations of B samples,
    and, for B above 1, B gradients of the largest tensor.
    Raises DataError for labels that are missing, gradients that are not finite, and what the model cannot take.
    """
    owner = "fisher_diagonal"
    if estimator not in ESTIMATORS:
        raise DataError(f"{owner}: unknown estimator {estimator!r}.{nearest(str(estimator), ESTIMATORS)}")
    if estimator == "empirical" and task.labels is None:
        raise DataError(
            f"{owner}: the empirical Fisher needs labels, and task {task.name!r} has none; take estimator='sampled' or "
            "'exact'."
        )
    default = 1 if model.device.type == "cpu" else 16
    size = default if microbatch is None else checked_count(microbatch, "microbatch", owner)
    seed = checked_count(seed, "seed", owner, least=0)
    task = _chosen(task, samples, seed, owner)
    tensors = _ready(model, weights, task)
    sums = {
        name: torch.zeros(tensor.shape, dtype=torch.float64, device=model.device)
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and model.differentiable(name)
    }
    if not sums:
        raise DataError(f"{owner}: the weights hold no parameter of the model, so there is nothing to differentiate.")
    draws = np.random.default_rng([seed, 0xF15EE]).random(len(task))
    small = model.device.type == "cpu" and size * sum(tensor.numel() for tensor in sums.values()) < SMALL
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        frozen_randomness(seed, None, model.device),
        _one_thread() if small else nullcontext(),
    ):
        for chunk in _chunks(task, size, progress):
            with readable_out_of_memory(len(chunk), task.name, model.device), _through_vmap(size):
                _add_squares(model, tensors, task, chunk, estimator, draws[chunk], sums)
    found: Weights = {}
    for name in list(sums):
        found[name] = sums.pop(name).div_(len(task)).to("cpu", torch.float32)
        if not bool(found[name].isfinite().all()):
            raise DataError(
                f"{owner}: the gradient of {name!r} on task {task.name!r} is not finite; the weights or the inputs "
                "hold NaN or infinity, or the loss overflows."
            )
    return Statistic(
        "fisher",
        found,
        task.name,
        task.fingerprint,
        len(task),
        seed,
        estimator,
        rows=dict.fromkeys(found, len(task)),
    )


def _add_squares(
    model: Model,
    tensors: Weights,
    task: Task,
    chunk: Indices,
    estimator: str,
    draws: Any,
    sums: Weights,
) -> None:
    """Add the squared gradients of each of these samples to the sums.

    Each sample has the weights to itself: alone, or in a view without copies [B, *shape]. Their gradient is squared and
    let go as soon as backward has it, so that there is never more than one tensor's.
    """
    inputs, leaves = task.batch(chunk), dict(tensors)
    together = len(chunk) > 1
    for name in sums:
        leaf = tensors[name].detach()
        leaf = leaf.expand(len(chunk), *leaf.shape) if together else leaf
        leaves[name] = leaf.requires_grad_()
        leaf.register_post_accumulate_grad_hook(_squares_into(sums[name], together))  # type: ignore[no-untyped-call]

    def one(own: Weights, sample: Tensor) -> Tensor:
        return model.logits(own, sample[None], task)[0]

    if together:
        batched = {name: 0 if name in sums else None for name in leaves}
        # Fused attention has no rule for batches of weights.
        with sdpa_kernel(SDPBackend.MATH):
            logits = vmap(one, in_dims=(batched, 0), randomness="different")(leaves, inputs.to(model.device))
    else:
        logits = model.logits(leaves, inputs, task)
    if not bool(logits.detach().isfinite().all()):
        raise DataError(
            f"fisher_diagonal: the logits on task {task.name!r} are not finite; the weights or the inputs hold NaN or "
            "infinity."
        )
    if not logits.requires_grad:  # no parameter has an effect
        return
    log_p = logits.double().log_softmax(dim=-1)
    p = log_p.detach().exp()
    if estimator == "exact":
        # Weights enter the squares through their roots.
        terms = [(p[:, c].sqrt() * log_p[:, c]).sum() for c in range(p.shape[1]) if bool(p[:, c].any())]
    elif estimator == "sampled":
        reached = p.cumsum(dim=-1).cpu() < torch.from_numpy(draws)[:, None]
        terms = [_picked(log_p, reached.sum(dim=-1).clamp(max=p.shape[1] - 1))]
    else:
        assert task.labels is not None
        terms = [_picked(log_p, task.labels[chunk])]
    for k, term in enumerate(terms):
        term.backward(retain_graph=k + 1 < len(terms))  # type: ignore[no-untyped-call]


def _picked(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.gather(1, labels.to(log_p.device)[:, None]).sum()


def _squares_into(total: Tensor, together: bool) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        # Not in place: the gradient may share its storage with one that backward still needs.
        squares = gradient.square()
        total.add_(squares.sum(dim=0) if together else squares)

    return hook


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _through_vmap(size: int) -> Iterator[None]:
    """Say what to do about a module that vmap cannot take."""
    try:
        yield
    except Exception as error:
        if size == 1 or not any(word in str(error) for word in ("vmap", "functorch", "Batching rule")):
            raise
        first = " ".join(str(error).split(". ")[0].split())
        raise DataError(
            f"fisher_diagonal: the model does not go through torch.func.vmap ({first}); take microbatch=1."
        ) from error


# -- Grams -------------------------------------------------------------------------------------------------------------


def grams(
    model: Model,
    weights: Weights,
    task: Task,
    *,
    microbatch: int = 64,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistic:
    """For every weight of a linear map, the mean of x xᵀ [d, d] over the rows x that it is applied to.

    Linear maps are found where they are computed, as products of a matrix with a weight, not by the class of a module:
    `nn.Linear`, both projections of `nn.MultiheadAttention` (whatever path it takes), a weight that is multiplied
    directly (CLIP's `proj`), and convolutions without groups, whose rows are patches [channels · kernel]. A weight that
    is applied several times has one Gram, over all rows. Weights that meet several inputs in parts (attention to other
    tokens than its own) have none, and are in `left_out`.
    microbatch: samples in one pass; the result does not depend on it, to rounding. samples: at most so many, balanced
        over the classes where there are labels, drawn from `seed`; all of them if not given.

    Memory: beside the weights, 8 bytes for each entry of the Grams, and the activations of one microbatch.
    Raises DataError for weights without linear maps, inputs that are not finite, and what the model cannot take.
    """
    owner = "grams"
    size = checked_count(microbatch, "microbatch", owner)
    seed = checked_count(seed, "seed", owner, least=0)
    task = _chosen(task, samples, seed, owner)
    tensors = {name: tensor.contiguous() for name, tensor in _ready(model, weights, task).items()}
    products = _Products({name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()})
    with torch.inference_mode(False), torch.no_grad(), frozen_randomness(seed, None, model.device):
        for chunk in _chunks(task, size, progress):
            with readable_out_of_memory(len(chunk), task.name, model.device):
                inputs = task.batch(chunk)
                with products:
                    model.logits(tensors, inputs, task)
                products.copies.clear()
    found: Weights = {}
    for name in [name for name in weights if name in products.sums]:
        total = products.sums.pop(name).div_(max(products.rows[name], 1))
        found[name] = ((total + total.T) / 2).to("cpu", torch.float32)
        if not bool(found[name].isfinite().all()):
            raise DataError(
                f"{owner}: the inputs of {name!r} on task {task.name!r} are not finite; the weights or the data hold "
                "NaN or infinity."
            )
    if not found:
        raise DataError(
            f"{owner}: none of {some(weights)} is the weight of a linear map (nn.Linear, attention, convolution), so "
            "there are no Grams."
        )
    return Statistic(
        "gram",
        found,
        task.name,
        task.fingerprint,
        len(task),
        seed,
        axes={name: products.axes[name] for name in found},
        rows={name: products.rows[name] for name in found},
        left_out=products.left_out,
    )


class _Products(TorchDispatchMode):
    """Watches the products that are computed, and sums x xᵀ for those of a row x with one of the weights.

    A weight is known by where it lies in memory, so views of it (its transpose, a flattened kernel) are found, too.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sums: Weights = {}
        self.rows: dict[str, int] = {}
        self.axes: dict[str, int] = {}
        self.left_out: dict[str, str] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._weights = weights
        self._order = sorted(weights, key=lambda name: weights[name].data_ptr())
        self._starts = [weights[name].data_ptr() for name in self._order]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute what was asked for, and look at it."""
        aten, kind = torch.ops.aten, func.overloadpacket
        if kind is aten.mm:
            self._product(args[0], args[1])
        elif kind is aten.addmm:
            self._product(args[1], args[2])
        elif kind is aten.bmm:
            self._products(args[0], args[1])
        elif kind is aten.baddbmm:
            self._products(args[1], args[2])
        elif kind is aten.mv:
            self._product(args[1][None], args[0].t())
        elif kind is aten.addmv:
            self._product(args[2][None], args[1].t())
        elif kind is aten.dot:
            self._product(args[0][None], args[1][:, None])
        elif kind is aten.convolution:
            self._convolution(*args)
        out = func(*args, **(kwargs or {}))
        if kind is aten._to_copy and self._names(args[0]):
            self.copies.append((args[0], out))  # autocast computes with copies of the weights
        return out

    def _names(self, view: Tensor) -> list[str]:
        """The weights that a tensor lies in; several if they are one tensor under several names."""
        for origin, copy in self.copies:
            if copy.data_ptr() <= view.data_ptr() < copy.data_ptr() + copy.nbytes:
                return self._names(origin)
        end = bisect.bisect_right(self._starts, view.data_ptr())
        if end == 0:
            return []
        first = bisect.bisect_left(self._starts, self._starts[end - 1])
        return [
            name
            for name in self._order[first:end]
            if view.data_ptr() < self._weights[name].data_ptr() + self._weights[name].nbytes
        ]

    def _product(self, left: Tensor, right: Tensor) -> None:
        """Rows of `left` [r, d] with a weight on the right [d, m]; or columns on the right with one on the left."""
        for x, matrix in ((left, right), (right.t(), left.t())):
            for name in self._names(matrix):
                axis = self._axis(name, matrix)
                if axis is None:
                    self._leave_out(name, "it is used in parts")
                else:
                    self._add(name, axis, [x])

    def _products(self, left: Tensor, right: Tensor) -> None:
        """The same for batches of matrices, of which one may be a weight that is repeated."""
        for x, matrices in ((left, right), (right.transpose(1, 2), left.transpose(1, 2))):
            for name in self._names(matrices):
                repeated = matrices.shape[0] == 1 or matrices.stride(0) == 0
                axis = self._axis(name, matrices[0]) if repeated else None
                if axis is None:
                    self._leave_out(name, "it is used in parts")
                else:
                    self._add(name, axis, [x.reshape(-1, x.shape[2])])

    def _convolution(
        self,
        inputs: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> None:
        for name in self._names(kernel):
            if transposed or groups != 1:
                self._leave_out(name, "it is the kernel of a transposed or grouped convolution")
            elif inputs.ndim > 4:
                self._leave_out(name, "it is the kernel of a convolution in three dimensions")
            elif kernel.numel() != self._weights[name].numel() or not kernel.is_contiguous():
                self._leave_out(name, "it is used in parts")
            else:
                self._add(name, 1, _patches(inputs, kernel, stride, padding, dilation))

    def _axis(self, name: str, matrix: Tensor) -> int | None:
        """On which axis of the weight the input is, if the matrix [d, m] is all of it; else None."""
        shape = self._weights[name].shape
        first = shape[0] if shape else 1
        rest = self._weights[name].numel() // first
        rows, columns = matrix.shape
        down, across = matrix.stride()
        # The stride of an axis with one element means nothing.
        if (rows, columns) == (rest, first) and (rows == 1 or down == 1) and (columns == 1 or across == rest):
            return 1
        if (rows, columns) == (first, rest) and (rows == 1 or down == rest) and (columns == 1 or across == 1):
            return 0
        return None

    def _add(self, name: str, axis: int, pieces: Any) -> None:
        if name in self.left_out:
            return
        if self.axes.setdefault(name, axis) != axis:
            self._leave_out(name, "its input is now on one axis and now on the other")
            return
        for rows in pieces:
            x = rows if rows.dtype == torch.float64 else rows.float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
                self.rows[name] = 0
            for start in range(0, len(x), ROWS):
                part = x[start : start + ROWS]
                self.sums[name] += part.T @ part
            self.rows[name] += len(x)

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        for table in (self.sums, self.rows, self.axes):
            table.pop(name, None)  # type: ignore[attr-defined]


def _patches(
    inputs: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Iterator[Tensor]:
    """What the kernel is applied to, as rows [patches, channels · kernel], a few samples at a time."""
    size: Sequence[int] = kernel.shape[2:]
    if inputs.ndim == 3:  # one dimension is two with a height of 1
        inputs, size = inputs[:, :, None], (1, *size)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    each = kernel[0].numel() * inputs.shape[2] * inputs.shape[3] // max(stride[0] * stride[1], 1)
    step = max(1, PATCHES // max(each, 1))
    for start in range(0, len(inputs), step):
        columns = F.unfold(
            inputs[start : start + step], tuple(size), tuple(dilation), tuple(padding), tuple(stride)
        )  # [b, channels · kernel, patches]
        yield columns.transpose(1, 2).reshape(-1, columns.shape[1])


# -- both --------------------------------------------------------------------------------------------------------------


def _chosen(task: Task, samples: int | None, seed: int, owner: str) -> Task:
    if samples is None or checked_count(samples, "samples", owner) >= len(task):
        return task
    return task.subset(samples, seed)


def _ready(model: Model, weights: Weights, task: Task) -> Weights:
    """The weights on the model's device, checked; and whatever the model makes on first use, made."""
    model.check(weights)
    model.check_task(task)
    tensors = {name: tensor.detach().to(model.device) for name, tensor in weights.items()}
    with torch.no_grad(), torch.inference_mode(False):
        model.logits(tensors, task.batch(np.arange(1)), task)
    return tensors


def _chunks(task: Task, size: int, progress: Progress | None) -> Iterator[Indices]:
    every = np.arange(len(task))
    for start in range(0, len(task), size):
        chunk = every[start : start + size]
        yield chunk
        if progress is not None:
            progress(task.name, start + len(chunk), len(task))
