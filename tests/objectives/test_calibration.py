from __future__ import annotations

import numpy as np
import pytest
import torch
from mergesolve.objectives import CLIP, DataError, Task, Weights, accuracy, calibrate
from mergesolve.objectives.calibration import calibration_of


def test_numbers_are_numpys() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(400, 5))
    labels = rng.integers(0, 5, 400)
    found = calibration_of(torch.from_numpy(logits), torch.from_numpy(labels), bins=10)
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    confidence, right = p.max(1), (p.argmax(1) == labels).astype(float)
    ece = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.accuracy == pytest.approx(right.mean(), abs=1e-12)
    assert found.confidence == pytest.approx(confidence.mean(), rel=1e-12)
    assert found.ece == pytest.approx(ece, rel=1e-9)
    norms = np.linalg.norm(logits - logits.mean(1, keepdims=True), axis=1)
    assert found.logit_norm == pytest.approx(norms.mean(), rel=1e-12)


def test_logits_whose_confidence_is_their_accuracy_have_no_error_and_scaled_up_they_have() -> None:
    """Two classes with p = 0.8: in each of ten equal rows, eight are right."""
    logits = torch.tensor([[np.log(4.0), 0.0]]).repeat(10, 1)
    labels = torch.tensor([0] * 8 + [1] * 2)
    exact = calibration_of(logits, labels)
    assert (exact.accuracy, exact.confidence) == (pytest.approx(0.8), pytest.approx(0.8))
    assert exact.ece == pytest.approx(0, abs=1e-7)
    sure = calibration_of(5 * logits, labels)
    assert sure.accuracy == exact.accuracy
    assert sure.confidence == pytest.approx(1024 / 1025)
    assert sure.ece == pytest.approx(1024 / 1025 - 0.8, rel=1e-6)
    assert sure.logit_norm == pytest.approx(5 * exact.logit_norm)


def test_a_model_is_calibrated_task_by_task(clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]) -> None:
    seen: list[tuple[str, int, int]] = []
    found = calibrate(clip, clip_weights, clip_tasks, microbatch=5, progress=lambda *call: seen.append(call))
    assert seen == [("shapes", 1, 2), ("digits", 2, 2)]
    for task in clip_tasks:
        assert task.labels is not None
        assert found[task.name].accuracy == accuracy(clip, clip_weights, task)
        whole = calibration_of(clip.logits(clip_weights, task.inputs[:], task), task.labels)
        assert found[task.name].confidence == pytest.approx(whole.confidence, rel=1e-5)
        assert found[task.name].ece == pytest.approx(whole.ece, rel=1e-4)


def test_a_task_without_labels_is_refused(clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]) -> None:
    with pytest.raises(DataError, match="calibrate: task 'shapes' has no labels to compare predictions with"):
        calibrate(clip, clip_weights, clip_tasks[0].without_labels())
    with pytest.raises(DataError, match=r"'bins' parameter of calibrate must be an int in the range \[1, inf\)"):
        calibrate(clip, clip_weights, clip_tasks, bins=0)
