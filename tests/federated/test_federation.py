from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FAULTS, Faulty, FederationError, Membership, Reply, UpdateCache
from mergesolve.federated.federation import Accuracy, Federation, federate, read_rounds
from mergesolve.federated.registry import make_step
from mergesolve.federated.screening import REASONS, Screening
from mergesolve.objectives import evaluate as scores
from mergesolve.solvers import OptionError
from safetensors.torch import load_file
from torch import Tensor

SOLVING = {"name": "rows", "max_iter": 5, "objective": {"name": "distillation", "batch_size": 4}}
BOUNDED = {"name": "fw-bound", "max_iter": 4, "retention": {"bound": 0.05, "batch_size": 8, "outer": 2}}
MOMENTUM = {"name": "optimizer", "step": BOUNDED}
STEPS = ["fedavg", "fedadam", "by-phase", SOLVING, BOUNDED, MOMENTUM]
ids = [spec if isinstance(spec, str) else spec["name"] for spec in STEPS]  # type: ignore[index]
LABELS = ("seconds", "peak_memory")


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Drifting:
    """A client that moves towards a point of its own, with noise that depends on the round: deterministic and cheap."""

    samples = 5

    def __init__(self, name: str, seed: int, scale: float = 1.0) -> None:
        self.name, self.seed, self.scale, self.calls = name, seed, scale, 0

    def fit(self, weights: Any, round: int) -> Reply:
        self.calls += 1
        found = {}
        for i, (name, tensor) in enumerate(weights.items()):
            if not tensor.is_floating_point():
                found[name] = tensor + 1
                continue
            goal = np.random.default_rng([self.seed, i]).normal(size=tensor.shape)
            noise = np.random.default_rng([self.seed, i, round]).normal(size=tensor.shape)
            step = self.scale * (0.2 * (torch.tensor(goal) - tensor) + 0.02 * torch.tensor(noise))
            found[name] = (tensor + step).to(tensor.dtype)
        return Reply(self.name, found, round, samples=self.samples, steps=2 + self.seed)


def drifting(n: int = 3) -> list[Any]:
    return [Drifting(name, seed) for seed, name in enumerate(["blue", "green", "red", "yellow", "grey"][:n])]


def small(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": torch.zeros(5, 4, dtype=dtype), "b": torch.ones(4), "n": torch.tensor(7)}


def clean(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in LABELS} for record in records]


def lines(folder: Path) -> list[dict[str, Any]]:
    header, records = read_rounds(folder / "rounds.jsonl")
    return [header, *clean(records)]


def stop_after(rounds: int) -> Callable[[dict[str, Any]], None]:
    def callback(record: dict[str, Any]) -> None:
        if record["round"] == rounds and not record["repeat"]:
            raise StopIteration

    return callback


@pytest.fixture
def whole(federation: Any, server_data: Any) -> Callable[[Any], Federation]:
    """A federation on the fixture's model with drifting clients, for any step."""

    def make(spec: Any) -> Federation:
        def evaluate(weights: Any) -> Accuracy:
            return Accuracy({"blue": float(weights["last.bias"].sum())}, float(weights["first.bias"].sum()))

        return Federation(drifting(), federation.anchor, make_step(spec), server_data, evaluate, seed=4)

    return make


@pytest.mark.parametrize("spec", STEPS, ids=ids)
def test_a_resumed_run_equals_an_uninterrupted_one(spec: Any, whole: Any, tmp_path: Path) -> None:
    """Interrupted twice; weights to the bit, and every record but its seconds and memory."""
    straight = federate(whole(spec), 5, tmp_path / "straight")
    assert straight.status == "finished"
    for stop in (2, 3):
        partial = federate(whole(spec), 5, tmp_path / "broken", resume=True, callback=stop_after(stop))
        assert partial.status == "interrupted"
        assert partial.state.round == stop
    resumed = federate(whole(spec), 5, tmp_path / "broken", resume=True)
    assert resumed.status == "finished"
    assert same(resumed.weights, straight.weights)
    assert clean(resumed.records) == clean(straight.records)
    assert lines(tmp_path / "broken") == lines(tmp_path / "straight")
    assert same(load_file(tmp_path / "broken" / "model.safetensors"), dict(straight.weights))
    in_memory = federate(whole(spec), 5)
    assert same(in_memory.weights, straight.weights)
    memory = resumed.state.memory
    assert all(np.array_equal(memory[name], value) for name, value in straight.state.memory.items())
    assert resumed.state.norms == straight.state.norms
    assert resumed.state.fingerprints == straight.state.fingerprints


def test_the_multiplier_goes_on_from_round_to_round(whole: Any) -> None:
    found = federate(whole(BOUNDED), 3)
    prices = [record["method"]["multiplier"] for record in found.records]
    assert float(found.state.memory["multiplier"]) == prices[-1]
    assert max(prices) > 0
    fresh = federate(whole(BOUNDED), 1)
    assert fresh.records[0]["method"]["multiplier"] == prices[0]


def test_records_hold_what_the_trace_promises(whole: Any, tmp_path: Path) -> None:
    history = federate(whole("fedavg"), 2, tmp_path)
    header, records = read_rounds(tmp_path / "rounds.jsonl")
    assert header == json.loads(json.dumps(history.header))
    assert {"schema", "protocol", "clients", "tasks", "step", "rounds", "seed", "start"} <= set(header)
    assert header["schema"] == 1
    assert header["tasks"] == ["blue"]
    assert set(header["start"]) == {"accuracy", "mean", "reference"}
    assert [record["round"] for record in records] == [1, 2]
    for record in records:
        assert record["attempt"] == 1
        assert record["mean"] == pytest.approx(record["accuracy"]["blue"])
        assert record["reference"] is not None
        assert {"clients", "screen", "combine", "write", "evaluate", "server"} <= set(record["seconds"])
        assert record["bytes"]["down"] == record["bytes"]["up"] > 0
        assert record["peak_memory"] > 0


SERVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_federation import Drifting, small
from mergesolve.federated.federation import Federation, federate
from mergesolve.federated.registry import make_step

class Killer(Drifting):
    def fit(self, weights, round):
        flag = Path({flag!r})
        if round == 3 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(weights, round)

clients = [Drifting("blue", 0), Killer("green", 1), Drifting("red", 2)]
federate(Federation(clients, small(), make_step("fedadam"), seed=1), 5, {folder!r}, resume=True)
"""


def test_a_server_killed_in_round_three_of_five_reaches_the_same_model(tmp_path: Path) -> None:
    folder, flag = tmp_path / "run", tmp_path / "flag"
    code = SERVER.format(tests=str(Path(__file__).parent), flag=str(flag), folder=str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [record["round"] for record in read_rounds(folder / "rounds.jsonl")[1]] == [1, 2]
    assert not (folder / "model.safetensors").exists()
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
    straight = federate(Federation(drifting(), small(), make_step("fedadam"), seed=1), 5, tmp_path / "straight")
    assert same(load_file(folder / "model.safetensors"), dict(straight.weights))
    assert lines(folder) == lines(tmp_path / "straight")


def test_a_kill_between_record_and_state_repeats_the_round_once(tmp_path: Path) -> None:
    """The record of round 3 is written and the state is that of round 2: the record is dropped and made again."""
    straight = federate(Federation(drifting(), small(), make_step("fedadam")), 3, tmp_path / "straight")
    federate(Federation(drifting(), small(), make_step("fedadam")), 3, tmp_path / "run", callback=stop_after(2))
    with (tmp_path / "run" / "rounds.jsonl").open("a") as stream:
        stream.write(json.dumps({"round": 3, "repeat": False, "accepted": []}) + "\n")
    (tmp_path / "run" / "state.next.safetensors").write_bytes(b"half of a sta")
    resumed = federate(Federation(drifting(), small(), make_step("fedadam")), 3, tmp_path / "run", resume=True)
    assert same(resumed.weights, straight.weights)
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_last_line_cut_short_is_made_again(cut: int, tmp_path: Path) -> None:
    """Anywhere, in the middle of a letter of two bytes, too; and names may hold what other tools take for line ends."""
    clients = [Drifting("Zürich\u2028", 0), Drifting("b", 1), Faulty(Drifting("x\x85ü", 2), "crash")]
    federation = Federation(clients, small(), make_step("fedavg"))
    straight = federate(federation, 4, tmp_path / "straight")
    federate(federation, 4, tmp_path / "run", callback=stop_after(2))
    trace = tmp_path / "run" / "rounds.jsonl"
    whole_line = (tmp_path / "straight" / "rounds.jsonl").read_bytes().split(b"\n")[3]
    start = whole_line.index("ü".encode())
    trace.write_bytes(trace.read_bytes() + whole_line[: start + 1 if cut == 1 else cut])
    resumed = federate(federation, 4, tmp_path / "run", resume=True)
    assert same(resumed.weights, straight.weights)
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")
    assert len(lines(tmp_path / "run")) == 5


def test_a_lost_trace_begins_with_the_accuracy_of_the_first_model(whole: Any, tmp_path: Path) -> None:
    first = federate(whole("fedavg"), 3, tmp_path, callback=stop_after(2))
    (tmp_path / "rounds.jsonl").unlink()
    resumed = federate(whole("fedavg"), 3, tmp_path, resume=True)
    assert resumed.header["start"] == first.header["start"]
    assert [record["round"] for record in resumed.records] == [3]


def test_every_fault_in_one_run_is_named_and_the_run_finishes() -> None:
    """Each faulty client misbehaves from round 2 on; the healthy ones alone give the same models."""
    kinds = list(FAULTS)
    faulty = [Faulty(Drifting(kind, 10 + i), kind, rounds={2, 3, 4}) for i, kind in enumerate(kinds)]
    history = federate(Federation([*drifting(), *faulty], small(), make_step("fedavg")), 4)
    assert history.status == "finished"
    expected = {
        "nonfinite": "nonfinite",
        "shape": "shape",
        "missing": "names",
        "huge": "norm",
        "stale": "repeated",
        "late": "late",
        "dropout": "failed",
        "crash": "failed",
    }
    assert set(expected) == set(FAULTS)
    assert set(expected.values()) <= set(REASONS)
    assert history.records[0]["rejected"] == []
    for record in history.records[1:]:
        assert {line["client"]: line["reason"] for line in record["rejected"]} == expected
        assert all(line["detail"] for line in record["rejected"])
        assert record["accepted"] == ["blue", "green", "red"]
    assert all(bool(t.isfinite().all()) for t in history.weights.values())


@pytest.mark.parametrize("spec", ["fednova", "geometric-median", SOLVING], ids=["fednova", "median", "rows"])
def test_clients_that_are_always_faulty_leave_the_others_as_they_were(
    spec: Any, federation: Any, server_data: Any
) -> None:
    faulty = [Faulty(Drifting(f"x-{kind}", 10 + i), kind) for i, kind in enumerate(FAULTS)]
    one = federate(Federation([*drifting(), *faulty], federation.anchor, make_step(spec), server_data), 3)
    two = federate(Federation(drifting(), federation.anchor, make_step(spec), server_data), 3)
    assert same(one.weights, two.weights)
    assert all(len(record["rejected"]) == len(FAULTS) for record in one.records)


class Flaky(Drifting):
    """Raises the first times that it is asked in a round."""

    def __init__(self, name: str, seed: int, failures: int, number: int = 2) -> None:
        super().__init__(name, seed)
        self.left, self.number = failures, number

    def fit(self, weights: Any, round: int) -> Reply:
        if round == self.number and self.left > 0:
            self.left -= 1
            raise ConnectionError("no line")
        return super().fit(weights, round)


def test_a_round_with_too_few_replies_is_repeated_and_then_goes_on(tmp_path: Path) -> None:
    def clients(failures: int) -> list[Any]:
        return [*drifting(2), Flaky("red", 2, failures)]

    screening = Screening(minimum=3, attempts=3)
    history = federate(Federation(clients(2), small(), make_step("fedadam"), screening=screening), 3, tmp_path)
    assert history.status == "finished"
    assert [(r["round"], r["attempt"], r["repeat"]) for r in history.records] == [
        (1, 1, False),
        (2, 1, True),
        (2, 2, True),
        (2, 3, False),
        (3, 1, False),
    ]
    assert history.records[1]["rejected"] == [
        {"client": "red", "reason": "failed", "detail": "ConnectionError: no line"}
    ]
    assert len(lines(tmp_path)) == 6
    calm = federate(Federation(clients(0), small(), make_step("fedadam"), screening=screening), 3)
    assert same(history.weights, calm.weights)


def test_a_run_that_stops_keeps_what_was_reached_and_can_be_resumed(tmp_path: Path) -> None:
    def federation(failures: int) -> Federation:
        clients = [*drifting(2), Flaky("red", 2, failures, number=3)]
        return Federation(clients, small(), make_step("fedadam"), screening=Screening(minimum=3, attempts=2))

    stopped = federate(federation(99), 4, tmp_path)
    assert stopped.status == "stopped"
    assert stopped.state.round == 2
    assert "round 3 had 2 acceptable replies in each of 2 attempts, and needs 3 (red: failed)" in stopped.message
    assert same(dict(stopped.weights), dict(federate(federation(0), 2).weights))
    assert same(load_file(tmp_path / "model.safetensors"), dict(stopped.weights))
    resumed = federate(federation(0), 4, tmp_path, resume=True)
    assert resumed.status == "finished"
    assert same(resumed.weights, federate(federation(0), 4).weights)


def test_clients_join_leave_and_miss_rounds() -> None:
    clients = [
        Drifting("a", 0),
        Membership(Drifting("b", 1), joins=2),
        Membership(Drifting("c", 2), leaves=3),
        Membership(Drifting("d", 3), absent={2, 4}),
    ]
    history = federate(Federation(clients, small(), make_step("fedavg")), 4)
    assert [record["accepted"] for record in history.records] == [
        ["a", "c", "d"],
        ["a", "b", "c"],
        ["a", "b", "d"],
        ["a", "b"],
    ]
    nobody = federate(Federation([Membership(Drifting("b", 1), joins=2)], small(), make_step("fedavg")), 2)
    assert nobody.status == "stopped"
    assert "(no replies)" in nobody.message


@pytest.mark.parametrize("workers", [2, 7])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    one = federate(Federation(drifting(5), small(), make_step("fedadam")), 3)
    many = federate(Federation(drifting(5), small(), make_step("fedadam")), 3, workers=workers)
    assert same(one.weights, many.weights)
    assert clean(one.records) == clean(many.records)


def test_models_of_half_precision_and_tied_tensors_run_and_resume(tmp_path: Path) -> None:
    start = small(torch.bfloat16)
    start["tied"] = start["w"]
    start["turned"] = torch.arange(6.0).reshape(2, 3).T
    federation = Federation(drifting(), start, make_step("fedadam"))
    straight = federate(federation, 3, tmp_path / "straight")
    federate(federation, 3, tmp_path / "run", callback=stop_after(1))
    resumed = federate(federation, 3, tmp_path / "run", resume=True)
    assert same(resumed.weights, straight.weights)
    assert resumed.weights["w"].dtype == torch.bfloat16
    assert torch.equal(resumed.weights["n"], start["n"])
    assert same(dict(resumed.state.origin), start)


def test_the_start_is_never_changed() -> None:
    start = small()
    federate(Federation(drifting(), start, make_step("fedavgm")), 3)
    assert same(start, small())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "other"}, 'protocol differ .*"custom" and is "other"'),
        ({"seed": 9}, "seed differ"),
        ({"step": make_step("fednova")}, "step differ"),
        ({"clients": drifting(2)}, "clients differ"),
        ({"start": {n: t + 1 for n, t in small().items()}}, "start_model differ"),
        ({"settings": {"images": 20}}, "settings differ"),
    ],
)
def test_resuming_another_federation_names_what_differs(change: Any, message: str, tmp_path: Path) -> None:
    given = {"clients": drifting(), "start": small(), "step": make_step("fedavg")}
    federate(Federation(**given), 1, tmp_path)  # type: ignore[arg-type]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FederationError, match=message):
        federate(Federation(**{**given, **change}), 2, tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_use_is_not_begun_anew_and_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    federation = Federation(drifting(), small(), make_step("fedavg"))
    done = federate(federation, 2, tmp_path)
    with pytest.raises(FederationError, match=r"holds a federation already. Go on with it \(resume\)"):
        federate(federation, 2, tmp_path)
    calls = [client.calls for client in federation.clients]  # type: ignore[attr-defined]
    again = federate(federation, 2, tmp_path, resume=True)
    assert again.status == "finished"
    assert same(again.weights, done.weights)
    assert calls == [client.calls for client in federation.clients]  # type: ignore[attr-defined]
    longer = federate(federation, 3, tmp_path, resume=True)
    assert same(longer.weights, federate(federation, 3).weights)
    assert lines(tmp_path)[0]["rounds"] == 3


@pytest.mark.parametrize("name", ["state.safetensors", "origin.safetensors"])
def test_damaged_files_of_a_run_are_named(name: str, tmp_path: Path) -> None:
    federation = Federation(drifting(), small(), make_step("fedavg"))
    federate(federation, 1, tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(FederationError, match=name):
        federate(federation, 2, tmp_path, resume=True)
    if name == "origin.safetensors":
        (tmp_path / name).unlink()
        with pytest.raises(FederationError, match=name):
            federate(federation, 2, tmp_path, resume=True)


def test_ctrl_c_and_a_callback_end_a_run_that_can_go_on(tmp_path: Path) -> None:
    class Interrupting(Drifting):
        def fit(self, weights: Any, round: int) -> Reply:
            if round == 2 and self.calls == 1:
                self.calls += 1
                raise KeyboardInterrupt
            return super().fit(weights, round)

    federation = Federation([*drifting(2), Interrupting("red", 2)], small(), make_step("fedavg"))
    broken = federate(federation, 3, tmp_path)
    assert (broken.status, broken.state.round) == ("interrupted", 1)
    resumed = federate(federation, 3, tmp_path, resume=True)
    assert same(resumed.weights, federate(Federation(drifting(), small(), make_step("fedavg")), 3).weights)


def test_progress_tells_of_clients_and_merging(whole: Any) -> None:
    told: list[tuple[str, int, int]] = []
    federate(whole(SOLVING), 1, progress=lambda *line: told.append(line))
    assert told[:3] == [("round 1: blue", 1, 3), ("round 1: green", 2, 3), ("round 1: red", 3, 3)]
    assert {line[0] for line in told[3:]} == {"merging"}
    assert all(1 <= done <= total for _, done, total in told)


def test_federations_that_cannot_be_are_refused(federation: Any) -> None:
    step, start = make_step("fedavg"), small()
    with pytest.raises(FederationError, match="needs clients, and there are none"):
        Federation([], start, step)
    with pytest.raises(FederationError, match="two clients are called 'blue'"):
        Federation([Drifting("blue", 0), Drifting("x", 1), Drifting("blue", 2)], start, step)
    with pytest.raises(FederationError, match=r"needs 4 replies \(minimum\), and there are 3 clients"):
        Federation(drifting(), start, step, screening=Screening(minimum=4))
    with pytest.raises(FederationError, match="needs inputs at the server"):
        Federation(drifting(), federation.anchor, make_step("rows"))
    for rounds in (0, -1, 1.5, True):
        with pytest.raises(FederationError, match="number of rounds must be an integer"):
            federate(Federation(drifting(), start, step), rounds)  # type: ignore[arg-type]


def test_trained_clients_learn_and_a_resumed_run_with_kept_replies_is_the_same(
    federation: Any, server_data: Any, tmp_path: Path
) -> None:
    def evaluate(weights: Any) -> Accuracy:
        found = scores(federation.model, weights, federation.tests)
        return Accuracy({task: 100 * share for task, share in found.items()})

    def made(cache: Path | None) -> Federation:
        kept = None if cache is None else UpdateCache(cache)
        clients = federation.clients(cache=kept)
        return Federation(clients, federation.anchor, make_step("rows"), server_data, evaluate)

    straight = federate(made(None), 2)
    federate(made(tmp_path / "cache"), 2, tmp_path / "run", callback=stop_after(1))
    resumed = federate(made(tmp_path / "cache"), 2, tmp_path / "run", resume=True)
    assert same(resumed.weights, straight.weights)
    again = made(tmp_path / "cache")
    assert same(federate(again, 2).weights, straight.weights)
    assert again.clients[0].cache.hits == 6  # type: ignore[attr-defined]
    assert straight.records[-1]["mean"] > straight.header["start"]["mean"] + 20


def test_an_error_of_the_step_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    """Krum needs three models; with one client away in round 2 its message ends the run, and what was reached stays."""

    def made(failures: int) -> Federation:
        clients = [*drifting(2), Flaky("red", 2, failures)]
        return Federation(clients, small(), make_step({"name": "krum", "byzantine": 0}))

    with pytest.raises(OptionError, match=r"Krum .* needs"):
        federate(made(1), 3, tmp_path)
    assert [record["round"] for record in read_rounds(tmp_path / "rounds.jsonl")[1]] == [1]
    resumed = federate(made(0), 3, tmp_path, resume=True)
    assert same(resumed.weights, federate(made(0), 3).weights)


def test_equal_models_are_equal_to_the_bit() -> None:
    a = small()
    assert same(a, {n: t.clone() for n, t in a.items()})
    assert not same(a, {**a, "b": a["b"] + 1e-7})
    assert not same(a, {n: t for n, t in a.items() if n != "n"})
