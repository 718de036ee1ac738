"""What "good" means, as loss and gradient over weights: tasks, models, objectives and evaluation.

Names are imported when they are first used, so that `mergesolve.objectives.registry` costs no import of torch.
The function `features` is in the module of that name, which takes its place here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accuracy_loss import AccuracyLoss
    from .clip import CLIP
    from .corruptions import CORRUPTIONS, corrupt
    from .cross_entropy import CrossEntropy
    from .distillation import Distillation
    from .entropy import Entropy
    from .errors import DataError
    from .evaluation import Scores, accuracy, evaluate
    from .lagrangian import AugmentedLagrangian
    from .loss_objective import LossObjective
    from .models import Model, ModuleModel, Weights
    from .objective import Evaluation, Objective, SumObjective, TaskObjective
    from .outputs import features, predictions
    from .proximity import Proximity
    from .statistics import Statistic, fisher_diagonal, grams
    from .surgery import Surgery, fit_surgery
    from .task import Task, joint
    from .weighted_sum import WeightedSum

_MODULES = {
    "AccuracyLoss": "accuracy_loss",
    "AugmentedLagrangian": "lagrangian",
    "CLIP": "clip",
    "CORRUPTIONS": "corruptions",
    "CrossEntropy": "cross_entropy",
    "DataError": "errors",
    "Distillation": "distillation",
    "Entropy": "entropy",
    "Evaluation": "objective",
    "LossObjective": "loss_objective",
    "Model": "models",
    "ModuleModel": "models",
    "Objective": "objective",
    "Proximity": "proximity",
    "Scores": "evaluation",
    "Statistic": "statistics",
    "SumObjective": "objective",
    "Surgery": "surgery",
    "Task": "task",
    "TaskObjective": "objective",
    "WeightedSum": "weighted_sum",
    "Weights": "models",
    "accuracy": "evaluation",
    "corrupt": "corruptions",
    "evaluate": "evaluation",
    "fisher_diagonal": "statistics",
    "fit_surgery": "surgery",
    "grams": "statistics",
    "joint": "task",
    "predictions": "outputs",
    "features": "outputs",
}

__all__ = [
    "CLIP",
    "CORRUPTIONS",
    "AccuracyLoss",
    "AugmentedLagrangian",
    "CrossEntropy",
    "DataError",
    "Distillation",
    "Entropy",
    "Evaluation",
    "LossObjective",
    "Model",
    "ModuleModel",
    "Objective",
    "Proximity",
    "Scores",
    "Statistic",
    "SumObjective",
    "Surgery",
    "Task",
    "TaskObjective",
    "WeightedSum",
    "Weights",
    "accuracy",
    "corrupt",
    "evaluate",
    "features",
    "fisher_diagonal",
    "fit_surgery",
    "grams",
    "joint",
    "predictions",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
