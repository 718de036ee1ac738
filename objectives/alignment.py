"""Feature alignment: the distance of the merged model's features from each task's expert's, on unlabelled inputs.

    l1: Σ_d |z_d − z̄_d|      l2: Σ_d (z_d − z̄_d)²      cosine: 1 − ⟨z, z̄⟩ / ‖z‖‖z̄‖

z are the normalized image embeddings of a CLIP (where l2 is twice cosine), of another model its outputs as they are.
It asks for more than distillation: the features, and not only what the head makes of them; so it needs no class texts,
and its gap is what representation surgery is about.
Source: Yang et al. (2024), Representation Surgery for Multi-Task Model Merging (the bias of features).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .clip import CLIP
from .errors import DataError, nearest
from .models import Model, Weights
from .task import Indices, Task
from .teachers import TaughtObjective, Teacher

DISTANCES = ("l1", "l2", "cosine")


class FeatureAlignment(TaughtObjective):
    """Mean distance of the merged model's features from the teachers'; labels and classes are not looked at.

    distance: "l1", "l2" (squared) or "cosine". The other parameters are those of `TaughtObjective`.
    """

    def __init__(
        self,
        model: Model,
        tasks: Task | Sequence[Task],
        teachers: Mapping[str, Teacher],
        batch_size: int | None = None,
        microbatch: int = 256,
        seed: int = 0,
        distance: str = "l1",
        *,
        task_weights: Mapping[str, float] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if distance not in DISTANCES:
            raise DataError(f"FeatureAlignment: unknown distance {distance!r}.{nearest(str(distance), DISTANCES)}")
        self.distance = distance
        super().__init__(
            model, tasks, teachers, batch_size, microbatch, seed, task_weights=task_weights, progress=progress
        )

    def check_task(self, task: Task) -> None:
        """A CLIP's features need no head, so classes without one are no matter."""
        if not isinstance(self.model, CLIP):
            super().check_task(task)

    def outputs(self, tensors: Weights, inputs: Tensor, task: Task) -> Tensor:
        """Normalized image embeddings [B, d] of a CLIP, else the model's outputs."""
        if isinstance(self.model, CLIP):
            self.model.check_images(inputs, task)
            return self.model.features(tensors, inputs)
        return super().outputs(tensors, inputs, task)

    def sample_losses(self, outputs: Tensor, task: Task, indices: Indices) -> Tensor:
        """The distance [B]."""
        targets = self.targets(task, indices, outputs)
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(outputs, targets, dim=-1)
        difference = outputs - targets
        return (difference.abs() if self.distance == "l1" else difference.square()).sum(dim=-1)

    def describe(self) -> dict[str, Any]:
        """The record of `TaskObjective`, and the distance."""
        return {**super().describe(), "distance": self.distance}
