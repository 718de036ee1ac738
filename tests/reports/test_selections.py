"""The figures of a selection, from its record alone."""

from __future__ import annotations

import numpy as np
import pytest
from mergesolve.reports.selections import embedding, save_selection


def report(n=7, chosen=(2, 0, 5), seed=0):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    names = [f"expert{i}" for i in range(n)]
    return {
        "selector": {"name": "dpp", "k": len(chosen)},
        "selected": [{"expert": names[i], "reason": "quality"} for i in chosen],
        "candidates": names,
        "quality": rng.random(n).tolist(),
        "similarity": (points @ points.T).tolist(),
        "relevance": {"tasks": ["a", "b"], "scores": rng.normal(size=(2, n)).tolist()},
    }


def test_every_figure_names_the_experts(tmp_path):
    written = {path.name for path in save_selection(report(), tmp_path)}
    stems = ("kernel", "quality", "map", "relevance")
    assert written == {f"{stem}.{form}" for stem in stems for form in ("png", "svg")}
    for stem in ("kernel", "relevance"):
        text = (tmp_path / f"{stem}.svg").read_text()
        assert all(f">expert{i}<" in text for i in range(7))


def test_a_record_without_similarity_has_no_kernel(tmp_path):
    written = save_selection({**report(), "similarity": None}, tmp_path)
    assert {path.stem for path in written} == {"relevance"}


@pytest.mark.parametrize("n", [1, 2, 60])
def test_few_and_many_experts_are_drawn(n, tmp_path):
    assert save_selection(report(n, tuple(range(min(n, 2)))), tmp_path)


def test_the_map_keeps_distances_that_fit_a_plane():
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(9, 2))
    points, share = embedding(flat @ flat.T)
    assert share == pytest.approx(1)
    for i in range(9):
        wanted = np.linalg.norm(flat - flat[i], axis=1)
        np.testing.assert_allclose(np.linalg.norm(points - points[i], axis=1), wanted, atol=1e-9)
