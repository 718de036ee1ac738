"""The objectives by name, for the command line, the documentation and the common tests. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .errors import DataError, nearest


@dataclass(frozen=True)
class Entry:
    """Where an objective lives ("module:Class", relative to this package), what it is, and what it needs.

    data: 'labelled', 'unlabelled' (inputs only), 'teachers' (inputs and an expert a task), 'none' or 'any'.
    """

    target: str
    summary: str
    source: str
    data: str

    def load(self) -> Any:
        """The class, imported now."""
        module, name = self.target.split(":")
        return getattr(import_module(f".{module}", __package__), name)


OBJECTIVES: dict[str, Entry] = {
    "cross-entropy": Entry(
        "cross_entropy:CrossEntropy",
        "Mean cross-entropy on few labels.",
        "Szegedy et al. (2016), Rethinking the Inception Architecture (label smoothing)",
        "labelled",
    ),
    "accuracy": Entry(
        "accuracy_loss:AccuracyLoss",
        "One minus top-1 accuracy, without a gradient: for solvers that read values only.",
        "empirical risk of the 0-1 loss",
        "labelled",
    ),
    "entropy": Entry(
        "entropy:Entropy",
        "Mean Shannon entropy of the predictions, without labels.",
        "Yang et al. (2024), AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        "unlabelled",
    ),
    "distillation": Entry(
        "distillation:Distillation",
        "Mean KL divergence from each task's expert to the merged model, without labels.",
        "Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network, section 2",
        "teachers",
    ),
    "feature-alignment": Entry(
        "alignment:FeatureAlignment",
        "Mean distance of the features from each task's expert's, without labels.",
        "Yang et al. (2024), Representation Surgery for Multi-Task Model Merging",
        "teachers",
    ),
    "retention": Entry(
        "retention:Retention",
        "Mean KL divergence from the base to the merged model, without labels.",
        "Li and Hoiem (2016), Learning without Forgetting",
        "unlabelled",
    ),
    "proximity": Entry(
        "proximity:Proximity",
        "Squared distance from given weights, Euclidean or by a diagonal Fisher, without data.",
        "Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, eq. 3",
        "none",
    ),
    "sharpness-aware": Entry(
        "sharpness:SharpnessAware",
        "Another objective at the worst weights nearby (option 'sharpness' of each).",
        "Foret et al. (2021), Sharpness-Aware Minimization",
        "any",
    ),
    "relative-loss": Entry(
        "relative:RelativeLoss",
        "Another objective measured against each task's expert (option 'normalize_by' of each).",
        "Agarwal and Zhang (2022), Minimax Regret Optimization for Robust Distribution Shift",
        "any",
    ),
    "augmented-lagrangian": Entry(
        "lagrangian:AugmentedLagrangian",
        "One objective, with a bound on another.",
        "Bertsekas (1982), Constrained Optimization and Lagrange Multiplier Methods",
        "any",
    ),
    "weighted-sum": Entry(
        "weighted_sum:WeightedSum", "Weighted sum of objectives, one gradient for all.", "scalarization", "any"
    ),
    "loss": Entry("loss_objective:LossObjective", "Any torch module with any loss function.", "empirical risk", "any"),
}


def objective(name: str) -> Any:
    """The objective class of this name; DataError lists the names and suggests the nearest."""
    if name not in OBJECTIVES:
        raise DataError(f"Unknown objective {name!r}.{nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name].load()
