import re

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError
from mergesolve.federated.oracle import NEVER, LocalScorer, RemotePool, RemoteProblem, federated_frank_wolfe
from mergesolve.objectives import CrossEntropy, ModuleModel, Task
from mergesolve.pools import Pool
from mergesolve.solvers import Box, OptionError, Polytope, Problem, SoftFrankWolfe, Sparse, solve
from torch import nn

RULES = [
    {"name": "line-search"},
    {"name": "open-loop"},
    {"name": "backtracking"},
    {"name": "short-step", "smoothness": 4.0},
]
BLOCKS = ["model", "layer", "tensor", "row"]


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


P = 6 * 8 + 8 + 8 * 3 + 3


@pytest.fixture
def federation():
    """(anchor, {client: its model}, objective): each client steps down the loss of one of three tasks, or away."""
    torch.manual_seed(5)
    module = net()
    anchor = {name: value.detach().clone() for name, value in module.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    tasks = []
    for name in ("a", "b", "c"):
        inputs = torch.randn(24, 6, generator=generator)
        tasks.append(Task.from_arrays(name, inputs, torch.randint(3, (24,), generator=generator), ("x", "y", "z")))
    objective = CrossEntropy(ModuleModel(module), tasks)
    models = {}
    for i, name in enumerate(("ada", "bea", "cyd", "dov", "eve")):
        sign = -1.0 if i < 3 else 1.0  # dov and eve went uphill: nothing should choose them first
        gradient = CrossEntropy(ModuleModel(module), tasks[i % 3]).value_and_grad(anchor).gradient
        models[name] = {
            key: value + sign * 2.0 * gradient[key] + 0.02 * torch.randn(value.shape, generator=generator)
            for key, value in anchor.items()
        }
    return anchor, models, objective


def clients(anchor, models):
    return [LocalScorer(name, model, anchor) for name, model in models.items()]


def central(anchor, models, objective, blocks, domain, backend="streaming"):
    ordered = {name: models[name] for name in sorted(models)}
    return Problem(Pool.from_state_dicts(anchor, ordered, backend=backend), objective, blocks, domain)


def assert_same_run(found, expected):
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)
    assert (found.objective, found.gap, found.stationarity) == (expected.objective, expected.gap, expected.stationarity)
    assert (found.status, found.nit, found.tasks) == (expected.status, expected.nit, expected.tasks)
    assert len(found.trace) == len(expected.trace)
    for ours, theirs in zip(found.trace, expected.trace, strict=True):
        for key in ("value", "gap", "stationarity", "step", "vertices", "coefficients", "evaluations", "gradients"):
            assert ours[key] == theirs[key]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
def test_iterates_vertices_and_certificate_are_those_of_full_uploads(federation, rule, blocks):
    anchor, models, objective = federation
    solver = {"name": "frank-wolfe", "step_rule": rule}
    expected = solve(central(*federation, blocks, "capped"), solver, start="base", max_iter=6, tol=0)
    found, weights, _ = federated_frank_wolfe(
        anchor, clients(anchor, models), objective, solver=solver, blocks=blocks, max_iter=6, tol=0
    )
    assert_same_run(found, expected)
    problem = central(*federation, blocks, "capped")
    merged = problem.pool.combine(expected.coefficients, problem.blocks)
    assert all(torch.equal(weights[name], merged[name]) for name in anchor)


@pytest.mark.parametrize(("domain", "start"), [("simplex", "expert:bea"), ("box", "base"), ("simplex", "average")])
def test_other_domains_and_starts_give_the_same_iterates(federation, domain, start):
    anchor, models, objective = federation
    expected = solve(central(*federation, "layer", domain), "frank-wolfe", start=start, max_iter=4, tol=0)
    found, _, _ = federated_frank_wolfe(
        anchor, clients(anchor, models), objective, domain=domain, start=start, max_iter=4, tol=0
    )
    assert_same_run(found, expected)


@pytest.mark.parametrize(
    "solver", [SoftFrankWolfe(), SoftFrankWolfe(vertices=2), SoftFrankWolfe(distinct=True, oracle="layer-wise")]
)
def test_the_soft_oracle_gives_the_same_iterates(federation, solver):
    anchor, models, objective = federation
    expected = solve(central(*federation, "layer", "capped"), solver, start="base", max_iter=2, tol=0)
    found, _, traffic = federated_frank_wolfe(
        anchor, clients(anchor, models), objective, solver=solver, max_iter=2, tol=0
    )
    assert_same_run(found, expected)
    assert set(traffic.uploads) < set(models)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_clients_scores_are_bitwise_the_column_of_a_streaming_pool(blocks, stored):
    generator = torch.Generator().manual_seed(1)
    shapes = {"wide": (3, 70_000), "tall": (300, 500), "bias": (7,)}  # longer than a piece of the pool, also by row
    anchor = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = {
        name: {
            key: (value + 0.1 * torch.randn(value.shape, generator=generator)).to(stored)
            for key, value in anchor.items()
        }
        for name in ("a", "b", "c")
    }
    gradients = [{key: torch.randn(value.shape, generator=generator) for key, value in anchor.items()} for _ in "12"]
    del gradients[1]["tall"]
    for given in ([gradients[0]], gradients):
        remote = RemotePool(anchor, clients(anchor, models))
        rows = remote.blocks(blocks)
        streaming = Pool.from_state_dicts(anchor, models, backend="streaming")
        resident = Pool.from_state_dicts(anchor, models, backend="resident")
        found = remote.correlate(given, rows)
        np.testing.assert_array_equal(found, streaming.correlate(given, streaming.blocks(blocks)))
        close = resident.correlate(given, resident.blocks(blocks))
        np.testing.assert_allclose(found, close, rtol=1e-4, atol=1e-4 * np.abs(found).max())
        assert remote.fetch("b")  # now the server computes this column, from what the client stores
        np.testing.assert_array_equal(remote.correlate(given, rows), found)


def test_every_byte_is_counted():
    """Two clients, P = 4: one gradient goes to both, ada is chosen and uploads, then only bea is asked."""
    anchor = {"w": torch.zeros(2, 2)}
    models = {"ada": {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float16)}, "bea": {"w": torch.eye(2)}}
    pool = RemotePool(anchor, clients(anchor, models))
    blocks = pool.blocks("row")
    gradient = {"w": torch.tensor([[-1.0, 0.0], [0.0, 3.0]])}
    np.testing.assert_array_equal(pool.correlate(gradient, blocks), [[-1, -1], [0, 3]])
    assert pool.traffic.to_dict() == {
        "clients": 2, "down": 2 * 4 * 4, "up": 2 * 2 * 8, "full_upload": 2 * 16, "messages": 2, "uploads": {},
        "lost": {},
    }  # fmt: skip
    weights = pool.combine(np.array([[0.5, 0], [0.5, 0]]), blocks)
    assert weights["w"].tolist() == [[0.5, 0], [0, 0]]
    pool.combine(np.array([[0.25, 0], [0, 0]]), blocks)
    pool.displacement(np.array([[0.25, 0], [0, 0]]), blocks)  # nothing is sent twice
    pool.correlate([gradient, gradient], blocks)
    assert pool.traffic.to_dict() == {
        "clients": 2, "down": 2 * 16 + 2 * 16, "up": 2 * 16 + 4 * 2 + 2 * 2 * 8, "full_upload": 8 + 16, "messages": 4,
        "uploads": {"ada": 8}, "lost": {},
    }  # fmt: skip


def test_a_solve_from_the_base_uploads_what_was_chosen_and_nothing_else(federation):
    anchor, models, objective = federation
    result, _, traffic = federated_frank_wolfe(
        anchor, clients(anchor, models), objective, blocks="model", max_iter=3, tol=0
    )
    chosen = list(dict.fromkeys(line["vertices"][0] for line in result.trace if line["vertices"] is not None))
    assert list(traffic.uploads) == [name for name in chosen if name != "base"]
    assert 0 < len(traffic.uploads) < len(models)
    # Before each step the clients that have not uploaded are asked; then for the last iterate and for the certificate.
    here, asked = set(), 0
    for line in result.trace:
        asked += len(models) - len(here)
        here |= set(line["vertices"] or []) - {"base"}
    asked += len(models) - len(here)
    assert traffic.down_bytes == asked * 4 * P
    assert traffic.up_bytes == asked * 8 + len(here) * 4 * P
    assert traffic.messages == asked + len(here)
    assert traffic.full_upload_bytes == len(models) * 4 * P


def test_blocks_are_uploaded_when_they_are_first_chosen(federation):
    """A layer of a client comes up once, before it gets a coefficient; until then its gradient goes down each time."""
    anchor, models, objective = federation
    result, _, traffic = federated_frank_wolfe(anchor, clients(anchor, models), objective, max_iter=5, tol=0)
    layers = np.array([[4 * (6 * 8 + 8)], [4 * (8 * 3 + 3)]])
    here, down, up = np.zeros((2, 5), dtype=bool), 0, 0
    for line in [*result.trace, result.trace[-1]]:  # the last once more for the certificate
        arrived = (np.array(line["coefficients"]) > 0) & ~here
        up += np.sum(layers * arrived)
        here |= arrived
        down += np.sum(layers * ~here)
        up += 8 * np.count_nonzero(~here)
    assert (here.sum(axis=0) == 1).any()  # some client is chosen for one layer only
    assert (traffic.down_bytes, traffic.up_bytes) == (down, up)
    for client, bytes_up in zip(sorted(models), np.sum(layers * here, axis=0), strict=True):
        assert traffic.uploads.get(client, 0) == bytes_up


@pytest.mark.parametrize("blocks", BLOCKS)
def test_whole_models_instead_of_blocks_change_the_traffic_only(federation, blocks):
    anchor, models, objective = federation
    by = {
        uploads: federated_frank_wolfe(
            anchor, clients(anchor, models), objective, blocks=blocks, max_iter=4, tol=0, uploads=uploads
        )
        for uploads in ("blocks", "model")
    }
    assert_same_run(by["blocks"][0], by["model"][0])
    assert by["blocks"][2].up_bytes <= by["model"][2].up_bytes or blocks == "row"  # many rows, many scores
    assert by["blocks"][2].down_bytes >= by["model"][2].down_bytes
    assert set(by["model"][2].uploads.values()) == {4 * P}
    assert list(by["blocks"][2].uploads) == list(by["model"][2].uploads)


def test_blocks_that_a_lost_client_has_uploaded_stay_in_the_hull(federation):
    anchor, models, objective = federation
    pool = RemotePool(anchor, faulty(anchor, models, "ada", scores=0))
    problem = RemoteProblem(pool, objective, "layer", "simplex")
    assert pool.fetch("ada", ["2.weight", "2.bias"])
    scores = problem.evaluate(np.zeros((2, 5))).scores
    expected = central(*federation, "layer", "simplex").evaluate(np.zeros((2, 5))).scores
    assert list(pool.traffic.lost) == ["ada"]
    assert scores[0, 0] == NEVER
    np.testing.assert_array_equal(scores[:, 1:], expected[:, 1:])
    assert scores[1, 0] == expected[1, 0]
    np.testing.assert_array_equal(pool.unreachable(problem.blocks), [[True] + [False] * 4, [False] * 5])
    result = solve(problem, "frank-wolfe", start="expert:bea", max_iter=8, tol=0)
    assert result.coefficients[0, 0] == 0 < result.coefficients[1, 0]


def test_at_the_base_nothing_is_uploaded(federation):
    anchor, models, objective = federation
    result, weights, traffic = federated_frank_wolfe(anchor, clients(anchor, models), objective, max_iter=0)
    assert traffic.uploads == {}
    assert result.gap == solve(central(*federation, "layer", "capped"), "point", start="base", max_iter=0).gap
    assert all(torch.equal(weights[name], anchor[name]) for name in anchor)


def test_the_order_of_the_clients_does_not_matter(federation):
    anchor, models, objective = federation
    runs = []
    for order in (list(models), list(models)[::-1]):
        given = clients(anchor, {name: models[name] for name in order})
        runs.append(federated_frank_wolfe(anchor, given, objective, max_iter=4, tol=0))
    assert_same_run(runs[1][0], runs[0][0])
    assert runs[0][2] == runs[1][2]
    assert list(runs[0][2].uploads) == list(runs[1][2].uploads)
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in anchor)


def test_a_tensor_that_nobody_changed_is_a_row_that_nobody_is_chosen_for(federation):
    anchor, models, objective = federation
    for model in models.values():
        model["0.bias"] = anchor["0.bias"]
    expected = solve(central(*federation, "tensor", "capped"), "frank-wolfe", start="base", max_iter=4, tol=0)
    given = clients(anchor, models)
    found, weights, _ = federated_frank_wolfe(anchor, given, objective, blocks="tensor", max_iter=4, tol=0)
    row = list(RemotePool(anchor, given).tensors).index("0.bias")
    assert not found.coefficients[row].any()
    np.testing.assert_array_equal(np.delete(found.coefficients, row, axis=0), expected.coefficients)
    assert torch.equal(weights["0.bias"], anchor["0.bias"])


class Faulty:
    """A client that answers as another does, until `scores` or `uploads` is exhausted; then `fault` answers."""

    def __init__(self, honest, scores=10**6, uploads=10**6, fault=None):
        self.honest, self.name, self.left = honest, honest.name, {"scores": scores, "uploads": uploads}
        self.fault = fault

    def _answer(self, what, honest):
        self.left[what] -= 1
        if self.left[what] >= 0:
            return honest
        if self.fault is None:
            raise ConnectionError("gone")
        return self.fault(honest)

    def scores(self, gradients, rows):
        return self._answer("scores", self.honest.scores(gradients, rows))

    def upload(self, names):
        return self._answer("uploads", self.honest.upload(names))


def faulty(anchor, models, name, **options):
    given = clients(anchor, models)
    return [Faulty(client, **options) if client.name == name else client for client in given]


def nan_weights(weights):
    return {name: torch.full_like(value, torch.nan) for name, value in weights.items()}


FAULTS = {
    "gone at the scores": ({"scores": 0}, "scores: ConnectionError: gone"),
    "gone at the upload": ({"uploads": 0}, "upload: ConnectionError: gone"),
    "nan scores": ({"scores": 0, "fault": lambda scores: scores * np.nan}, "scores: answered NaN"),
    "wrong scores": ({"scores": 0, "fault": lambda scores: scores[:, :1]}, r"scores: answered the shape \[1, 1\]"),
    "nan upload": ({"uploads": 0, "fault": nan_weights}, "upload: sent NaN"),
    "empty upload": ({"uploads": 0, "fault": lambda weights: {}}, "upload: sent nothing for '0.bias'"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: rule["name"])
def test_a_client_that_fails_is_as_one_that_was_never_there(federation, fault, rule):
    """Lost before anything of it arrived, so that the solve is that over the others, to the rounding of a retry."""
    anchor, models, objective = federation
    solver = {"name": "frank-wolfe", "step_rule": rule}
    first = federated_frank_wolfe(anchor, clients(anchor, models), objective, max_iter=4, tol=0, solver=solver)
    victim = next(iter(first[2].uploads))  # the one that the oracle would choose first
    options, reason = FAULTS[fault]
    found, weights, traffic = federated_frank_wolfe(
        anchor, faulty(anchor, models, victim, **options), objective, max_iter=4, tol=0, solver=solver
    )
    others = {name: model for name, model in models.items() if name != victim}
    expected = solve(central(anchor, others, objective, "layer", "capped"), solver, start="base", max_iter=4, tol=0)
    column = sorted(models).index(victim)
    assert not found.coefficients[:, column].any()
    np.testing.assert_array_equal(np.delete(found.coefficients, column, axis=1), expected.coefficients)
    assert [line["vertices"] for line in found.trace] == [line["vertices"] for line in expected.trace]
    assert (found.objective, found.gap) == (expected.objective, pytest.approx(expected.gap, rel=1e-12))
    assert found.stationarity == pytest.approx(expected.stationarity, rel=1e-12)
    assert all(weights[name].isfinite().all() for name in anchor)
    assert list(traffic.lost) == [victim]
    assert re.search(reason, traffic.lost[victim])
    assert victim not in traffic.uploads


def test_a_client_that_has_uploaded_may_leave(federation):
    anchor, models, objective = federation
    options = {"max_iter": 4, "tol": 0, "uploads": "model"}
    expected = federated_frank_wolfe(anchor, clients(anchor, models), objective, **options)
    given = faulty(anchor, models, next(iter(expected[2].uploads)), scores=1, uploads=1)
    found = federated_frank_wolfe(anchor, given, objective, **options)
    assert_same_run(found[0], expected[0])
    assert found[2] == expected[2]


@pytest.mark.parametrize("domain", ["simplex", "capped", "box"])
def test_a_lost_client_is_never_chosen_and_leaves_the_certificate_alone(federation, domain):
    anchor, models, objective = federation
    pool = RemotePool(anchor, faulty(anchor, models, "cyd", scores=0))
    problem = RemoteProblem(pool, objective, "layer", domain)
    scores = pool.correlate({name: torch.ones_like(value) for name, value in anchor.items()}, problem.blocks)
    kept = np.delete(scores, 2, axis=1)
    assert (scores[:, 2] == NEVER).all()
    for flipped in (kept, -kept):
        scores[:, [0, 1, 3, 4]] = flipped
        chosen = problem.domain.minimizer(scores)
        assert not chosen[:, 2].any()
        point = np.full_like(flipped, 0.25)
        full = np.insert(point, 2, 0.0, axis=1)
        inner = problem.domain.inner
        assert problem.domain.gap(full, scores) == pytest.approx(inner.gap(point, flipped), rel=1e-12)
        assert problem.domain.stationarity(full, scores) == pytest.approx(inner.stationarity(point, flipped), rel=1e-12)


def test_a_domain_stays_what_it_is_when_its_oracle_fetches(federation):
    anchor, models, objective = federation
    pool = RemotePool(anchor, clients(anchor, models))
    sparse = RemoteProblem(pool, objective, "layer", Sparse(2, "capped"))
    assert not sparse.domain.convex
    with pytest.raises(OptionError, match="not convex"):
        solve(sparse, "frank-wolfe", start="base", max_iter=1)
    tied = RemoteProblem(pool, objective, "layer", Polytope("capped", ["ada == same", "bea <= 0.1"]))
    assert set(tied.domain.cells(tied.rows)) == {0}
    point = np.zeros((tied.rows, 5))
    point[0, 1] = 0.5
    assert "it breaks 'bea <= 0.1'" in tied.domain.breach(point, 0)
    with pytest.raises(OptionError, match="unknown expert 'ada'"):
        tied.domain.bind(("bea", "cyd", "dov", "eve"), tied.row_names)


@pytest.mark.parametrize("domain", [Polytope("capped", ["bea <= 0.2", "sum(ada, cyd) <= 0.5"]), "l1-ball", Box(-1, 1)])
def test_domains_that_cannot_leave_a_lost_client_out_say_so(federation, domain):
    anchor, models, objective = federation
    with pytest.raises(FederationError, match=r"without clients that were lost \(cyd: .*gone.*Leave them out"):
        federated_frank_wolfe(anchor, faulty(anchor, models, "cyd", scores=0), objective, domain=domain)


def test_constraints_give_the_iterates_of_full_uploads(federation):
    anchor, models, objective = federation
    domain = Polytope("capped", ["bea <= 0.2", "sum(ada, cyd) <= 0.5"])
    expected = solve(central(*federation, "layer", domain), "frank-wolfe", start="base", max_iter=3, tol=0)
    found, _, traffic = federated_frank_wolfe(
        anchor, clients(anchor, models), objective, domain=domain, max_iter=3, tol=0
    )
    assert_same_run(found, expected)
    assert not {"dov", "eve"} & set(traffic.uploads)


def test_asking_whether_there_is_an_oracle_uploads_nothing(federation):
    anchor, models, objective = federation
    _, _, traffic = federated_frank_wolfe(
        anchor, clients(anchor, models), objective, domain="simplex", start="expert:bea", max_iter=0, tol=0
    )
    assert set(traffic.uploads) == {"bea"}


@pytest.mark.parametrize("options", [{"scores": 0}, {"uploads": 0}])
def test_a_federation_that_nobody_is_left_of_is_an_error(federation, options):
    anchor, models, objective = federation
    given = [Faulty(client, **options) for client in clients(anchor, {name: models[name] for name in ("ada", "bea")})]
    with pytest.raises(FederationError, match=r"none of the 2 clients is left.*ada: .*gone"):
        federated_frank_wolfe(anchor, given, objective, blocks="model")


def test_what_needs_absent_task_vectors_says_so(federation):
    anchor, models, _ = federation
    pool = RemotePool(anchor, clients(anchor, models))
    with pytest.raises(FederationError, match=r"client 'ada', which has not uploaded.*pool\.fetch"):
        pool.gram(pool.blocks("model"))
    with pytest.raises(FederationError, match="no client 'fay'; the clients are ada, bea"):
        pool.fetch("fay")
    with pytest.raises(FederationError, match="client 'ada', which has not uploaded"):
        pool.expert_fingerprint("ada")
    assert all(pool.fetch(name) for name in pool.names)
    streaming = Pool.from_state_dicts(anchor, models, backend="streaming")
    blocks = streaming.blocks("layer")
    np.testing.assert_array_equal(pool.gram(pool.blocks("layer")), streaming.gram(blocks))
    assert pool.expert_fingerprint("bea") == streaming.expert_fingerprint("bea")


def test_a_coefficient_for_a_lost_client_is_an_error(federation):
    anchor, models, _ = federation
    pool = RemotePool(anchor, faulty(anchor, models, "bea", uploads=0))
    with pytest.raises(FederationError, match=r"client 'bea' was given a coefficient.*\(upload: Conn"):
        pool.combine(np.full((1, 5), 0.2), pool.blocks("model"))


@pytest.mark.parametrize(("names", "message"), [([], "no clients"), (["a", "a"], "'a'"), (["base"], "'base'")])
def test_bad_federations_are_refused(federation, names, message):
    anchor = federation[0]
    with pytest.raises(FederationError, match=message):
        RemotePool(anchor, [LocalScorer(name, anchor, anchor) for name in names])


def test_gradients_in_bfloat16_halve_the_downlink_and_move_scores_within_their_rounding(federation):
    """|S' − S| ≤ 2⁻⁹ Σ|G τ| (8 significant bits, rounded to nearest), so only vertices closer than that can swap."""
    anchor, models, objective = federation
    pool = RemotePool(anchor, clients(anchor, models), gradient_dtype="bfloat16")
    exact = RemotePool(anchor, clients(anchor, models))
    blocks = pool.blocks("layer")
    gradient = objective.value_and_grad(anchor).gradient
    found, expected = pool.correlate(gradient, blocks), exact.correlate(gradient, blocks)
    bound = np.zeros_like(expected)
    for name, part in blocks.rows.items():
        for i, client in enumerate(pool.names):
            bound[part, i] += 2**-9 * float((gradient[name] * (models[client][name] - anchor[name])).abs().sum())
    assert (np.abs(found - expected) <= bound + 1e-6 * np.abs(expected)).all()
    assert not np.array_equal(found, expected)
    best = np.eye(5, dtype=bool)[expected.argmin(axis=1)]
    apart = (expected + bound)[best] < np.where(best, np.inf, expected - bound).min(axis=1)
    assert apart.any()
    np.testing.assert_array_equal(found.argmin(axis=1)[apart], expected.argmin(axis=1)[apart])
    assert 2 * pool.traffic.down_bytes == exact.traffic.down_bytes


def test_with_gradients_in_bfloat16_the_same_clients_are_chosen_and_the_optimum_is_found(federation):
    anchor, models, objective = federation
    runs = [
        federated_frank_wolfe(
            anchor, clients(anchor, models), objective, blocks="model", max_iter=6, tol=0, gradient_dtype=dtype
        )
        for dtype in ("float32", "bfloat16")
    ]
    assert [line["vertices"] for line in runs[0][0].trace] == [line["vertices"] for line in runs[1][0].trace]
    np.testing.assert_allclose(runs[1][0].coefficients, runs[0][0].coefficients, atol=0.02)
    assert runs[1][0].objective == pytest.approx(runs[0][0].objective, rel=1e-3)


def test_unknown_ways_to_send_are_refused(federation):
    anchor, models, _ = federation
    with pytest.raises(FederationError, match="gradient_dtype='int8' is unknown; it is 'float32' or 'bfloat16'"):
        RemotePool(anchor, clients(anchor, models), gradient_dtype="int8")
    with pytest.raises(FederationError, match="uploads='layers' is unknown; it is 'blocks' or 'model'"):
        RemotePool(anchor, clients(anchor, models), uploads="layers")


def test_models_may_be_files(federation, tmp_path):
    from safetensors.torch import save_file

    anchor, models, objective = federation
    for name, model in {"base": anchor, **models}.items():
        save_file(model, tmp_path / f"{name}.safetensors")
    base = tmp_path / "base.safetensors"
    given = [LocalScorer(name, tmp_path / f"{name}.safetensors", base) for name in models]
    found = federated_frank_wolfe(base, given, objective, max_iter=3, tol=0)
    expected = federated_frank_wolfe(anchor, clients(anchor, models), objective, max_iter=3, tol=0)
    assert_same_run(found[0], expected[0])
    assert found[2] == expected[2]


def test_the_fingerprint_knows_the_anchor_and_the_clients(federation):
    anchor, models, _ = federation
    fingerprint = RemotePool(anchor, clients(anchor, models)).fingerprint
    assert fingerprint == RemotePool(anchor, clients(anchor, models)[::-1]).fingerprint
    moved = {**anchor, "0.bias": anchor["0.bias"] + 1}
    assert fingerprint != RemotePool(moved, clients(moved, models)).fingerprint
    assert fingerprint != RemotePool(anchor, clients(anchor, models)[1:]).fingerprint
