"""Selectors on small pools whose best subset is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError
from mergesolve.solvers.selection import (
    DPP,
    SELECTORS,
    SIMILARITIES,
    Evidence,
    GreedySoup,
    TopK,
    make_selector,
    quality,
)

D = 12


def pool_of(vectors):
    base = {"w": torch.zeros(D)}
    return Pool.from_state_dicts(
        base, {name: {"w": torch.tensor(v, dtype=torch.float32)} for name, v in vectors.items()}
    )


def unit(i, scale=1.0):
    return scale * np.eye(D)[i]


TARGETS = np.array([unit(0) + 0.2 * unit(1), unit(2)])  # of two tasks


def losses(weights):
    w = weights["w"].double().numpy()
    return {f"task{t}": float(0.5 * ((w - target) ** 2).sum()) for t, target in enumerate(TARGETS)}


def accuracy(weights):
    return {task: 1 / (1 + loss) for task, loss in losses(weights).items()}


def gradients(weights):
    return {f"task{t}": {"w": weights["w"] - torch.tensor(target).float()} for t, target in enumerate(TARGETS)}


def features(weights):
    return np.abs(weights["w"].double().numpy()[None, :] + 0.1) * np.arange(1, 6)[:, None]


def predictions(weights):
    return np.abs(weights["w"].numpy()).argsort()[-5:]


VECTORS = {
    "first": unit(0, 0.9),
    "second": unit(2, 0.8),
    "copy": unit(0, 0.9),
    "both": 0.5 * (unit(0) + unit(2)),
    "far": unit(7, 40.0),
    "wrong": -unit(0),
}


@pytest.fixture
def evidence():
    def make(vectors=VECTORS, **given):
        every = {"accuracy": accuracy, "losses": losses, "gradients": gradients, "features": features,
                 "predictions": predictions}  # fmt: skip
        return Evidence(pool_of(vectors), **(given or every))

    return make


SPECS = {
    "dpp": {"name": "dpp", "k": 3, "over": "best"},
    "top-k": {"name": "top-k", "k": 3},
    "random": {"name": "random", "k": 3, "seed": 4},
}


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_is_equivariant_to_the_order_of_the_pool(name, evidence):
    spec = SPECS.get(name, name)
    vectors = {key: value for key, value in VECTORS.items() if key != "copy"}  # equal experts are told apart by order
    chosen = make_selector(spec).select(evidence(vectors)).names
    assert set(chosen) <= set(vectors)
    assert len(set(chosen)) == len(chosen)
    for order in itertools.islice(itertools.permutations(vectors), 1, 60, 11):
        found = make_selector(spec).select(evidence({key: vectors[key] for key in order})).names
        assert set(found) == set(chosen)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_describes_itself_and_gives_a_reason_for_each(name, evidence):
    selector = make_selector(SPECS.get(name, name))
    selection = selector.select(evidence())
    assert make_selector(selector.describe()) == selector
    assert len(selection.reasons) == len(selection.names)
    assert all(selection.reasons)


@pytest.mark.parametrize("similar", SIMILARITIES)
@pytest.mark.parametrize("inference", ["greedy", "polished", "exhaustive"])
def test_duplicates_are_never_selected_together(similar, inference, evidence):
    selector = DPP(k=2, quality="uniform", similarity=similar, inference=inference)
    names = selector.select(evidence()).names
    assert not {"first", "copy"} <= set(names)


def test_norm_quality_keeps_an_expert_that_went_astray_out(evidence):
    selector = DPP(k=2, quality="norm", similarity="task-vectors")
    assert "far" not in selector.select(evidence()).names


def test_quality_is_clipped_where_an_expert_is_worse_than_the_base(evidence):
    for kind in ("accuracy", "loss"):
        found = dict(zip(VECTORS, quality(evidence(), kind, "mean"), strict=True))
        assert found["wrong"] == 0
        assert found["both"] > 0


def test_quality_is_the_relative_gain(evidence):
    given = evidence()
    base, experts = accuracy({"w": torch.zeros(D)}), accuracy({"w": torch.tensor(VECTORS["both"])})
    gains = [(experts[task] - base[task]) / base[task] for task in base]
    index = list(VECTORS).index("both")
    assert quality(given, "accuracy", "mean")[index] == pytest.approx(np.mean(gains), rel=1e-6)
    assert quality(given, "accuracy", "best")[index] == pytest.approx(max(gains), rel=1e-6)


def test_top_k_ranks_by_the_inner_product_with_the_gradient(evidence):
    wanted = {name: np.mean([-(target @ vector) for target in TARGETS]) for name, vector in VECTORS.items()}
    names = TopK(k=4).select(evidence()).names
    assert [wanted[name] for name in names] == pytest.approx(sorted(wanted.values())[:4])


def test_a_soup_is_at_least_as_good_as_its_best_ingredient(evidence):
    given = evidence()
    selection = GreedySoup().select(given)
    singles = [np.mean(list(accuracy({"w": torch.tensor(v).float()}).values())) for v in VECTORS.values()]
    assert selection.details["accuracy"] >= max(singles) - 1e-9
    chosen = np.mean([VECTORS[name] for name in selection.names], axis=0)
    assert np.mean(list(accuracy({"w": torch.tensor(chosen)}).values())) == pytest.approx(selection.details["accuracy"])


def test_task_vector_similarity_takes_one_pass_and_no_data(evidence):
    given = evidence(progress=None)  # no functions at all
    before = given.pool.bytes_read
    selection = DPP(k=3, quality="norm", similarity="task-vectors").select(given)
    assert len(selection.names) == 3
    nbytes = 4 * D * (len(VECTORS) + 1)
    assert given.pool.bytes_read - before <= 2 * nbytes  # the search for identical tensors, and the pass


def test_feature_similarity_is_the_mean_cosine(evidence):
    given = evidence()
    rows = [features({"w": torch.tensor(v).float()}) for v in VECTORS.values()]
    for i, j in itertools.product(range(len(rows)), repeat=2):
        cosines = (rows[i] * rows[j]).sum(1) / np.linalg.norm(rows[i], axis=1) / np.linalg.norm(rows[j], axis=1)
        assert given.feature_similarity[i, j] == pytest.approx(cosines.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("selector", "given", "words"),
    [
        (lambda: DPP(k=7), None, ["'k'", "6"]),
        (lambda: TopK(k=9), None, ["'k'", "6"]),
        (lambda: DPP(k=0), None, ["'k'", "[1"]),
        (lambda: DPP(k=2, size=2.0), None, ["'k'", "'size'"]),
        (lambda: DPP(k=2, seed=-1), None, ["'seed'", "-1"]),
        (lambda: DPP(k=2, include=3), None, ["'include'", "list"]),
        (lambda: DPP(k=2, quality="charm"), None, ["quality", "norm"]),
        (lambda: DPP(k=2, include=("nobody",)), None, ["nobody"]),
        (lambda: DPP(k=2), {"progress": None}, ["accuracy", "validation"]),
        (
            lambda: DPP(k=2),
            {"accuracy": lambda w: {"t": 1 - min(1, float(abs(w["w"]).sum()))}, "features": features},
            ["qualities", "0"],
        ),
        (
            lambda: DPP(k=2, quality="uniform"),
            {"features": lambda w: np.full((3, 2), np.nan)},
            ["NaN", "first"],
        ),
    ],
)
def test_a_mistake_says_what_and_how(selector, given, words, evidence):
    with pytest.raises(OptionError) as caught:
        selector().select(evidence(**(given or {})))
    for word in words:
        assert word in str(caught.value)


def test_validation_data_that_is_missing_for_an_expert_is_named(evidence):
    def partial(weights):
        found = accuracy(weights)
        if float(weights["w"][7]) > 1:
            found.pop("task1")
        return found

    with pytest.raises(OptionError, match="far"):
        DPP(k=2).select(evidence(accuracy=partial, features=features))


def test_a_soup_does_not_say_that_an_average_rises_which_stays(evidence):
    selection = GreedySoup().select(evidence(accuracy=lambda weights: {"t": 0.5}))
    assert set(selection.reasons[1:]) == {"the average stays at 50.0"}


def test_inclusion_probabilities_sum_to_the_size_and_the_likelihood_is_that_of_the_subset(evidence):
    selection = DPP(k=3, quality="norm", similarity="features", exclude=("copy",)).select(evidence())
    assert sum(selection.details["inclusion"]) == pytest.approx(3)
    kernel = np.outer(selection.quality, selection.quality) * selection.similarity
    index = {name: i for i, name in enumerate(VECTORS)}
    free = [i for name, i in index.items() if name != "copy"]
    minors = {m: np.linalg.det(kernel[np.ix_(m, m)]) for m in itertools.combinations(free, 3)}
    chosen = tuple(sorted(index[name] for name in selection.names))
    assert minors[chosen] == pytest.approx(max(minors.values()))
    assert np.exp(selection.details["log_likelihood"]) == pytest.approx(minors[chosen] / sum(minors.values()), rel=1e-4)


def test_layers_weigh_alike_and_copies_stay_copies():
    base = {"1.w": torch.zeros(4), "2.w": torch.zeros(4)}
    experts = {
        "a": {"1.w": torch.tensor([100.0, 0, 0, 0]), "2.w": torch.zeros(4)},
        "copy": {"1.w": torch.tensor([100.0, 0, 0, 0]), "2.w": torch.zeros(4)},
        "b": {"1.w": torch.tensor([0.0, 1, 0, 0]), "2.w": torch.tensor([0.0, 0, 0, 1])},
        "c": {"1.w": torch.tensor([0.0, 0, 50, 0]), "2.w": torch.tensor([0.0, 0, 0, 3])},
    }
    found = Evidence(Pool.from_state_dicts(base, experts)).layer_cosines
    np.testing.assert_allclose(found, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]], atol=1e-12)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_a_pool_of_one_expert_is_a_selection():
    given = Evidence(pool_of({"only": unit(0)}))
    for selector in (DPP(k=1, quality="norm", similarity="layers"), DPP(quality="norm", similarity="task-vectors")):
        assert selector.select(given).names == ("only",)
