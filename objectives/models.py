"""What an objective needs of a model: logits as a function of weights. And the model that is any torch module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import DataError, some
from .task import Task

Weights = dict[str, Tensor]


class Model(Protocol):
    """Logits as a function of weights. `parameter_names` are those that a gradient exists for."""

    device: torch.device
    parameter_names: Collection[str]

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: Task) -> Tensor:
        """Logits [B, C] of inputs [B, ...], differentiable in the weights."""
        ...

    def differentiable(self, name: str) -> bool:
        """Whether a tensor of the weights is a parameter.

        Others (running statistics of a batch norm) follow the merge and are constants to the gradient.
        """
        ...

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise DataError unless these weights fit the model."""
        ...

    def check_task(self, task: Task) -> None:
        """Raise DataError unless the model can classify this task."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this model is, for the record of a run."""
        ...


def check_weights(
    weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], needed: Collection[str], what: str, remedy: str
) -> None:
    """DataError unless the weights are named and shaped as the model's tensors, and hold the needed ones.

    what: the model, as the messages call it; remedy: what to do about names that are missing.
    """
    extra = [name for name in weights if name not in shapes]
    if extra:
        raise DataError(
            f"{what} has no {some(extra)}, which the weights have; it has {some(shapes)}. "
            f"Leave them out of the merge (exclude), or rename them (rename) to the model's names."
        )
    for name, tensor in weights.items():
        if tensor.shape != shapes[name]:
            raise DataError(
                f"{what}: {name!r} has shape {list(tensor.shape)} in the weights and {list(shapes[name])} in the "
                f"model; the checkpoints are of another architecture."
            )
    missing = [name for name in needed if name not in weights]
    if missing:
        raise DataError(f"{what} needs {some(missing)}, which the weights lack. {remedy}")


class ModuleModel:
    """Any `nn.Module`: logits = module(inputs) with the module's tensors replaced by the weights.

    Tensors that the weights lack keep the module's own values. The module is put into eval mode, so that dropout and
    batch statistics do not make two evaluations of the same weights differ.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        self.parameter_names = frozenset(name for name, _ in module.named_parameters())
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if not self.parameter_names:
            raise DataError(f"{type(module).__name__} has no parameters, so there is nothing to merge.")
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.device = next(module.parameters()).device

    def differentiable(self, name: str) -> bool:
        """Whether the name is a parameter of the module, and not a buffer."""
        return name in self.parameter_names

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise DataError for names that the module lacks and for wrong shapes."""
        check_weights(weights, self._shapes, (), type(self.module).__name__, "")

    def check_task(self, task: Task) -> None:
        """Any task will do: the number of logits is known only after the first call."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: Task) -> Tensor:
        """The module's output [B, C]; DataError unless it has a column a class of the task."""
        outputs: Tensor = functional_call(self.module, dict(weights), (inputs.to(self.device),))
        check_logits(outputs, len(inputs), task, type(self.module).__name__)
        return outputs

    def base_weights(self) -> Weights:
        """The module's own floating-point tensors, copied to float32."""
        return {
            name: tensor.detach().to(torch.float32, copy=True)
            for name, tensor in self.module.state_dict().items()
            if tensor.is_floating_point()
        }

    def describe(self) -> dict[str, Any]:
        """Class of the module and its number of parameters."""
        return {"model": type(self.module).__name__, "parameters": sum(p.numel() for p in self.module.parameters())}


def check_logits(outputs: Any, samples: int, task: Task, what: str) -> None:
    """DataError unless outputs is a tensor [samples, classes of the task]."""
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != [samples, len(task.classes)]:
        raise DataError(
            f"{what} gives {shape} for {samples} inputs of task {task.name!r}, expected logits "
            f"[{samples}, {len(task.classes)}]: one column for each of the task's classes."
        )
