"""What "good" means, as loss and gradient over weights: tasks, models, objectives and evaluation.

Names are imported when they are first used, so that `mergesolve.objectives.registry` costs no import of torch.
The function `features` is in the module of that name, which takes its place here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clip import CLIP
    from .corruptions import CORRUPTIONS, corrupt
    from .cross_entropy import CrossEntropy
    from .distillation import Distillation
    from .entropy import Entropy
    from .errors import DataError
    from .evaluation import Scores, accuracy, evaluate
    from .features import agreement, mean_feature_similarity, predictions
    from .loss_objective import LossObjective
    from .models import Model, ModuleModel, Weights
    from .objective import Evaluation, Objective, SumObjective, TaskObjective
    from .statistics import Statistic, fisher_diagonal, grams
    from .task import Task, joint
    from .weighted_sum import WeightedSum

_MODULES = {
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
    "Scores": "evaluation",
    "Statistic": "statistics",
    "SumObjective": "objective",
    "Task": "task",
    "TaskObjective": "objective",
    "WeightedSum": "weighted_sum",
    "Weights": "models",
    "accuracy": "evaluation",
    "agreement": "features",
    "corrupt": "corruptions",
    "evaluate": "evaluation",
    "fisher_diagonal": "statistics",
    "grams": "statistics",
    "joint": "task",
    "mean_feature_similarity": "features",
    "predictions": "features",
}

__all__ = [
    "CLIP",
    "CORRUPTIONS",
    "CrossEntropy",
    "DataError",
    "Distillation",
    "Entropy",
    "Evaluation",
    "LossObjective",
    "Model",
    "ModuleModel",
    "Objective",
    "Scores",
    "Statistic",
    "SumObjective",
    "Task",
    "TaskObjective",
    "WeightedSum",
    "Weights",
    "accuracy",
    "agreement",
    "corrupt",
    "evaluate",
    "fisher_diagonal",
    "grams",
    "joint",
    "mean_feature_similarity",
    "predictions",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
