from __future__ import annotations

import json

import pytest
import torch
from mergesolve.objectives import (
    CLIP,
    DataError,
    Entropy,
    ModuleModel,
    Surgery,
    Task,
    Weights,
    evaluate,
    features,
    fit_surgery,
)


@pytest.fixture(scope="module")
def teacher(clip_weights: Weights) -> Weights:
    rng = torch.Generator().manual_seed(9)
    return {name: t + 0.05 * torch.randn(t.shape, generator=rng) for name, t in clip_weights.items()}


def test_an_adapter_that_was_not_fitted_changes_nothing(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task], teacher: Weights
) -> None:
    shapes = clip_tasks[0]
    surgery = fit_surgery(clip, clip_weights, {"shapes": teacher}, shapes, iterations=0)
    images = shapes.inputs[:]
    torch.testing.assert_close(
        surgery.logits(clip_weights, images, shapes), clip.logits(clip_weights, images, shapes), rtol=1e-5, atol=1e-5
    )


def test_features_move_to_the_teachers_and_logits_are_those_of_the_moved_features(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task], teacher: Weights
) -> None:
    seen: list[tuple[str, int, int]] = []
    surgery = fit_surgery(
        clip,
        clip_weights,
        {"shapes": teacher, "digits": lambda: teacher},
        clip_tasks,
        rank=8,
        iterations=150,
        lr=1e-2,
        progress=lambda *call: seen.append(call),
    )
    assert seen == [("shapes", 1, 2), ("digits", 2, 2)]
    for task in clip_tasks:
        adapter = surgery.adapters[task.name]
        merged, target = features(clip, clip_weights, task), features(clip, teacher, task)
        assert adapter.error_before == pytest.approx(float((merged - target).abs().mean()), rel=1e-5)
        assert adapter.error_after == pytest.approx(float((adapter(merged) - target).abs().mean()), rel=1e-5)
        assert adapter.error_after < 0.6 * adapter.error_before
        moved = merged - torch.relu(merged @ adapter.down.T) @ adapter.up.T
        logits = clip.logit_scale.exp() * moved / moved.norm(dim=1, keepdim=True) @ clip.head(task).T
        torch.testing.assert_close(surgery.logits(clip_weights, task.inputs[:], task), logits, rtol=1e-4, atol=1e-4)
    assert set(evaluate(surgery, clip_weights, clip_tasks)) == {"shapes", "digits"}
    record = json.loads(json.dumps(surgery.describe()))
    assert record["surgery"]["shapes"]["rank"] == 8
    assert surgery.data_used == {
        "labelled": 0,
        "unlabelled": 29,
        "test_inputs": True,
        "samples_seen": 58,
        "teacher_samples": 29,
    }


def test_a_task_without_an_adapter_keeps_the_merged_features_and_objectives_run_on_the_model(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task], teacher: Weights
) -> None:
    shapes, digits = clip_tasks
    surgery = fit_surgery(clip, clip_weights, {"shapes": teacher}, shapes, iterations=20, lr=1e-2)
    assert isinstance(surgery, Surgery)
    images = digits.inputs[:]
    torch.testing.assert_close(
        surgery.logits(clip_weights, images, digits), clip.logits(clip_weights, images, digits), rtol=1e-5, atol=1e-5
    )
    evaluation = Entropy(surgery, shapes.without_labels()).value_and_grad(clip_weights)
    assert any(bool(gradient.any()) for gradient in evaluation.gradient.values())  # type: ignore[union-attr]


def test_the_seed_decides(clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task], teacher: Weights) -> None:
    def fit(seed: int) -> torch.Tensor:
        options = {"iterations": 5, "seed": seed, "batch_size": 4}
        return fit_surgery(clip, clip_weights, {"shapes": teacher}, clip_tasks[0], **options).adapters["shapes"].up  # type: ignore[arg-type]

    assert torch.equal(fit(1), fit(1))
    assert not torch.equal(fit(1), fit(2))


def test_what_cannot_be_fitted_is_refused(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task], mlp_model: ModuleModel
) -> None:
    shapes = clip_tasks[0]
    with pytest.raises(DataError, match="works on the image embeddings of a CLIP, and the model is a ModuleModel"):
        fit_surgery(mlp_model, {}, {}, shapes)
    with pytest.raises(DataError, match="fit_surgery: no teacher for task 'shapes'"):
        fit_surgery(clip, clip_weights, {}, shapes)
    with pytest.raises(DataError, match=r"'rank' parameter of fit_surgery must be an int in the range \[1, inf\)"):
        fit_surgery(clip, clip_weights, {"shapes": clip_weights}, shapes, rank=0)
    with pytest.raises(DataError, match=r"'lr' parameter of fit_surgery must be a float in the range \(0, inf\)"):
        fit_surgery(clip, clip_weights, {"shapes": clip_weights}, shapes, lr=0.0)
