"""Mask: multiply every task vector by one array for all experts, read from a file.

    τ̂_i = m ⊙ τ_i

A learned shared subspace (`concrete_merge` writes one), a mask of a pruned model, or any other multipliers, also beyond
[0, 1]. The file is read in pieces, as the experts are.
Source: Tang et al. (2023), Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..checkpoint import Buffer, Read, open_checkpoint
from ..errors import PoolError, listing
from ..fingerprint import model_fingerprint
from ..sources import TaskVectors
from ..workers import Workers
from .transform import Apply, Transform


@dataclass(frozen=True)
class Mask(Transform):
    """Multiply the task vectors by the tensors of a checkpoint at `path`, which has each merged tensor in its shape."""

    path: str

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise PoolError(
                f"The 'path' parameter of Mask must be the path of a checkpoint. Got {self.path!r} instead."
            )

    @cached_property
    def label(self) -> str:  # type: ignore[override]
        """By the content of the file, so that a mask is the same one in another folder."""
        return f"mask({model_fingerprint(self.path)[:16]})"

    def prepare(self, source: TaskVectors, workers: Workers, names: Sequence[str]) -> Apply:
        """Check that the file fits."""
        masks = open_checkpoint(self.path)
        for name, shape in source.shapes.items():
            if name not in masks.tensors:
                raise PoolError(
                    f"pool: the mask {self.path!r} lacks {name!r}; it has {listing(masks.tensors)}. It needs every "
                    f"merged tensor; restrict the pool to those that it has (include), or learn it on this pool."
                )
            if masks.tensors[name].shape != tuple(shape):
                raise PoolError(
                    f"pool: {name!r} has shape {list(masks.tensors[name].shape)} in the mask {self.path!r} and "
                    f"{list(shape)} in the pool; the mask is of another architecture."
                )
        return Multiply({name: masks.reader(name) for name in source.shapes})


class Multiply:
    """Multiplies by the tensors of a checkpoint."""

    def __init__(self, readers: Mapping[str, Read]) -> None:
        self._readers = readers

    def __call__(
        self, name: str, start: int, base: torch.Tensor | None, deltas: torch.Tensor, experts: Sequence[int]
    ) -> torch.Tensor:
        """Multiply this piece of every expert by the same piece of the mask."""
        size = deltas.shape[1]
        buffer = Buffer(8 * size)  # one a piece: pieces are shared out among threads
        return deltas * self._readers[name](start, start + size, buffer).to(torch.float32)
