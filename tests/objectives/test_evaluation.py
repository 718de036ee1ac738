from __future__ import annotations

import numpy as np
import pytest
import torch
from mergesolve.objectives import CLIP, DataError, ModuleModel, Scores, Task, Weights, accuracy, evaluate
from torch import nn


def test_accuracy_is_the_share_of_largest_logits_on_the_label_for_every_microbatch() -> None:
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(23, 4)), rng.integers(0, 4, 23)
    task = Task("t", torch.from_numpy(inputs), torch.from_numpy(labels), tuple("abcd"))
    model = ModuleModel(nn.Linear(4, 4, bias=False).double())
    matrix = rng.normal(size=(4, 4))
    expected = float(np.mean((inputs @ matrix.T).argmax(axis=1) == labels))
    assert 0 < expected < 1
    for microbatch in (1, 7, 23, 100):
        assert accuracy(model, {"weight": torch.from_numpy(matrix)}, task, microbatch) == expected


def test_evaluate_scores_every_task_and_reports_progress(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    calls: list[tuple[str, int, int]] = []
    scores = evaluate(clip, clip_weights, clip_tasks, microbatch=5, progress=lambda *call: calls.append(call))
    assert scores == {task.name: accuracy(clip, clip_weights, task) for task in clip_tasks}
    assert calls == [("shapes", 1, 2), ("digits", 2, 2)]
    prefixed = {f"visual.{name}": tensor for name, tensor in clip_weights.items()}
    assert evaluate(clip, prefixed, clip_tasks) == scores


def test_scores_have_mean_worst_and_ratios_to_a_reference() -> None:
    scores = Scores(a=0.5, b=0.8)
    assert scores.mean == pytest.approx(0.65)
    assert scores.worst == 0.5
    ratios = scores.normalized({"a": 1.0, "b": 0.5, "c": 0.1})
    assert ratios == pytest.approx({"a": 0.5, "b": 1.6})
    assert ratios.mean == pytest.approx(1.05)
    for reference in ({"a": 1.0}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(DataError, match="the reference has no accuracy above 0 for task 'b'"):
            scores.normalized(reference)


def test_what_cannot_be_scored_is_refused(clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]) -> None:
    with pytest.raises(DataError, match="evaluate: task 'shapes' has no labels to compare predictions with"):
        evaluate(clip, clip_weights, clip_tasks[0].without_labels())
    with pytest.raises(DataError, match="evaluate needs at least one task"):
        evaluate(clip, clip_weights, [])
    with pytest.raises(DataError, match="'microbatch' parameter of evaluate"):
        evaluate(clip, clip_weights, clip_tasks, microbatch=0)
    with pytest.raises(DataError, match="needs 'proj', which the weights lack"):
        evaluate(clip, {n: t for n, t in clip_weights.items() if n != "proj"}, clip_tasks)
