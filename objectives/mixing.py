"""Mixed inputs: x = u x_i + (1 − u) x_j with u uniform on [0, 1], pairs i ≠ j drawn from a task's own inputs.

A mixture has no label, but a teacher judges any input: where labels are not looked at, a hundred images become
thousands, on which the merged model is to be the same function as the teachers (function matching).
Sources: Zhang et al. (2018), mixup: Beyond Empirical Risk Minimization; Beyer et al. (2022), Knowledge distillation: A
good teacher is patient and consistent (function matching: the same mixtures for teacher and student).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataError

STREAM = 0x4D1C5


class Mixed:
    """Inputs and mixtures of two of them, `count` in all: the n inputs come first, then count − n mixtures.

    Mixture k is a function of the seed, n and k, whatever the batch and the count. uint8 stays uint8, rounded to the
    nearest; mixtures are made when rows are asked for. name: the task's, for messages.
    """

    def __init__(self, inputs: Any, name: str, count: int, seed: int = 0) -> None:
        if isinstance(inputs, Tensor):  # files are looked at when they are read
            _check_type(inputs, name)
        n = len(inputs)
        if n < 2:
            raise DataError(f"task {name!r}: a mixture takes two inputs, and the task has {n}; leave 'mixed' out.")
        self.inputs, self.name = inputs, name
        self.mixture = (int(count), int(seed))
        draws = np.random.default_rng([seed, STREAM]).random((count - n, 3))
        first = (draws[:, 0] * n).astype(np.int64)
        second = (first + 1 + (draws[:, 1] * (n - 1)).astype(np.int64)) % n
        own = np.arange(n)
        self.first = np.concatenate([own, first])
        self.second = np.concatenate([own, second])
        self.share = np.concatenate([np.ones(n), draws[:, 2]]).astype(np.float32)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: NDArray[np.int64] | slice) -> Tensor:
        rows = np.atleast_1d(np.arange(len(self))[index])
        needed, where = np.unique(np.concatenate([self.first[rows], self.second[rows]]), return_inverse=True)
        inputs = self.inputs[torch.from_numpy(needed) if isinstance(self.inputs, Tensor) else needed]
        _check_type(inputs, self.name)
        dtype = inputs.dtype if inputs.is_floating_point() else torch.float32
        a, b = (inputs[torch.from_numpy(part)].to(dtype) for part in np.split(where, 2))
        share = torch.from_numpy(self.share[rows]).to(dtype).view(-1, *[1] * (inputs.ndim - 1))
        mixed = b.lerp_(a, share.expand_as(b))
        return mixed if inputs.is_floating_point() else mixed.round_().to(inputs.dtype)


def _check_type(inputs: Tensor, name: str) -> None:
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise DataError(
            f"task {name!r}: only images (uint8) and floating-point inputs can be mixed, and these are {inputs.dtype}."
        )
