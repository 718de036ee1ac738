"""Choosing experts from a recipe: evidence from its pool, model and tasks; the record of a selection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .names import UsageProblem, choose
from .recipe import Choice

if TYPE_CHECKING:
    from ..solvers.selection import Evidence, Selection, Selector
    from .setup import Setup

RECORD = "selection.json"


def check_selector(choice: Choice) -> Selector:
    """The selector with its options; raises for names and options that do not exist."""
    from ..solvers.selection import SELECTORS, make_selector

    choose("selector", choice.name, SELECTORS)
    return make_selector(choice.plain())


def evidence(setup: Setup, progress: Any = None) -> Evidence:
    """What a selector may ask of the recipe's experts; model and tasks are loaded when it does."""
    from ..solvers.selection import Evidence

    pool = setup.checkpoints
    if not setup.recipe.tasks:
        return Evidence(pool, progress=progress)

    def objective() -> Any:
        from ..objectives import CrossEntropy

        return CrossEntropy(setup.model, setup.tasks)

    def accuracy(weights: Any) -> Mapping[str, float]:
        from ..objectives import evaluate

        return evaluate(setup.model, weights, setup.tasks)

    def losses(weights: Any) -> Mapping[str, float]:
        found: dict[str, float] = objective().task_losses(weights)
        return found

    def gradients(weights: Any) -> Mapping[str, Any]:
        found = objective().value_and_grad(weights, per_task=True)
        return dict(zip((task.name for task in setup.tasks), found.gradient, strict=True))

    def features(weights: Any) -> Any:
        import torch

        from ..objectives import features as measure

        return torch.cat([measure(setup.model, weights, task) for task in setup.tasks]).cpu().numpy()

    def predictions(weights: Any) -> Any:
        import torch

        from ..objectives import predictions as measure

        return torch.cat([measure(setup.model, weights, task).argmax(1) for task in setup.tasks]).cpu().numpy()

    def confidence(weights: Any) -> Any:
        import torch

        from ..objectives import predictions as measure

        rows = []
        for task in setup.tasks:
            if task.labels is None:
                raise UsageProblem(f"the bound needs labels, and the task '{task.name}' has none.")
            rows.append(measure(setup.model, weights, task).gather(1, task.labels.unsqueeze(1)).squeeze(1))
        return torch.cat(rows).cpu().numpy()

    return Evidence(
        pool,
        accuracy=accuracy,
        losses=losses,
        gradients=gradients,
        features=features,
        predictions=predictions,
        confidence=confidence,
        progress=progress,
    )


def bounds(found: Evidence, selection: Selection, draws: int = 20) -> dict[str, dict[str, float | None]]:
    """The measured terms of the bound for the chosen experts, for all, and for the mean of random subsets as large."""
    from dataclasses import asdict

    import numpy as np

    chosen = [found.names.index(name) for name in selection.names]
    rng = np.random.default_rng(0)
    random = [asdict(found.bound(rng.choice(found.n, len(chosen), replace=False).tolist())) for _ in range(draws)]
    return {
        "chosen": asdict(found.bound(chosen)),
        "all": asdict(found.bound(range(found.n))),
        f"random {len(chosen)}, mean of {draws}": {
            name: float(np.mean([terms[name] for terms in random])) for name in random[0]
        },
    }


def record(selection: Selection, setup: Setup) -> dict[str, Any]:
    """The selection as JSON has it: what was chosen, why, among which, and on which data."""
    tasks = setup.tasks if "tasks" in setup.__dict__ else ()
    return {
        "selector": selection.selector,
        "selected": [
            {"expert": name, "reason": reason} for name, reason in zip(selection.names, selection.reasons, strict=True)
        ],
        "candidates": list(selection.candidates),
        "quality": None if selection.quality is None else list(map(float, selection.quality)),
        "similarity": None if selection.similarity is None else selection.similarity.tolist(),
        "details": selection.details,
        "data": [
            {"task": task.name, "split": task.split, "samples": len(task), "fingerprint": task.fingerprint}
            for task in tasks
        ],
    }


def write_record(selection: Selection, setup: Setup, folder: Path) -> Path:
    """Write selection.json."""
    from ..solvers.files import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, record(selection, setup))
    return folder / RECORD
