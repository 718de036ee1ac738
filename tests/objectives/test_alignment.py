from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mergesolve.objectives import (
    CLIP,
    DataError,
    Distillation,
    Entropy,
    FeatureAlignment,
    ModuleModel,
    Retention,
    Task,
    Weights,
    features,
)


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
def test_distances_of_clip_features_are_numpys(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task], distance: str
) -> None:
    base = clip.base_weights()
    objective = FeatureAlignment(
        clip, clip_tasks, {"shapes": base, "digits": lambda: base}, microbatch=5, distance=distance
    )
    expected = {}
    for task in clip_tasks:
        z, target = (features(clip, w, task).double().numpy() for w in (clip_weights, base))
        each = {
            "l1": np.abs(z - target).sum(1),
            "l2": ((z - target) ** 2).sum(1),
            "cosine": 1 - (z * target).sum(1) / np.linalg.norm(z, axis=1) / np.linalg.norm(target, axis=1),
        }[distance]
        expected[task.name] = each.mean()
    assert objective.task_losses(clip_weights) == pytest.approx(expected, rel=1e-4)
    assert json.loads(json.dumps(objective.describe()))["distance"] == distance
    assert objective.value(base) == pytest.approx(0, abs=1e-6)


def test_features_need_no_head(clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]) -> None:
    """l2 of normalized features is twice cosine, also for classes that the model has no texts or head for."""
    task, base = Task("other", clip_tasks[0].inputs, None, ("any",)), clip.base_weights()
    with pytest.raises(DataError, match="task 'other' has no head"):
        Distillation(clip, task, {"other": base})
    l2, cosine = (FeatureAlignment(clip, task, {"other": base}, distance=d) for d in ("l2", "cosine"))
    assert l2.value(clip_weights) == pytest.approx(2 * cosine.value(clip_weights), rel=1e-4)
    with pytest.raises(DataError, match=r"FeatureAlignment: unknown distance 'cos'.*Known: 'l1', 'l2', 'cosine'"):
        FeatureAlignment(clip, task, {"other": base}, distance="cos")


def test_retention_is_distillation_from_the_base_under_its_own_name(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    base = {n: t + 0.3 for n, t in mlp64_weights.items()}
    calls: list[int] = []

    def read() -> Weights:
        calls.append(1)
        return base

    retention = Retention(mlp_model, mlp_tasks, read, batch_size=4, temperature=2.0)
    same = Distillation(mlp_model, mlp_tasks, {"one": base, "two": base}, batch_size=4, temperature=2.0)
    for objective in (retention, same):
        objective.draw(3)
    assert retention.value(mlp64_weights) == same.value(mlp64_weights) > 0
    assert retention.value(base) == pytest.approx(0, abs=1e-9)
    assert retention.describe()["objective"] == "Retention"
    assert len(calls) == 2  # once a task


@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_no_scale_of_the_logits_lowers_an_entropy_of_fixed_logit_norm(scale: float) -> None:
    """A linear model's logits scale with its weights: the plain entropy falls, the guarded one stays."""
    model = ModuleModel(torch.nn.Linear(5, 4).double())
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 5, dtype=torch.float64, generator=rng)
    weights = {
        "weight": torch.randn(4, 5, dtype=torch.float64, generator=rng),
        "bias": torch.randn(4, dtype=torch.float64, generator=rng),
    }
    scaled = {n: scale * t for n, t in weights.items()}
    task = Task("t", inputs, None, tuple("abcd"))
    guarded, plain = Entropy(model, task, logit_norm=3.0), Entropy(model, task)
    assert guarded.value(scaled) == pytest.approx(guarded.value(weights), rel=1e-9)
    assert (plain.value(scaled) < plain.value(weights)) == (scale > 1)
    logits = inputs @ weights["weight"].T + weights["bias"]
    logits = logits - logits.mean(1, keepdim=True)
    p = (3 * logits / logits.norm(dim=1, keepdim=True)).softmax(1)
    assert guarded.value(weights) == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-9)
    warm = Entropy(model, task, temperature=scale)
    assert warm.value(scaled) == pytest.approx(plain.value(weights), rel=1e-9)
    with pytest.raises(DataError, match=r"'logit_norm' parameter of Entropy must be a float in the range \(0, inf\)"):
        Entropy(model, task, logit_norm=-1.0)
