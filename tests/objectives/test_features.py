from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.objectives import (
    CLIP,
    DataError,
    ModuleModel,
    Task,
    Weights,
    accuracy,
    agreement,
    mean_feature_similarity,
    predictions,
)
from mergesolve.objectives.features import features
from torch import nn

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


# -- how alike two experts are -----------------------------------------------------------------------------------------


def _features(n: int, samples: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, size, generator=rng) for _ in range(n)]


@given(n=st.integers(1, 5), samples=st.integers(1, 9), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_similarity_is_the_mean_cosine_on_the_same_sample_and_positive_semidefinite(
    n: int, samples: int, size: int, seed: int
) -> None:
    rows = _features(n, samples, size, seed)
    found = mean_feature_similarity(rows)
    for i in range(n):
        for j in range(n):
            cosines = F.cosine_similarity(rows[i].double(), rows[j].double(), dim=1)
            assert found[i, j] == pytest.approx(cosines.mean().item(), abs=1e-12)
    assert np.array_equal(found, found.T)
    assert np.linalg.eigvalsh(found).min() > -1e-12
    assert np.diag(found) == pytest.approx(1)


def test_similarity_does_not_depend_on_the_chunks_or_on_the_scale_of_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _features(3, 20, 4)
    whole = mean_feature_similarity(rows)
    assert mean_feature_similarity([rows[0] * 3, rows[1] * 1e-3, rows[2]]) == pytest.approx(whole)
    monkeypatch.setattr("mergesolve.objectives.features._CHUNK", 3 * 4 * 7)
    assert mean_feature_similarity(rows) == pytest.approx(whole, abs=1e-14)


def test_similarity_is_one_for_a_duplicate_and_0_for_a_feature_of_norm_0() -> None:
    one, two = _features(2, 6, 4)
    found = mean_feature_similarity([one, two, one.clone(), torch.zeros(6, 4)])
    assert found[0, 2] == pytest.approx(1, abs=1e-12)
    assert found[0] == pytest.approx(found[2])
    assert found[3].tolist() == [0, 0, 0, 0]


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=6))
def test_agreement_is_the_share_of_equal_classes_and_positive_semidefinite(classes: list[list[int]]) -> None:
    found = agreement([F.one_hot(torch.tensor(row), 4) * 0.6 + 0.1 for row in classes])
    for i, one in enumerate(classes):
        for j, other in enumerate(classes):
            assert found[i, j] == sum(a == b for a, b in zip(one, other, strict=True)) / 6
    one_hot = np.eye(4)[np.array(classes)].reshape(len(classes), -1)
    assert found == pytest.approx(one_hot @ one_hot.T / 6)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_a_duplicate_expert_agrees_with_its_original(clip: CLIP, clip_weights: Weights, clip_tasks: Tasks) -> None:
    task = clip_tasks[1]
    rng = torch.Generator().manual_seed(0)
    other = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=rng) for name, tensor in clip_weights.items()}
    of = [predictions(clip, weights, task) for weights in (clip_weights, other, dict(clip_weights))]
    assert agreement(of)[0, 2] == 1
    assert agreement(of)[0, 1] < 1


@pytest.mark.parametrize("measure", [mean_feature_similarity, agreement])
def test_rows_that_cannot_be_compared_are_refused(measure: Any) -> None:
    rows = _features(2, 6, 4)
    name = measure.__name__
    with pytest.raises(DataError, match=f"{name} needs the rows of at least one expert"):
        measure([])
    for bad in (rows[0][:5], rows[0][:, :3], rows[0][0]):
        with pytest.raises(DataError, match=rf"{name}: expert 1 has rows of shape .*, and expert 0 of \[6, 4\]"):
            measure([rows[0], bad])
    with pytest.raises(DataError, match=rf"{name}: expert 0 has rows of shape \[0, 4\]"):
        measure([rows[0][:0]])
    rows[1][2, 1] = float("nan")
    with pytest.raises(DataError, match=f"{name}: expert 1 has values that are not finite; check its checkpoint"):
        measure(rows)


def test_equal_modules_with_other_weights_are_told_apart() -> None:
    torch.manual_seed(0)
    model = ModuleModel(nn.Linear(3, 2, bias=False))
    task = Task("t", torch.randn(8, 3), None, ("a", "b"))
    weight = torch.randn(2, 3)
    of = [predictions(model, {"weight": w}, task) for w in (weight, -weight)]
    assert agreement(of).tolist() == [[1, 0], [0, 1]]
    rows = [features(model, {"weight": w}, task) for w in (weight, -weight)]
    assert mean_feature_similarity(rows) == pytest.approx(np.array([[1, -1], [-1, 1]]))
