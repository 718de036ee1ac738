"""Cross-entropy on few labels: ℓ(x, y) = −log softmax(z(x) / T)_y, with label smoothing ε as in Szegedy et al. (2016).

T > 1 lets confident samples count longer, and keeps a merge from being driven to be confident; ε does so, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DataError
from .models import Model
from .objective import TaskObjective, checked_positive, is_number
from .task import Indices, Task


class CrossEntropy(TaskObjective):
    """Mean cross-entropy of the tasks' labels; needs labels.

    label_smoothing: ε in [0, 1): the target is (1 − ε) on the label and ε/C on every class. temperature: T > 0.
    The other parameters are those of `TaskObjective`.
    """

    needs_labels: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        tasks: Task | Sequence[Task],
        batch_size: int | None = None,
        microbatch: int = 256,
        seed: int = 0,
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        *,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        if not (is_number(label_smoothing) and 0 <= label_smoothing < 1):
            raise DataError(
                f"The 'label_smoothing' parameter of CrossEntropy must be a float in the range [0, 1). "
                f"Got {label_smoothing!r} instead."
            )
        self.label_smoothing = float(label_smoothing)
        self.temperature = checked_positive(temperature, "temperature", "CrossEntropy")
        super().__init__(model, tasks, batch_size, microbatch, seed, task_weights=task_weights)

    def sample_losses(self, outputs: Tensor, task: Task, indices: Indices) -> Tensor:
        """−Σ_c target_c log p_c [B]."""
        assert task.labels is not None
        labels = task.labels[torch.from_numpy(indices)].to(outputs.device)
        logits = outputs / self.temperature
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)

    def describe(self) -> dict[str, Any]:
        """The record of `TaskObjective`, label smoothing and temperature."""
        options = {"label_smoothing": self.label_smoothing, "temperature": self.temperature}
        return {**super().describe(), **options}
