import json
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from mergesolve.solvers import FrankWolfe, FunctionProblem, OptionError, Result, State, Step, read_trace, solve
from mergesolve.solvers.driver import CHECKPOINT


def test_optimal_only_when_the_gap_is_within_the_tolerance(face):
    quadratic, _ = face
    loose = solve(quadratic.problem("simplex"), "projected-gradient", tol=1e-2, max_iter=500)
    tight = solve(quadratic.problem("simplex"), "projected-gradient", tol=1e-9, max_iter=500)
    assert loose.success
    assert tight.success
    assert loose.gap <= 1e-2
    assert tight.gap <= 1e-9
    assert loose.nit < tight.nit
    relative = solve(quadratic.problem("simplex"), "projected-gradient", tol=0, rtol=1e-3, max_iter=500)
    assert relative.gap <= 1e-3 * abs(relative.objective)


def test_iteration_limit_is_not_success(face):
    result = solve(face[0].problem("simplex"), "frank-wolfe", max_iter=3, tol=1e-12)
    assert (result.status, result.success, result.nit, len(result.trace)) == ("max_iter", False, 3, 4)
    assert "max_iter" in result.message


def test_a_solver_that_cannot_move_has_stalled(merge):
    assert solve(merge(), "point", tol=0).status == "stalled"


def test_minibatches_never_end_as_optimal_by_an_estimate(merge):
    result = solve(merge(stochastic=True), "adaptive", max_iter=5, tol=0)
    assert all(line["estimate"] for line in result.trace)
    assert result.status == "max_iter"
    # the certificate of the result is on all the data, and there a loose tolerance may hold
    assert solve(merge(stochastic=True), "adaptive", max_iter=5, tol=1e9).status == "optimal"
    assert solve(merge(stochastic=True), "adaptive", max_iter=5, tol=1e9).nit == 5


def test_the_best_iterate_is_returned(merge):
    solver = {"name": "adaptive", "lr": 0.5, "method": "sgd", "momentum": 0.0}
    result = solve(merge(domain="free"), solver, start="average", max_iter=20, tol=0)
    values = [line["value"] for line in result.trace]
    assert result.best_iteration == int(np.argmin(values))
    assert result.objective == pytest.approx(min(values), rel=1e-5)


def test_every_iterate_of_a_run_rebuilds_its_weights(merge):
    """The value recorded at an iterate is that of weights combined from scratch, to float tolerance."""
    result = solve(merge("layer"), "frank-wolfe", max_iter=8, tol=0, checkpoint_every=100)
    fresh = merge("layer")
    for line in result.trace:
        fresh.refresh()
        assert fresh.value(np.array(line["coefficients"])) == pytest.approx(line["value"], rel=1e-5)


def test_the_trace_file_is_complete_while_the_solve_runs(merge, tmp_path):
    def look(line):
        head, lines = read_trace(tmp_path / "trace.jsonl")
        assert head["schema"] == 1
        assert lines[-1] == line

    solve(merge(), "frank-wolfe", max_iter=4, tol=0, run=tmp_path, callback=look)
    with (tmp_path / "trace.jsonl").open("a") as stream:
        stream.write('{"iteration": 99, "va')
    assert [line["iteration"] for line in read_trace(tmp_path / "trace.jsonl")[1]] == [0, 1, 2, 3, 4]


def test_trace_is_strict_json_with_null_for_what_is_not(merge, tmp_path):
    solve(merge(domain="free"), "adaptive", max_iter=2, tol=0, run=tmp_path)
    for text in (tmp_path / "trace.jsonl").read_text().splitlines():
        line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["gap"] is None
    assert line["step"] is None
    assert json.loads((tmp_path / "result.json").read_text())["gap"] is None


@pytest.mark.parametrize("change", ["solver", "start", "blocks", "domain", "pool"])
def test_resuming_another_solve_is_refused(change, merge, tmp_path):
    def run(solver="frank-wolfe", start="average", blocks="layer", domain="capped", order=None, **options):
        return solve(
            merge(blocks, domain, order=order), solver, start=start, max_iter=4, tol=0, run=tmp_path, **options
        )

    def interrupt(line):
        if line["iteration"] == 2:
            raise StopIteration

    run(callback=interrupt, checkpoint_every=1)
    other = {
        "solver": {"solver": "projected-gradient"},
        "start": {"start": "base"},
        "blocks": {"blocks": "tensor"},
        "domain": {"domain": "box"},
        "pool": {"order": ["e1", "e0", "e2", "e3", "e4"]},
    }[change]
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(OptionError, match=r"belongs to another solve: .* differ"):
        run(resume=True, **other)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert run(resume=True).nit == 4


def test_a_finished_run_goes_on_when_given_more_iterations(merge, tmp_path):
    solve(merge(), "frank-wolfe", max_iter=6, tol=0, run=tmp_path, checkpoint_every=2)
    longer = solve(merge(), "frank-wolfe", max_iter=12, tol=0, run=tmp_path, resume=True, checkpoint_every=2)
    straight = solve(merge(), "frank-wolfe", max_iter=12, tol=0, checkpoint_every=2)
    np.testing.assert_array_equal(longer.coefficients, straight.coefficients)


def test_a_schedule_cannot_be_stretched_afterwards(merge, tmp_path):
    solver = {"name": "adaptive", "schedule": "cosine"}
    solve(merge(), solver, max_iter=4, tol=0, run=tmp_path)
    with pytest.raises(OptionError, match="max_iter differ"):
        solve(merge(), solver, max_iter=8, tol=0, run=tmp_path, resume=True)


def test_resuming_with_a_smaller_limit_is_refused_and_harms_nothing(merge, tmp_path):
    before = solve(merge(), "frank-wolfe", max_iter=6, tol=0, run=tmp_path)
    with pytest.raises(OptionError, match="has done 6 iterations already"):
        solve(merge(), "frank-wolfe", max_iter=3, tol=0, run=tmp_path, resume=True)
    assert Result.load(tmp_path).nit == before.nit


@pytest.mark.parametrize("backend", ["streaming", "resident"])
def test_a_time_limit_loses_no_iteration(backend, merge, tmp_path):
    for done in (1, 2, 3):
        limited = solve(
            merge(backend=backend), "frank-wolfe", max_iter=50, tol=0, time_limit=0.0, run=tmp_path, resume=True
        )
        assert [line["iteration"] for line in limited.trace] == list(range(done))
    straight = solve(merge(backend=backend), "frank-wolfe", max_iter=2, tol=0)
    np.testing.assert_allclose(limited.coefficients, straight.coefficients, atol=1e-6)


def test_a_solver_that_leaves_its_domain_is_a_defect(face):
    class Wild(FrankWolfe):
        def step(self, problem, state, evaluation, clock):
            return Step(State(state.coefficients + 0.1), 0.1)

        def describe(self):
            return {"name": "wild"}

    with pytest.raises(RuntimeError, match="Wild left the domain 'simplex'"):
        solve(face[0].problem("simplex"), Wild())


def test_scores_that_are_not_finite_are_never_certified(face):
    quadratic, _ = face
    calls = []

    def function(point):
        calls.append(1)
        value, scores = quadratic(point)
        return value, scores if len(calls) < 5 else np.full_like(scores, np.nan)

    problem = FunctionProblem(function, *quadratic.c.shape, "simplex")
    result = solve(problem, {"name": "frank-wolfe", "step_rule": "open-loop"}, tol=1e9, max_iter=0)
    assert result.success
    calls += [1] * 5
    assert solve(problem, "point", tol=1e9, max_iter=0).status == "nonfinite"


def test_killed_process_resumes_to_the_same_coefficients(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from mergesolve.solvers import FunctionProblem, solve

        rng = np.random.default_rng(0)
        root = rng.normal(size=(8, 8))
        q = root @ root.T / 8
        c = q @ rng.dirichlet(np.ones(8))
        problem = FunctionProblem(lambda x: (0.5 * (x @ q @ x.T)[0, 0] - (x @ c)[0], x @ q - c), 1, 8, "simplex")

        def die(line):
            if line["iteration"] == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

        result = solve(problem, "frank-wolfe", max_iter=60, tol=0, run=sys.argv[1], resume=True, callback=die)
        """)
    )

    def run(folder, at):
        return subprocess.run([sys.executable, script, tmp_path / folder, str(at)], check=False).returncode

    assert run("whole", -1) == 0
    assert run("killed", 37) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    assert run("killed", -1) == 0
    whole, killed = Result.load(tmp_path / "whole"), Result.load(tmp_path / "killed")
    np.testing.assert_array_equal(whole.coefficients, killed.coefficients)
    assert whole.objective == killed.objective


def test_keyboard_interrupt_returns_what_there_is(face):
    def interrupt(line):
        if line["iteration"] == 3:
            raise KeyboardInterrupt

    result = solve(face[0].problem("simplex"), "frank-wolfe", tol=0, callback=interrupt)
    assert (result.status, len(result.trace)) == ("interrupted", 4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_iter": -1},
        {"max_iter": 2.5},
        {"tol": -1e-3},
        {"tol": float("nan")},
        {"rtol": "x"},
        {"checkpoint_every": 0},
    ],
)
def test_limits_out_of_range_are_refused(options, face):
    with pytest.raises(OptionError, match="parameter of solve must be"):
        solve(face[0].problem("simplex"), "frank-wolfe", **options)


def test_resume_needs_a_folder(face):
    with pytest.raises(OptionError, match="run=FOLDER"):
        solve(face[0].problem("simplex"), "frank-wolfe", resume=True)


def test_unwritable_folder_surfaces_as_an_operating_system_error(merge, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        solve(merge(), "frank-wolfe", run=tmp_path / "file" / "run")


@pytest.mark.parametrize("damage", ["missing", "json", "coefficients"])
def test_damaged_runs_are_explained(damage, merge, tmp_path):
    solve(merge(), "point", max_iter=0, run=tmp_path)
    if damage == "missing":
        (tmp_path / "result.json").unlink()
    elif damage == "json":
        (tmp_path / "result.json").write_text("{")
    else:
        (tmp_path / "coefficients.safetensors").write_bytes(b"nonsense")
    with pytest.raises(OptionError, match=r"holds no finished run|not valid JSON|not a readable coefficients file"):
        Result.load(tmp_path)


def test_pathlike_arguments(merge, tmp_path):
    solve(merge(), "point", max_iter=0, run=str(tmp_path / "deep" / "run"))
    assert Result.load(str(tmp_path / "deep" / "run")).nit == 0
