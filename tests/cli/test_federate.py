"""The federate command: on the tiny module federation where that is enough, on the zoo where it is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mergesolve.cli.federating
import numpy as np
import open_clip
import pytest
import torch
import yaml
from mergesolve.cli.federate import read_recipe
from mergesolve.cli.federating import FederationSetup
from mergesolve.cli.protocol import PROTOCOLS, federation_recipe
from mergesolve.federated import FAULTS
from PIL import Image
from safetensors.torch import load_file, save_file

from .conftest import NAMES

TINY_ZOO = (
    "--images", 32, "--server-images", 10, "--reference", 1,
    "--set", "evaluation.images=10", "--set", "evaluation.reference=1", "--rounds", 1, "--no-figures",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _updates(tmp_path, monkeypatch):
    """Updates of clients are kept in the test's own folder; so that the zoo is found, its cache stays."""
    monkeypatch.setattr(mergesolve.cli.federating, "cache_folder", lambda: tmp_path / "updates")


@pytest.fixture
def _cache(tmp_path, monkeypatch):
    """For processes of their own."""
    monkeypatch.setenv("MERGESOLVE_CACHE", str(tmp_path / "cache"))


def data(tiny, name, **over):
    return {"name": name, "npz": f"{tiny}/{name}_train.npz", "test": f"{tiny}/{name}_test.npz", **over}


def fields(tiny, **over):
    """The tiny federation: a module, three clients with 30 samples each, of which the server holds 6."""
    found = {
        "base": f"{tiny}/base.safetensors",
        "model": {"module": f"{tiny}/net.py:mlp"},
        "clients": [{"name": name, "data": data(tiny, name)} for name in NAMES],
        "rounds": 2,
        "training": {"epochs": 1, "batch": 16, "lr": 1e-2},
        "server": {"images": 6, "reference": 0},
    }
    for key, value in over.items():
        found[key] = {**found[key], **value} if isinstance(found.get(key), dict) else value
    return found


@pytest.fixture
def recipe(tiny, run):
    """Write the tiny federation with changes; returns the file (the working folder is the test's own)."""

    def write(**over):
        Path("f.yaml").write_text(yaml.safe_dump(fields(tiny, **over)))
        return "f.yaml"

    return write


@pytest.fixture
def one(tiny):
    """The clients, with changes in the last one and its data."""

    def clients(_data=None, **over):
        found = fields(tiny)["clients"]
        found[-1] = {**found[-1], **over}
        found[-1]["data"] |= _data or {}
        return found

    return clients


def refused(result, *words, code=2):
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    assert "defect" not in result.stderr
    for word in words:
        assert word in result.stderr, f"{word!r} is not in: {result.stderr}"


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()][1:]


def started(*arguments, stderr=subprocess.PIPE, **variables):
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MERGESOLVE_CACHE": str(Path("cache").resolve()), **variables}
    # A job in the background of a shell is started with Ctrl-C switched off, and hands that on.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listening}; from mergesolve.cli import main; main()"
    command = [sys.executable, "-c", program, "federate", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=stderr, stdout=subprocess.PIPE, text=True)


def assert_same_model(a, b):
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# What it writes and prints


def test_a_run_leaves_recipe_trace_state_model_and_figures(recipe, run):
    result = run("federate", recipe(), "--run", "r")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""  # what is told while it runs is no result
    assert "round 1/2: clients" in result.stderr
    assert "round 2/2: clients" in result.stderr
    assert "r: finished; figures in r/figures" in result.stderr
    assert {path.name for path in Path("r").iterdir()} == {
        "federation.yaml", "rounds.jsonl", "state.safetensors", "origin.safetensors", "model.safetensors", "figures",
    }  # fmt: skip
    assert any(Path("r/figures").glob("*.png"))
    assert [record["round"] for record in records("r")] == [1, 2]


def test_the_average_of_the_clients_is_that_of_what_they_sent(recipe, run, tiny):
    assert run("federate", recipe(), "--rounds", 1, "--run", "r", "--no-figures").exit_code == 0
    sent = [load_file(path) for path in Path("updates").iterdir()]
    assert len(sent) == 3
    for name, tensor in load_file("r/model.safetensors").items():
        mean = np.mean([update[f"weights/{name}"].double().numpy() for update in sent], axis=0)
        np.testing.assert_allclose(tensor.numpy(), mean, atol=1e-6)


def test_json_is_everything_and_alone_on_stdout(recipe, run):
    result = run("federate", recipe(), "--run", "r", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["status"] == "finished"
    assert found["folder"] == "r"
    assert found["header"]["clients"] == list(NAMES)
    assert found["header"]["step"] == {"name": "fedavg", "by": "uniform"}
    assert found["records"] == records("r")
    assert all(Path(path).is_file() for path in found["figures"])


def test_the_recipe_that_was_written_gives_the_same_model_from_anywhere(recipe, run, monkeypatch):
    assert run("federate", recipe(), "--step", "ties:density=0.5", "--run", "r", "--no-figures").exit_code == 0
    written = Path("r/federation.yaml").resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = run("federate", written, "--run", "again", "--no-figures")
    assert again.exit_code == 0, again.stderr
    assert_same_model("again", written.parent)


def test_runs_get_their_own_folders(recipe, run):
    for expected in ("runs/federate-ties", "runs/federate-ties-2"):
        result = run("federate", recipe(rounds=1), "--step", "ties", "--no-figures", "--json")
        assert json.loads(result.stdout)["folder"] == expected


def test_help_fits_a_terminal_and_every_example_is_taken(run):
    text = run("federate", "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    examples = [line.split()[2:] for line in text.splitlines() if line.strip().startswith("mergesolve federate")]
    assert len(examples) >= 5
    for example in examples:
        broken = run("federate", *example, "--rounds", 0)
        refused(broken)
        assert any(word in broken.stderr for word in ("'rounds' must be at least 1", "no such file", "federation.yaml"))


@pytest.mark.usefixtures("_cache")
def test_on_a_terminal_rounds_stand_on_lines_of_their_own(recipe):
    file = recipe(rounds=2, training={"epochs": 20})
    ours, theirs = os.openpty()
    with started(file, "--run", "r", "--no-figures", stderr=theirs, TERM="xterm", COLUMNS="100") as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # the end, on Linux
            pass
    os.close(ours)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line for line in re.split(r"[\r\n]+", plain) if "step" in line]
    assert [line[:19] for line in lines] == ["round 1/2: clients ", "round 2/2: clients "]
    assert "━" in plain  # the progress line was there


def test_steps_and_protocols_are_listed(run):
    found = json.loads(run("list", "steps", "--json").stdout)["steps"]
    assert {"fedavg", "fedadam", "rows-bound", "fw-federated"} <= {entry["name"] for entry in found}
    assert all(entry["summary"] for entry in found)
    found = json.loads(run("list", "protocols", "--json").stdout)["protocols"]
    assert [entry["name"] for entry in found] == list(PROTOCOLS)
    assert "continual-clip" in run("list", "protocols").stdout


# Data


def test_the_server_holds_samples_that_nobody_trains_on(tiny):
    setup = FederationSetup(federation_recipe(fields(tiny)))
    for client in setup.clients:
        whole = np.load(tiny / f"{client.name}_train.npz")["inputs"]
        mine = {row.tobytes() for row in client.task.inputs.numpy()}
        held = {row.tobytes() for row in setup.data.tasks[client.name].inputs.numpy()}
        assert not mine & held
        assert mine | held == {row.tobytes() for row in whole}
        assert len(held) == 6


def test_samples_of_a_partition_are_with_one_client_or_the_server(tiny):
    partition = {"task": data(tiny, "red"), "clients": 4, "alpha": 0.3}
    setup = FederationSetup(federation_recipe(fields(tiny, clients=[], partition=partition)))
    parts = [{row.tobytes() for row in client.task.inputs.numpy()} for client in setup.clients]
    parts.append({row.tobytes() for row in setup.data.tasks["red-0"].inputs.numpy()})
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    assert [client.name for client in setup.clients] == ["red-0", "red-1", "red-2", "red-3"]


def test_a_task_dealt_out_by_label_is_learned_together(recipe, run, tiny):
    partition = {"task": data(tiny, "red"), "clients": 3, "alpha": 0.3}
    file = recipe(clients=[], partition=partition, training={"lr": 0.05, "epochs": 5})
    result = run("federate", file, "--run", "r", "--no-figures", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found["records"][-1]["accuracy"]) == ["red"]
    assert found["records"][-1]["mean"] > found["header"]["start"]["mean"]


def test_clients_send_fisher_diagonals_when_they_are_asked_to(recipe, run):
    refused(run("federate", recipe(), "--step", "fisher", "--run", "r"), "fisher statistics", "server.client_fisher")
    assert not Path("r").exists()
    result = run("federate", recipe(server={"client_fisher": 8}), "--step", "fisher", "--run", "r", "--no-figures")
    assert result.exit_code == 0, result.stderr
    assert run("federate", recipe(), "--run", "plain", "--no-figures").exit_code == 0
    assert records("r")[0]["distance"] != records("plain")[0]["distance"]


def test_retention_by_fisher_holds_its_bound(recipe, run, tiny):
    server = {"reference": 10, "reference_data": data(tiny, "blue"), "fisher": 10}
    arguments = ("--step", "anchored", "--set", "step.retention.by=fisher", "--no-figures")
    bound = 1e-5
    result = run(
        "federate", recipe(server=server), *arguments, "--set", f"step.retention.bound={bound}", "--run", "r", "--json"
    )
    assert result.exit_code == 0, result.stderr
    for record in json.loads(result.stdout)["records"]:
        assert record["method"]["reference_loss"] <= bound * (1 + 1e-6)
        assert record["reference"] is not None
    refused(run("federate", recipe(), *arguments, "--run", "s"), "Fisher", "fisher")


def test_clients_come_go_and_miss_rounds(recipe, run, one, tiny):
    clients = one(joins=2, leaves=4)
    clients[0]["absent"] = [1, 4]
    assert run("federate", recipe(clients=clients, rounds=4), "--run", "r", "--no-figures").exit_code == 0
    assert [record["accepted"] for record in records("r")] == [
        ["green"], ["blue", "green", "red"], ["blue", "green", "red"], ["green"],
    ]  # fmt: skip


def test_only_some_clients_of_a_recipe(recipe, run):
    result = run("federate", recipe(rounds=1), "--client", "red", "--run", "r", "--no-figures", "--json")
    assert json.loads(result.stdout)["header"]["clients"] == ["red"]


CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_clips_own_data_are_classified_among_the_classes_of_all(run):
    """Equal classes of two clients are one: as two columns of the head they would tie."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**CLIP)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, "base.safetensors")
    classes = {"a": ["fox", "owl"], "b": ["fox", "owl"], "c": ["cat", "dog", "eel"]}
    rng = np.random.default_rng(0)
    for name, texts in classes.items():
        images = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
        np.savez(f"{name}.npz", images=images, labels=np.arange(12) % len(texts), classes=texts)
    for folder in ("n01", "n02", "n03"):
        (Path("reference") / folder).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f"reference/{folder}/1.png")
    reference = {"name": "ImageNet", "folder": "reference", "test": "reference", "classes": "classes.txt"}
    Path("f.yaml").write_text(
        yaml.safe_dump(
            {
                "base": "base.safetensors",
                "model": {"architecture": CLIP},
                "clients": [{"name": n, "data": {"name": n, "npz": f"{n}.npz", "test": f"{n}.npz"}} for n in classes],
                "rounds": 1,
                "training": {"epochs": 1, "lr": 1e-3},
                "server": {"images": 2, "reference": 3, "reference_data": reference},
            }
        )
    )
    Path("classes.txt").write_text("n01\towl\nn02\tcat\nn04\tyak\n")
    refused(run("federate", "f.yaml", "--step", "rows-bound", "--run", "r"), "reference", "n04")
    assert not Path("r").exists()
    Path("classes.txt").write_text("n01\towl\nn02\tcat\nn03\tyak\n")
    result = run("federate", "f.yaml", "--step", "rows-bound", "--set", "step.max_iter=3", "--run", "r", "--no-figures")
    assert result.exit_code == 0, result.stderr
    assert list(records("r")[0]["accuracy"]) == ["a", "b", "c"]
    assert records("r")[0]["reference"] is not None

    flags = dict.fromkeys(("protocol", "step", "rounds", "seed", "images", "server_images", "labels", "reference"))
    setup = FederationSetup(read_recipe("f.yaml", None, {**flags, "clients": (), "faults": (), "sets": ()}))
    a, b, c = (client.task for client in setup.clients)
    assert a.classes == b.classes == c.classes == ("fox", "owl", "cat", "dog", "eel")
    assert set(a.labels.tolist()) == set(b.labels.tolist()) == {0, 1}
    assert set(c.labels.tolist()) == {2, 3, 4}


# Faults


def test_every_fault_in_one_run_is_named_and_the_run_finishes(recipe, run, tiny):
    names = {"dropout": 1, "crash": 1, "nonfinite": 2, "shape": 1, "missing": 3, "huge": 2, "stale": 2, "late": 3}
    reasons = {
        "dropout": "failed", "crash": "failed", "nonfinite": "nonfinite", "shape": "shape", "missing": "names",
        "huge": "norm", "stale": "repeated", "late": "late",
    }  # fmt: skip
    assert names.keys() == FAULTS.keys()
    clients = [{"name": n, "data": data(tiny, NAMES[k % 3])} for k, n in enumerate([*names, "good", "better"])]
    faults = [flag for kind, number in names.items() for flag in ("--fault", f"{kind}={kind}@{number}")]
    result = run("federate", recipe(clients=clients, rounds=3), *faults, "--run", "r", "--no-figures")
    assert result.exit_code == 0, result.stderr
    found = [{left["client"]: left["reason"] for left in record["rejected"]} for record in records("r")]
    assert found == [{kind: reasons[kind] for kind, n in names.items() if n == number} for number in (1, 2, 3)]
    for kind, reason in reasons.items():
        assert f"left out {kind}: {reason} (" in result.stderr


def test_a_run_that_too_few_answer_stops_and_goes_on(recipe, run, one):
    minimum = {"screening": {"minimum": 3, "attempts": 2}}
    file = recipe(clients=one(fault={"kind": "crash", "rounds": [2]}), rounds=3, **minimum)
    result = run("federate", file, "--run", "r", "--no-figures")
    assert result.exit_code == 1
    assert "round 2/3: too few replies" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: the federation stopped: round 2 had 2 acceptable replies")
    assert "--resume r" in result.stderr
    assert [(record["round"], record["attempt"]) for record in records("r")] == [(1, 1), (2, 1), (2, 2)]


# Mistakes

WRONG_FLAGS = {
    "no file": (["nowhere.yaml"], ["nowhere.yaml", "no such file"]),
    "option": (["f.yaml", "--stp", "ties"], ["--stp", "--step"]),
    "protocol": (["f.yaml", "--protocol", "continual"], ["unknown protocol", "'continual-clip'?"]),
    "empty protocol": (["f.yaml", "--protocol", ""], ["unknown protocol ''", "continual-clip"]),
    "step": (["f.yaml", "--step", "fedavgg"], ["fedavgg", "Did you mean 'fedavg'?", "rows-bound"]),
    "empty step": (["f.yaml", "--step", ""], ["server step", "fedavg"]),
    "option of a step": (["f.yaml", "--step", "ties:densty=0.2"], ["densty", "Did you mean 'density'?"]),
    "value of a step": (["f.yaml", "--step", "ties:density=2"], ["density", "(0, 1]", "2"]),
    "step without a value": (["f.yaml", "--step", "ties:density"], ["--step 'ties:density'", "KEY=VALUE"]),
    "step that cannot be": (["f.yaml", "--step", "krum:byzantine=5"], ["byzantine=5", "at most 0"]),
    "solver of a step": (["f.yaml", "--step", "rows", "--set", "step.solver=nope"], ["nope", "frank-wolfe"]),
    "bound": (["f.yaml", "--step", "rows-bound", "--set", "step.retention.bound=-1"], ["bound", "-1"]),
    "client": (["f.yaml", "--client", "rde"], ["--client", "rde", "Did you mean 'red'?", "blue"]),
    "fault": (["f.yaml", "--fault", "red=hug"], ["client 'red'", "hug", "Did you mean 'huge'?", "stale"]),
    "client of a fault": (["f.yaml", "--fault", "rde=huge"], ["--fault", "rde", "Did you mean 'red'?"]),
    "fault of nobody": (["f.yaml", "--fault", "red"], ["--fault 'red'", "CLIENT=KIND"]),
    "round of a fault": (["f.yaml", "--fault", "red=huge@x"], ["--fault 'red=huge@x'", "red=huge@2,3"]),
    "round without a number": (["f.yaml", "--fault", "red=huge@"], ["--fault 'red=huge@'", "red=huge@2,3"]),
    "fault that never comes": (["f.yaml", "--fault", "red=huge@9"], ["--fault 'red=huge@9'", "1 to 2"]),
    "no rounds": (["f.yaml", "--rounds", "0"], ["'rounds' must be at least 1"]),
    "text for a number": (["f.yaml", "--rounds", "two"], ["--rounds", "two"]),
    "no samples": (["f.yaml", "--images", "-5"], ["'images' must be at least 1", "-5"]),
    "seed": (["f.yaml", "--seed", "-1"], ["'seed' must be at least 0"]),
    "learning rate": (["f.yaml", "--set", "training.lr=-1"], ["lr", "-1"]),
    "field": (["f.yaml", "--set", "training.lrr=1"], ["lrr", "Did you mean 'lr'?"]),
    "set": (["f.yaml", "--set", "training.lr"], ["--set 'training.lr'", "KEY=VALUE"]),
    "set no YAML": (["f.yaml", "--set", "training.lr={"], ["--set 'training.lr={'", "not YAML"]),
    "backend": (["f.yaml", "--set", "backend=stream"], ["backend", "Did you mean 'streaming'?"]),
    "workers": (["f.yaml", "--workers", "0"], ["--workers must be at least 1"]),
    "minimum": (["f.yaml", "--set", "screening.minimum=4"], ["needs 4 replies", "3 clients", "Lower the minimum"]),
    "objective without data": (["f.yaml", "--server-images", "0", "--step", "rows"], ["needs inputs", "fedavg"]),
    "labels": (["f.yaml", "--step", "fw-hard"], ["'fw-hard'", "needs labels", "distillation"]),
    "federated oracle": (["f.yaml", "--step", "fw-federated"], ["fw-federated", "labels"]),
    "reference": (["f.yaml", "--step", "rows-bound"], ["reference inputs", "euclidean"]),
    "grams": (["f.yaml", "--step", "regmean"], ["gram statistics", "choose another step"]),
    "too many held": (["f.yaml", "--server-images", "30"], ["30 samples of 'blue'", "--server-images"]),
    "only": (["f.yaml", "--only", "average"], ["--only", "--study"]),
    "step of a study": (["f.yaml", "--study", "--only", "averge"], ["averge", "Did you mean 'average'?"]),
    "step for a study": (["f.yaml", "--study", "--step", "ties"], ["--step", "--only"]),
    "seeds": (["f.yaml", "--study", "--seeds", "0"], ["--seeds", "at least 1"]),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_a_wrong_flag_is_named_with_what_is_valid(name, recipe, run):
    recipe()
    flags, words = WRONG_FLAGS[name]
    refused(run("federate", *flags, "--run", "r"), *words)
    assert not Path("r").exists()


WRONG_FILES = {
    "no labels": ("npz", {"labels": None}, ["client 'red'", "no labels"]),
    "no labels to test": ("test", {"labels": None}, ["'red'", "no labels"]),
    "labels outside": ("npz", {"labels": np.full(30, 7)}, ["'red'", "label 7", "3 classes"]),
    "other classes to test": ("test", {"classes": list("abcd")}, ["'red'", "expected logits"]),
    "other shape to test": ("test", {"inputs": np.zeros((30, 4), "f4")}, ["'red'", "[30, 4]"]),
    "nothing": ("npz", {"inputs": np.zeros((0, 6), "f4"), "labels": np.zeros(0, "i8")}, ["'red'", "empty"]),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_data_that_do_not_fit_are_named(name, recipe, one, run, tiny):
    field, change, words = WRONG_FILES[name]
    arrays = {**np.load(tiny / "red_train.npz"), **change}
    np.savez("bad.npz", **{key: value for key, value in arrays.items() if value is not None})
    refused(run("federate", recipe(clients=one({field: "bad.npz"})), "--run", "r"), *words)
    assert not Path("r").exists()


def test_recipes_that_cannot_be_read_or_lack_something(recipe, run, one, tiny):
    for content, words in (
        (b"clients: [a", ["f.yaml", "line 1", "not YAML"]),
        (b"- a", ["f.yaml", "mapping"]),
        (b"\xff\xfe", ["f.yaml", "not a text file"]),
    ):
        Path("f.yaml").write_bytes(content)
        refused(run("federate", "f.yaml", "--run", "r"), *words)
    for change, words in (
        ({"clients": []}, ["no clients", "--protocol continual-clip", "--client"]),
        ({"clients": 3}, ["'clients' must be a list"]),
        ({"clients": ["red"]}, ["'red' names no data", "npz"]),
        ({"clients": one({"test": None})}, ["'red' has no data to evaluate on", "test: PATH"]),
        ({"clients": one({"npz": "nowhere.npz"})}, ["nowhere.npz"]),
        ({"base": None}, ["no base", "base: PATH"]),
        ({"base": "nowhere.safetensors"}, ["nowhere.safetensors"]),
        ({"model": {"module": "nowhere.py:mlp"}}, ["no Python file 'nowhere.py'"]),
        ({"clients": [], "partition": {"task": data(tiny, "red"), "alpha": 0.0}}, ["alpha", "above 0"]),
        ({"clients": [], "partition": {"task": data(tiny, "red"), "clients": 50}}, ["24 samples", "at most 24"]),
    ):
        refused(run("federate", recipe(**change), "--run", "r"), *words)
        assert not Path("r").exists()


def test_what_fails_in_the_first_round_leaves_other_files_alone(recipe, run):
    Path("r").mkdir()
    Path("r/note.txt").write_text("mine")
    refused(run("federate", recipe(), "--step", "krum:byzantine=5", "--run", "r"), "byzantine")
    assert [path.name for path in Path("r").iterdir()] == ["note.txt"]
    assert run("federate", recipe(), "--run", "r", "--no-figures").exit_code == 0


def test_a_folder_that_is_taken_is_not_written_to(recipe, run):
    file = recipe(rounds=1)
    assert run("federate", file, "--run", "r", "--no-figures").exit_code == 0
    before = {path.name: path.read_bytes() for path in Path("r").iterdir()}
    refused(run("federate", file, "--run", "r"), "'r' holds a federation already", "--resume r")
    refused(run("federate", file, "--study", "--run", "r"), "'r' holds a federation, no study")
    assert {path.name: path.read_bytes() for path in Path("r").iterdir()} == before
    Path("file").write_text("")
    refused(run("federate", file, "--run", "file"), "'file' is a file")
    refused(run("federate", file, "--study", "--run", "file"), "'file' is a file")


# Going on


def test_more_rounds_go_on_where_the_run_ended(recipe, run):
    file = recipe(rounds=1, step="fedadam")
    assert run("federate", file, "--run", "r", "--no-figures").exit_code == 0
    assert run("federate", "--resume", "r", "--rounds", 3, "--no-figures").exit_code == 0
    assert run("federate", file, "--rounds", 3, "--run", "whole", "--no-figures").exit_code == 0
    assert_same_model("r", "whole")
    assert [record["round"] for record in records("r")] == [1, 2, 3]
    assert yaml.safe_load(Path("r/federation.yaml").read_text())["rounds"] == 3


def edit(**over):
    def change(folder):
        found = yaml.safe_load((folder / "federation.yaml").read_text())
        (folder / "federation.yaml").write_text(yaml.safe_dump({**found, **over}))

    return change


def cut(name, end):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


WRONG_RESUMES = {
    "another step": (edit(step={"name": "ties"}), [], ["belongs to another federation", "step", "fedavg"]),
    "another protocol": (edit(protocol="continual-clip"), [], ["belongs to another federation", "protocol"]),
    "another training": (edit(training={"lr": 0.5}), [], ["belongs to another federation", "settings"]),
    "recipe broken": (lambda folder: (folder / "federation.yaml").write_text("a: ["), [], ["not YAML"]),
    "recipe gone": (lambda folder: (folder / "federation.yaml").unlink(), [], ["holds no federation.yaml"]),
    "state cut": (cut("state.safetensors", 100), [], ["state.safetensors", "no readable state"]),
    "state empty": (cut("state.safetensors", 0), [], ["state.safetensors", "no readable state"]),
    "state of something else": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "state.safetensors"),
        [],
        ["state.safetensors", "no readable state"],
    ),
    "state gone": (lambda folder: (folder / "state.safetensors").unlink(), [], ["state.safetensors, is gone"]),
    "first model cut": (cut("origin.safetensors", -4), [], ["origin.safetensors", "Put it back"]),
    "first model gone": (lambda folder: (folder / "origin.safetensors").unlink(), [], ["origin.safetensors"]),
    "flag for a step": (lambda _: None, ["--step", "ties"], ["another 'step'", "only --rounds"]),
    "flag for a seed": (lambda _: None, ["--seed", "3"], ["another 'seed'", "only --rounds"]),
    "flag for training": (lambda _: None, ["--images", "3"], ["another 'training'", "only --rounds"]),
    "flag for clients": (lambda _: None, ["--client", "red"], ["another 'clients'", "only --rounds"]),
    "a fault": (lambda _: None, ["--fault", "red=huge@2"], ["another 'clients'", "only --rounds"]),
    "a protocol": (lambda _: None, ["--protocol", "label-skew"], ["leave the recipe file and --protocol out"]),
    "a recipe": (lambda _: None, ["f.yaml"], ["leave the recipe file and --protocol out"]),
    "a folder": (lambda _: None, ["--run", "s"], ["leave --run out"]),
    "a study": (lambda _: None, ["--study"], ["--resume is for one run"]),
}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of one round; not to be written to."""
    from click.testing import CliRunner
    from mergesolve.cli import main

    folder = tmp_path_factory.mktemp("federation")
    (folder / "f.yaml").write_text(yaml.safe_dump(fields(tiny, rounds=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mergesolve.cli.federating, "cache_folder", lambda: folder / "updates")
        result = CliRunner().invoke(main, ["federate", f"{folder}/f.yaml", "--run", f"{folder}/r", "--no-figures"])
    assert result.exit_code == 0, result.output
    return folder / "r"


@pytest.mark.parametrize("name", WRONG_RESUMES)
def test_a_run_that_cannot_go_on_is_left_as_it_is(name, finished, run):
    spoil, flags, words = WRONG_RESUMES[name]
    shutil.copytree(finished, "r")
    shutil.copy(finished.parent / "f.yaml", "f.yaml")
    spoil(Path("r"))
    before = {path.name: path.read_bytes() for path in Path("r").iterdir()}
    refused(
        run("federate", "--resume", "r", *(["--rounds", 2] if not flags or "--fault" in flags else []), *flags), *words
    )
    assert {path.name: path.read_bytes() for path in Path("r").iterdir()} == before


def test_folders_without_a_federation_cannot_be_resumed(run):
    Path("empty").mkdir()
    for folder in ("nowhere", "empty"):
        refused(run("federate", "--resume", folder), folder, "holds no federation.yaml")


def test_lost_records_are_told(finished, run):
    shutil.copytree(finished, "r")
    Path("r/rounds.jsonl").unlink()
    result = run("federate", "--resume", "r", "--rounds", 2, "--no-figures")
    assert result.exit_code == 0
    assert "Warning: r/rounds.jsonl has no records of rounds 1, which were done." in result.stderr


def stop(process, trace, rounds, how):
    """Send a signal once the trace has records of that many rounds; returns what the process told."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if trace.exists() and trace.read_bytes().count(b"\n") > rounds:
            process.send_signal(how)
            break
        time.sleep(0.005)
    _, told = process.communicate(timeout=120)
    return told


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_run_that_was_stopped_gives_the_model_of_an_uninterrupted_one(how, recipe, run):
    file = recipe(rounds=6, training={"epochs": 40, "batch": 4, "lr": 1e-3}, step="fedadam")
    with started(file, "--run", "stopped", "--no-figures") as process:
        told = stop(process, Path("stopped/rounds.jsonl"), 2, how)
        assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), told
    if how == signal.SIGINT:
        assert told.splitlines()[-1].startswith("Error: interrupted after round")
        assert "--resume stopped" in told
    assert "Traceback" not in told
    assert len(records("stopped")) < 6
    resumed = run("federate", "--resume", "stopped", "--no-figures")
    assert resumed.exit_code == 0, resumed.stderr
    assert run("federate", file, "--run", "whole", "--no-figures").exit_code == 0
    assert_same_model("stopped", "whole")
    assert [record["round"] for record in records("stopped")] == [1, 2, 3, 4, 5, 6]


# The study


@pytest.mark.usefixtures("_cache")
def test_a_study_is_killed_goes_on_and_refuses_other_settings(recipe, run, tiny):
    reference = {"reference": 10, "reference_data": data(tiny, "blue")}
    file = recipe(rounds=5, training={"epochs": 20, "batch": 4, "lr": 1e-3}, server=reference)
    study = ("--study", "--only", "average", "--only", "ties", "--seeds", 1, "--run", "st")
    with started(file, *study) as process:
        stop(process, Path("st/average/seed-0/rounds.jsonl"), 2, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    done = records("st/average/seed-0")
    result = run("federate", file, *study)
    assert result.exit_code == 0, result.stderr
    assert "[2/2] ties, seed-0: clients" in result.stderr
    assert records("st/average/seed-0")[: len(done) - 1] == done[:-1]  # the last one may be of a round not committed
    assert {path.name for path in Path("st").iterdir()} == {
        "study.json", "average", "ties", "accuracy.md", "dominance.md", "cost.md", "figures",
    }  # fmt: skip
    assert {"accuracy.png", "frontier.png", "cost.png"} <= {path.name for path in Path("st/figures").iterdir()}
    assert "| ties |" in Path("st/accuracy.md").read_text().replace("*", "")
    assert run("federate", file, "--run", "alone", "--no-figures").exit_code == 0
    assert_same_model("alone", "st/average/seed-0")

    plan = Path("st/study.json").read_bytes()
    refused(run("federate", file, *study, "--images", 5), "'st' holds a study with another 'training'", "--run")
    refused(run("federate", file, "--run", "st"), "'st' holds a study", "--study")
    assert Path("st/study.json").read_bytes() == plan
    again = run("federate", file, *study, "--no-figures", "--json")
    assert again.stderr == ""
    assert [row[0] for row in json.loads(again.stdout)["tables"]["accuracy"]["rows"]] == [
        "zero-shot",
        "average",
        "ties",
    ]
    Path("st/study.json").write_text("{")
    refused(run("federate", file, *study), "study.json", "damaged")


@pytest.mark.usefixtures("_cache")
def test_a_step_that_fails_does_not_keep_the_others_of_a_study_from_running(recipe, run):
    study = ("--study", "--only", "rows", "--only", "average", "--seeds", 1, "--run", "st", "--rounds", 1)
    result = run("federate", recipe(), *study, "--server-images", 0, "--no-figures")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: the server step 'rows' minimizes distillation")
    assert "average" in Path("st/accuracy.md").read_text()
    assert not Path("st/rows").exists() or not any(Path("st/rows").rglob("*.safetensors"))


# The zoo


def test_three_tasks_of_the_zoo(run):
    clients = ("--client", "digits", "--client", "shapes", "--client", "flags")
    faults = ("--fault", "shapes=nonfinite@1")
    result = run("federate", *clients, *faults, *TINY_ZOO, "--run", "r")
    assert result.exit_code == 0, result.stderr
    [record] = records("r")
    assert record["accepted"] == ["digits", "flags"]
    assert list(record["accuracy"]) == ["digits", "shapes", "flags"]
    assert record["reference"] > 90
    assert record["step_length"] > 0


def test_one_task_of_the_zoo_dealt_out_by_label(run):
    arguments = ("--protocol", "label-skew", "--set", "partition.clients=3", "--set", "training.epochs=1")
    result = run("federate", *arguments, *TINY_ZOO, "--run", "r")
    assert result.exit_code == 0, result.stderr
    [record] = records("r")
    assert record["accepted"] == ["uppercase-0", "uppercase-1", "uppercase-2"]
    assert list(record["accuracy"]) == ["uppercase"]


def test_mistakes_with_the_zoo_are_named(run):
    for arguments, words in (
        (("--client", "digts"), ["digts", "Did you mean 'digits'?"]),
        (("--client", "digits", "--step", "fw-hard"), ["needs labels", "'digits'"]),
        (("--client", "digits", "--step", "rows-bound", "--reference", 0), ["reference inputs", "euclidean"]),
        (("--client", "digits", "--set", "server.split=tset"), ["tset", "validation"]),
        (("--protocol", "label-skew", "--set", "partition.task=upercase"), ["upercase", "'uppercase'?"]),
        (("--client", "digits", "--set", "base=base.safetensors"), ["the zoo brings its own base"]),
    ):
        refused(run("federate", *TINY_ZOO, *arguments, "--run", "r"), *words)
        assert not Path("r").exists()
