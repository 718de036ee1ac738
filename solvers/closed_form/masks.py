"""TALL masks: which entries of the multi-task vector each expert needs; its model retrieved by them; masks on disk.

    m_i = 1[|τ_i| ≥ tall · |τ_MT − τ_i|],   τ_MT = multitask · Σ_j τ_j,   θ_i ≈ θ0 + m_i ∘ τ_MT

A mask takes one bit an entry, so n masks and one multi-task vector stand for n experts.
Source: Wang et al. (2024), Localizing Task Information for Improved Model Merging and Compression, equations 3 and 4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ...pools import Pool, operator
from ...pools.checkpoint import TensorInfo
from ...pools.transforms.agreement import tall_masks
from ...pools.writer import write_checkpoint
from ..errors import check_number, unknown
from .merge import Merge, Part, Rule, only

if TYPE_CHECKING:
    from ...pools.statistics import Statistics


@dataclass(frozen=True)
class TallMask(Merge):
    """θ = θ0 + m_i ∘ multitask · Σ_j τ_j: the model of one expert, retrieved from the multi-task vector by its mask."""

    source: ClassVar[str] = "Wang et al. (2024), Localizing Task Information, equations 3 and 4"

    expert: str | None = None
    tall: float = 0.4
    multitask: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "tall", 0, math.inf, closed="neither")
        check_number(self, "multitask", 0, math.inf, closed="neither")

    def check(self, pool: Pool) -> None:
        """The expert is one of the pool, or its only one."""
        if self.expert is None:
            only(pool, 1, self, "give the 'expert' parameter to retrieve one of more")
        if self.expert is not None and self.expert not in pool.names:
            raise unknown("expert of TallMask:", self.expert, pool.names)

    def prepare(self, pool: Pool, statistics: Statistics | None = None) -> Rule:
        """Return the masked sum."""
        index = 0 if self.expert is None else pool.names.index(self.expert)

        def rule(part: Part) -> torch.Tensor:
            stack = part.stack()
            mask = tall_masks(stack, self.tall, self.multitask)[index]
            return torch.add(part.base, mask * stack.sum(0), alpha=self.multitask)

        return rule


def write_masks(pool: Pool, path: str | Path, *, tall: float = 0.4, multitask: float = 1.0) -> list[Path]:
    """Write the TALL masks of all experts, streaming, as safetensors: `EXPERT/TENSOR`, uint8 [ceil(numel / 8)].

    Eight entries a byte, the first in the highest bit (`numpy.unpackbits`); the metadata hold shapes and options.
    """
    source, workers = pool.stream()
    sizes = {name: prod(shape) for name, shape in pool.tensors.items()}
    owners = {f"{expert}/{name}": (i, name) for name in sizes for i, expert in enumerate(pool.names)}
    infos = {key: TensorInfo(torch.uint8, (-(-sizes[name] // 8),)) for key, (_, name) in owners.items()}
    limit = max(8, operator.gram_limit(workers.limit, pool.n) // 8 * 8)
    held: dict[str, torch.Tensor] = {}  # the packed masks of one tensor, so that experts are read once

    def read(key: str) -> Iterator[torch.Tensor]:
        expert, name = owners[key]
        if name not in held:
            held.clear()
            held[name] = torch.empty(pool.n, -(-sizes[name] // 8), dtype=torch.uint8)
            for start in range(0, sizes[name], limit):
                stop = min(start + limit, sizes[name])
                part = Part(source, workers.scratch(), name, start, stop, torch.device("cpu"))
                packed = np.packbits(tall_masks(part.stack(), tall, multitask).numpy(), axis=1)
                held[name][:, start // 8 : start // 8 + packed.shape[1]] = torch.from_numpy(packed)
        yield held[name][expert]

    metadata = {
        "mergesolve": version("mergesolve"),
        "masks": "TALL",
        "tall": repr(tall),
        "multitask": repr(multitask),
        "pool_fingerprint": pool.fingerprint,
        "experts": json.dumps(list(pool.names)),
        "shapes": json.dumps({name: list(shape) for name, shape in pool.tensors.items()}),
    }
    return write_checkpoint(Path(path), infos, read, metadata, math.inf, None, pool.files)
