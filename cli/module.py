"""A model from the user's own Python file, whose mistakes are told as the user's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..objectives.errors import DataError
from ..objectives.models import ModuleModel
from ..objectives.task import Task
from .names import UsageProblem, unknown


class OwnModel(ModuleModel):
    """A torch module of the user's: an exception in its forward pass is an error of the module or of the data."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: Task) -> Tensor:
        """Logits [B, C]. Raises UsageProblem, with task and shape, where the forward pass raises."""
        try:
            return super().logits(weights, inputs, task)
        except DataError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UsageProblem(
                f"task '{task.name}': inputs of shape {list(inputs.shape)} ({inputs.dtype}) do not go through "
                f"{type(self.module).__name__}: {told(error)}"
            ) from error


def load_module(spec: str) -> nn.Module:
    """The module that FILE.py:FUNCTION returns. Raises UsageProblem for whatever goes wrong in that file."""
    file, _, function = spec.rpartition(":")
    if not file:
        raise UsageProblem(f"model: module '{spec}': expected FILE.py:FUNCTION.")
    loader = importlib.util.spec_from_file_location(Path(file).stem, file)
    if loader is None or loader.loader is None or not Path(file).is_file():
        raise UsageProblem(f"model: module '{spec}': there is no Python file '{file}'.")
    code = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(code)
    except (Exception, SystemExit) as error:
        raise UsageProblem(f"model: '{file}' cannot be imported: {told(error)}") from error
    if not hasattr(code, function):
        names = [name for name, value in vars(code).items() if callable(value) and not name.startswith("_")]
        raise unknown("function", function, names, where=f"model: module '{file}'")
    try:
        module = getattr(code, function)()
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise UsageProblem(f"model: '{spec}' cannot be called without arguments, or fails: {told(error)}") from error
    if not isinstance(module, nn.Module):
        raise UsageProblem(f"model: module '{spec}' returned {type(module).__name__}, expected a torch.nn.Module.")
    return module


def told(error: BaseException) -> str:
    """An exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine failed, not the code."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
