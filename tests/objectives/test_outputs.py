from __future__ import annotations

import numpy as np
import pytest
import torch
from mergesolve.objectives import (
    CLIP,
    DataError,
    ModuleModel,
    Task,
    Weights,
    accuracy,
    predictions,
)
from mergesolve.objectives.outputs import features

Tasks = tuple[Task, Task]


@pytest.mark.parametrize("microbatch", [1, 5, 256])
def test_features_of_a_clip_are_its_normalized_embeddings_in_every_microbatch(
    clip: CLIP, clip_weights: Weights, clip_tasks: Tasks, microbatch: int
) -> None:
    task = clip_tasks[0]
    found = features(clip, clip_weights, task, microbatch)
    assert found.shape == (len(task), 16)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(task)))
    # The head and the scale turn them into the logits.
    logits = clip.logits(clip_weights, task.batch(np.arange(len(task))), task)
    torch.testing.assert_close(clip.logit_scale.exp() * found @ clip.head(task).T, logits)


def test_features_of_a_clip_need_no_head_and_no_labels(clip: CLIP, clip_weights: Weights, clip_tasks: Tasks) -> None:
    unknown = Task("unknown", clip_tasks[0].inputs, None, ("x",))
    assert torch.equal(features(clip, clip_weights, unknown), features(clip, clip_weights, clip_tasks[0]))


def test_features_of_another_model_are_its_logits_and_predictions_their_softmax(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: Tasks
) -> None:
    task = mlp_tasks[0]
    logits = mlp_model.logits(mlp64_weights, task.batch(np.arange(len(task))), task)
    for microbatch in (3, 100):
        torch.testing.assert_close(features(mlp_model, mlp64_weights, task, microbatch), logits.float())
        found = predictions(mlp_model, mlp64_weights, task, microbatch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, logits.exp().float() / logits.exp().sum(dim=1, keepdim=True).float())


def test_no_gradient_is_recorded_and_the_results_can_enter_one(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: Tasks
) -> None:
    weights = {name: tensor.requires_grad_() for name, tensor in mlp64_weights.items()}
    for of in (features, predictions):
        found = of(mlp_model, weights, mlp_tasks[0])
        assert not found.requires_grad
        scale = torch.ones((), requires_grad=True)
        (found * scale).sum().backward()  # type: ignore[no-untyped-call]
        assert scale.grad is not None


def test_predictions_of_a_clip_have_its_accuracy(clip: CLIP, clip_weights: Weights, clip_tasks: Tasks) -> None:
    for task in clip_tasks:
        found = predictions(clip, clip_weights, task, 7)
        assert found.shape == (len(task), len(task.classes))
        torch.testing.assert_close(found.sum(dim=1), torch.ones(len(task)))
        assert task.labels is not None
        correct = (found.argmax(dim=1) == task.labels).double().mean().item()
        assert correct == pytest.approx(accuracy(clip, clip_weights, task))


def test_what_does_not_fit_is_refused(clip: CLIP, clip_weights: Weights, clip_tasks: Tasks) -> None:
    short = {name: tensor for name, tensor in clip_weights.items() if name != "proj"}
    large = Task("large", torch.zeros(2, 3, 40, 40, dtype=torch.uint8), None, ("a",))
    for of in (features, predictions):
        with pytest.raises(DataError, match="needs 'proj', which the weights lack"):
            of(clip, short, clip_tasks[0])
        with pytest.raises(DataError, match="'microbatch' parameter of features must be an int"):
            of(clip, clip_weights, clip_tasks[0], 0)
    with pytest.raises(DataError, match=r"task 'large': images of shape \[3, 40, 40\], and .* takes \[3, 32, 32\]"):
        features(clip, clip_weights, large)
    with pytest.raises(DataError, match="task 'large' has no head"):
        predictions(clip, clip_weights, large)
