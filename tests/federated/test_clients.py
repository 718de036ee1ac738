from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError, Reply, TaskClient, Training, UpdateCache, fit_all, train
from mergesolve.federated.clients import digest
from mergesolve.objectives import CLIP, DataError, Task
from mergesolve.objectives.statistics import fisher_diagonal
from safetensors.torch import save
from torch import Tensor

FAST = Training(epochs=2, batch=16, lr=1e-2)


def tensors(reply: Reply) -> dict[str, Tensor]:
    assert isinstance(reply.weights, dict)
    return reply.weights


def same(a: Reply, b: Reply) -> bool:
    """Equal in all but the seconds that they took."""
    fields = [{**vars(r), "weights": None, "fisher": None, "seconds": 0} for r in (a, b)]
    sums = [(digest(tensors(r)), None if r.fisher is None else digest(r.fisher)) for r in (a, b)]
    return fields[0] == fields[1] and sums[0] == sums[1]


class Raises:
    samples = 3

    def __init__(self, name: str, error: BaseException) -> None:
        self.name = name
        self.error = error

    def fit(self, weights: Any, round: int) -> Reply:
        raise self.error


def test_a_client_sends_what_training_gives(federation: Any) -> None:
    client = federation.clients(FAST)[1]
    reply = client.fit(federation.anchor, 3)
    expected, steps = train(federation.model, client.task, federation.anchor, FAST, round=3, client="green")
    assert (reply.client, reply.round, reply.samples, reply.steps, reply.error) == ("green", 3, 60, steps, None)
    assert digest(tensors(reply)) == digest(expected)
    assert reply.metrics["last_loss"] < reply.metrics["first_loss"]
    assert reply.seconds > 0
    assert reply.fisher is None


def test_training_helps_on_the_clients_own_data(federation: Any) -> None:
    for client, test in zip(federation.clients(Training(10, 16, 1e-2)), federation.tests, strict=True):
        reply = client.fit(federation.anchor, 1)
        logits = federation.model.logits(tensors(reply), test.inputs, test)
        assert float((logits.argmax(1) == test.labels).float().mean()) > 0.8


def test_clients_differ_in_order_even_on_the_same_data(federation: Any) -> None:
    one, two = (TaskClient(n, federation.model, federation.tasks[0], FAST) for n in ("a", "b"))
    assert digest(tensors(one.fit(federation.anchor, 1))) != digest(tensors(two.fit(federation.anchor, 1)))


def test_limit_takes_a_balanced_subset_that_stays(federation: Any) -> None:
    client = TaskClient("a", federation.model, federation.tasks[0], FAST, limit=9)
    labels = client.task.labels
    assert client.samples == 9
    assert labels is not None
    assert sorted(labels.tolist()) == sorted(list(labels.unique()) * 3)
    assert client.fit(federation.anchor, 1).samples == 9


def test_fisher_is_the_diagonal_at_the_trained_model(federation: Any) -> None:
    client = federation.clients(FAST, fisher=20)[0]
    reply = client.fit(federation.anchor, 1)
    expected = fisher_diagonal(
        federation.model, tensors(reply), client.task, estimator="sampled", samples=20, seed=FAST.seed
    ).tensors
    assert reply.fisher is not None
    assert digest(reply.fisher) == digest(expected)
    assert set(reply.fisher) == set(federation.anchor) - {"counter"}
    assert all(bool((tensor >= 0).all()) for tensor in reply.fisher.values())


def test_fisher_of_half_precision_is_computed_in_float32(federation: Any) -> None:
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in federation.anchor.items()}
    reply = federation.clients(FAST, fisher=5)[0].fit(half, 1)
    assert reply.fisher is not None
    assert all(tensor.dtype == torch.float32 for tensor in reply.fisher.values())
    assert all(tensor.dtype == half[name].dtype for name, tensor in tensors(reply).items())


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", [None, 5])
def test_replies_with_and_without_cache_are_the_same(federation: Any, tmp_path: Path, fisher: int | None) -> None:
    cache = UpdateCache(tmp_path / "replies")
    plain = [client.fit(federation.anchor, 1) for client in federation.clients(FAST, fisher=fisher)]
    for hits in (0, 3):
        kept = [client.fit(federation.anchor, 1) for client in federation.clients(FAST, fisher=fisher, cache=cache)]
        assert all(map(same, plain, kept))
        assert (cache.hits, cache.misses) == (hits, 3)
    assert len(list(cache.folder.iterdir())) == 3


def test_cache_keeps_dtypes_and_layouts(clip_federation: Any, tmp_path: Path) -> None:
    half = {n: t.bfloat16() for n, t in clip_federation.anchor.items()}
    cache = UpdateCache(tmp_path)
    replies = [clip_federation.clients(FAST, cache=cache)[0].fit(half, 1) for _ in range(2)]
    assert cache.hits == 1
    assert same(*replies)


def test_a_kept_reply_says_how_long_its_training_took(federation: Any, tmp_path: Path) -> None:
    client = federation.clients(FAST, cache=UpdateCache(tmp_path))[0]
    assert client.fit(federation.anchor, 1).seconds == client.fit(federation.anchor, 1).seconds


def test_whatever_changes_the_reply_changes_the_key(federation: Any, clip_federation: Any) -> None:
    task, model, anchor = federation.tasks[0], federation.model, federation.anchor
    assert task.labels is not None

    def key(name: str = "a", weights: Any = anchor, round: int = 1, data: Any = task, **options: Any) -> str:
        return TaskClient(name, model, data, options.pop("training", FAST), **options).key(weights, round)

    other = {**anchor, "last.bias": anchor["last.bias"] + 1e-6}
    moved = task.inputs.clone()
    moved[17, 2] += 1e-3
    labels = task.labels.clone()
    labels[5] = (labels[5] + 1) % 3
    keys = [
        key(),
        key("b"),
        key(round=2),
        key(weights=other),
        key(weights={n: t for n, t in anchor.items() if n != "counter"}),
        key(data=replace(task, inputs=moved)),
        key(data=replace(task, labels=labels)),
        key(limit=30),
        key(fisher=5),
        *[key(training=replace(FAST, **{n: v})) for n, v in
          {"seed": 1, "lr": 0.02, "epochs": 3, "batch": 8, "proximal": 0.1, "weight_decay": 0.2, "warmup": 1,
           "max_grad_norm": 1.0}.items()],
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(weights=dict(reversed(anchor.items()))) == keys[0]


def test_another_frozen_head_changes_the_key(clip_federation: Any) -> None:
    client = clip_federation.clients(FAST)[0]
    before = client.key(clip_federation.anchor, 1)
    heads = {t.name: torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) for t in clip_federation.tasks}
    other = CLIP(clip_federation.model.architecture, heads=heads)
    assert TaskClient(client.name, other, client.task, FAST).key(clip_federation.anchor, 1) != before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_damaged_entries_are_announced_and_trained_again(federation: Any, tmp_path: Path, damage: str) -> None:
    cache = UpdateCache(tmp_path)
    client = federation.clients(FAST, cache=cache)[0]
    first = client.fit(federation.anchor, 1)
    path = cache.path(client.key(federation.anchor, 1))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 64
    elif damage == "foreign":
        data = bytearray(save({"a": torch.zeros(2)}))
    else:
        data = data[: 0 if damage == "empty" else len(data) // 2]
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged"):
        again = client.fit(federation.anchor, 1)
    assert same(first, again)
    assert same(first, client.fit(federation.anchor, 1))
    assert (cache.hits, cache.misses) == (1, 2)


def test_a_reply_that_cannot_be_kept_is_sent_and_leaves_nothing_half_done(
    federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("mergesolve.federated.clients.save_file", full)
    client = federation.clients(FAST, cache=UpdateCache(tmp_path))[0]
    with pytest.warns(UserWarning, match="'blue' could not be kept: no space"):
        reply = client.fit(federation.anchor, 1)
    assert same(reply, federation.clients(FAST)[0].fit(federation.anchor, 1))
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
import torch
from mergesolve.federated import Reply, UpdateCache

def write(folder):
    cache = UpdateCache(folder)
    for i in range(100):
        cache.put("key", Reply("a", {"w": torch.full((20000,), float(i))}, 1))
        found = cache.get("key")
        assert found is not None and len(found.weights["w"].unique()) == 1
    assert (cache.hits, cache.misses) == (100, 0)
"""


def test_two_processes_may_write_the_same_entry(tmp_path: Path) -> None:
    code = WRITER + "print(flush=True)\nwrite(sys.argv[1])"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it has imported all that it needs
        names: dict[str, Any] = {}
        exec(WRITER, names)
        names["write"](tmp_path)
        assert other.wait(timeout=60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


# -- all clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["federation", "clip_federation"])
def test_workers_do_not_change_the_replies(request: pytest.FixtureRequest, kind: str) -> None:
    """Clients that are given one model train at once on modules of their own."""
    federation = request.getfixturevalue(kind)
    options = Training(epochs=6, batch=4, lr=1e-2)
    clients = [*federation.clients(options, fisher=4), *federation.clients(options, fisher=4)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        state = torch.get_rng_state()
        alone = fit_all(clients, federation.anchor, 1)
        together = fit_all(clients, federation.anchor, 1, workers=4)
        assert torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)
    assert [reply.error for reply in together] == [None] * len(clients)
    assert all(map(same, alone, together))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_client_that_raises_loses_only_its_own_reply(federation: Any, workers: int) -> None:
    clients = federation.clients(FAST)
    clients[1:1] = [Raises("bad", ValueError("no disk")), Raises("mute", RuntimeError())]
    seen: list[tuple[str, int, int]] = []
    replies = fit_all(
        clients, federation.anchor, 2, workers, lambda reply, done, of: seen.append((reply.client, done, of))
    )
    assert [reply.client for reply in replies] == ["blue", "bad", "mute", "green", "red"]
    assert [reply.error for reply in replies] == [None, "ValueError: no disk", "RuntimeError", None, None]
    assert all((reply.weights is None) == (reply.error is not None) for reply in replies)
    assert [reply.round for reply in replies] == [2] * 5
    assert seen == [(reply.client, i, 5) for i, reply in enumerate(replies, 1)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes(federation: Any, workers: int, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fit_all([Raises("a", error()), *federation.clients(FAST)], federation.anchor, 1, workers)


def test_no_clients_send_no_replies(federation: Any) -> None:
    assert fit_all([], federation.anchor, 1, workers=2) == []


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1.5, True])
def test_workers_out_of_range_are_named(federation: Any, workers: Any) -> None:
    with pytest.raises(FederationError, match="workers must be an integer of at least 1"):
        fit_all(federation.clients(), federation.anchor, 1, workers)


@pytest.mark.parametrize("option", ["limit", "fisher"])
def test_options_out_of_range_are_named(federation: Any, option: str) -> None:
    with pytest.raises(FederationError, match=f"'a': {option} must be an integer of at least 1, got 0"):
        TaskClient("a", federation.model, federation.tasks[0], **{option: 0})


def test_a_client_without_labels_is_refused(federation: Any) -> None:
    with pytest.raises(FederationError, match="'a': task 'blue' has no labels"):
        TaskClient("a", federation.model, federation.tasks[0].without_labels())


def test_a_client_whose_head_is_unknown_is_refused(clip_federation: Any) -> None:
    task = Task.from_arrays("new", np.zeros((2, 3, 16, 16), dtype=np.uint8), [0, 1], ("a", "b"))
    with pytest.raises(DataError, match="task 'new' has no head"):
        TaskClient("a", clip_federation.model, task)


def test_the_cache_forgets_what_was_not_asked_for_the_longest_time(federation: Any, tmp_path: Path) -> None:
    cache = UpdateCache(tmp_path)
    (client, *_) = federation.clients(Training(epochs=1, lr=1e-2), cache=cache)
    client.fit(federation.anchor, 1)
    (first,) = tmp_path.glob("*.safetensors")
    cache.limit = 2.5 * first.stat().st_size
    client.fit(federation.anchor, 2)
    (second,) = {*tmp_path.glob("*.safetensors")} - {first}
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    client.fit(federation.anchor, 1)  # asked for again: now the second is the oldest
    client.fit(federation.anchor, 3)
    assert first.exists()
    assert not second.exists()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= cache.limit
