"""What "good" means, as loss and gradient over weights: tasks, models, objectives and evaluation.

Names are imported when they are first used, so that `mergesolve.objectives.registry` costs no import of torch.
The function `features` is in the module of that name, which takes its place here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accuracy_loss import AccuracyLoss
    from .alignment import FeatureAlignment
    from .calibration import Calibration, calibrate
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
    from .relative import RelativeLoss
    from .retention import Retention
    from .sharpness import SharpnessAware
    from .statistics import Statistic, fisher_diagonal, grams
    from .surgery import Surgery, fit_surgery
    from .task import Task, joint
    from .weighted_sum import WeightedSum

_MODULES = {
    "AccuracyLoss": "accuracy_loss",
    "AugmentedLagrangian": "lagrangian",
    "CLIP": "clip",
    "CORRUPTIONS": "corruptions",
    "Calibration": "calibration",
    "CrossEntropy": "cross_entropy",
    "DataError": "errors",
    "Distillation": "distillation",
    "Entropy": "entropy",
    "Evaluation": "objective",
    "FeatureAlignment": "alignment",
    "LossObjective": "loss_objective",
    "Model": "models",
    "ModuleModel": "models",
    "Objective": "objective",
    "Proximity": "proximity",
    "RelativeLoss": "relative",
    "Retention": "retention",
    "Scores": "evaluation",
    "SharpnessAware": "sharpness",
    "Statistic": "statistics",
    "SumObjective": "objective",
    "Surgery": "surgery",
    "Task": "task",
    "TaskObjective": "objective",
    "WeightedSum": "weighted_sum",
    "Weights": "models",
    "accuracy": "evaluation",
    "calibrate": "calibration",
    "corrupt": "corruptions",
    "evaluate": "evaluation",
    "features": "outputs",
    "fisher_diagonal": "statistics",
    "fit_surgery": "surgery",
    "grams": "statistics",
    "joint": "task",
    "predictions": "outputs",
}

__all__ = [
    "CLIP",
    "CORRUPTIONS",
    "AccuracyLoss",
    "AugmentedLagrangian",
    "Calibration",
    "CrossEntropy",
    "DataError",
    "Distillation",
    "Entropy",
    "Evaluation",
    "FeatureAlignment",
    "LossObjective",
    "Model",
    "ModuleModel",
    "Objective",
    "Proximity",
    "RelativeLoss",
    "Retention",
    "Scores",
    "SharpnessAware",
    "Statistic",
    "SumObjective",
    "Surgery",
    "Task",
    "TaskObjective",
    "WeightedSum",
    "Weights",
    "accuracy",
    "calibrate",
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
