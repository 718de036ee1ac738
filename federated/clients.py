"""Clients that live in this process: one task each, trained on in place of a device far away.

A cache keeps what they trained: runs that differ in the server step only share their first round, and a run that was
killed finds again what its clients had sent.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from ..objectives.models import Model, ModuleModel
from ..objectives.statistics import fisher_diagonal
from ..objectives.task import Task
from .errors import FederationError
from .replies import Client, Reply, Weights
from .training import Training, attention, train

Progress = Callable[[Reply, int, int], Any]
"""(reply that just came, clients done, of how many)"""

FORMAT = 1  # of the cache's entries; part of their keys
_FISHER = threading.Lock()


class TaskClient:
    """A client with the data of one task.

    model: what computes logits; clients may be given the same one. A task that `objectives.joint` made is classified
        among the classes of all clients, by their frozen text heads, one after the other.
    limit: train on at most so many samples, balanced over the classes, the same ones in every round.
    fisher: send the diagonal of the Fisher matrix at the trained model, estimated on so many samples of the data with
        one label each drawn from the predictions.
    cache: where replies are kept.

    Raises FederationError for a task without labels, DataError for one that the model has no head for.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        task: Task,
        training: Training | None = None,
        *,
        limit: int | None = None,
        fisher: int | None = None,
        cache: UpdateCache | None = None,
    ) -> None:
        if task.labels is None:
            raise FederationError(
                f"client {name!r}: task {task.name!r} has no labels, so there is nothing to train on; give the labels, "
                "or leave the client out."
            )
        for option, value in (("limit", limit), ("fisher", fisher)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise FederationError(f"client {name!r}: {option} must be an integer of at least 1, got {value!r}.")
        model.check_task(task)
        self.name = name
        self.model = separate(model)
        self.training = Training() if training is None else training
        self.task = task if limit is None or limit >= len(task) else task.subset(limit, self.training.seed)
        self.fisher = fisher
        self.cache = cache
        self._data: str | None = None

    @property
    def samples(self) -> int:
        """Number of samples that it trains on."""
        return len(self.task)

    def fit(self, weights: Weights, round: int) -> Reply:
        """Train from these weights, which are not changed; metrics: mean training loss of the first and last epoch.

        A reply from the cache is the one that was trained, with the seconds that the training took.
        """
        if self.cache is None:
            return self._fit(weights, round)
        key = self.key(weights, round)
        reply = self.cache.get(key)
        if reply is None:
            reply = self._fit(weights, round)
            try:
                self.cache.put(key, reply)
            except OSError as error:  # the training is not lost for that
                warnings.warn(f"the reply of client {self.name!r} could not be kept: {error}", stacklevel=2)
            return reply
        assert isinstance(reply.weights, Mapping)
        devices = {name: tensor.device for name, tensor in weights.items()}
        found = {name: reply.weights[name].to(device) for name, device in devices.items()}
        return replace(reply, weights=found)

    def _fit(self, weights: Weights, round: int) -> Reply:
        with attention(self.model):  # around the Fisher, too, which changes the same setting for a while
            return self._fitted(weights, round)

    def _fitted(self, weights: Weights, round: int) -> Reply:
        began = time.perf_counter()
        losses: list[float] = []
        found, steps = train(
            self.model,
            self.task,
            weights,
            self.training,
            round=round,
            client=self.name,
            losses=lambda _, loss: losses.append(loss),
        )
        fisher = None
        if self.fisher is not None:
            full = {n: t.float() if t.is_floating_point() and t.itemsize < 4 else t for n, t in found.items()}
            with _FISHER:  # seeds torch's global generator for a while, and sets the number of threads
                fisher = fisher_diagonal(
                    self.model, full, self.task, estimator="sampled", samples=self.fisher, seed=self.training.seed
                ).tensors
        return Reply(
            self.name,
            found,
            round,
            samples=self.samples,
            steps=steps,
            seconds=time.perf_counter() - began,
            metrics={"first_loss": losses[0], "last_loss": losses[-1]},
            fisher=fisher,
        )

    def key(self, weights: Weights, round: int) -> str:
        """SHA-256 of all that the reply depends on: data, model, settings, round and the weights that it starts from.

        The inputs count in full where they are a tensor; of files, as `Task.fingerprint` counts them.
        """
        if self._data is None:
            inputs = {"inputs": self.task.inputs} if isinstance(self.task.inputs, Tensor) else {}
            self._data = digest(inputs)
        parts = {
            "format": FORMAT,
            "client": self.name,
            "round": round,
            "training": asdict(self.training),
            "fisher": self.fisher,
            "task": self.task.fingerprint,
            "texts": [asdict(texts) for texts in self.task.texts],
            "data": self._data,
            "model": self.model.describe(),
            "frozen": digest(self._frozen(weights)),
            "anchor": digest(weights) if self.cache is None else self.cache.anchor(weights),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _frozen(self, weights: Weights) -> dict[str, Tensor]:
        """Tensors that the logits depend on beside the weights."""
        model: Any = self.model
        found = {}
        if callable(getattr(model, "head", None)):
            found["(head)"] = model.head(self.task)
        for name in ("logit_scale", "logit_bias"):
            if isinstance(getattr(model, name, None), Tensor):
                found[f"({name})"] = getattr(model, name)
        incomplete = any(name not in weights for name in model.parameter_names)
        if hasattr(model, "base_weights") and (incomplete or isinstance(model, ModuleModel)):
            found.update({n: t for n, t in model.base_weights().items() if n not in weights})
        return found


def separate(model: Model) -> Model:
    """The same model for use in another thread: a call puts its weights in place of a module's own, so that two calls
    at once would see each other's. The modules are copied; their tensors, heads and the like are shared."""
    found = copy.copy(model)
    for name, value in vars(model).items():
        if isinstance(value, nn.Module):
            shared = {id(tensor): tensor for tensor in itertools.chain(value.parameters(), value.buffers())}
            setattr(found, name, copy.deepcopy(value, cast(dict[int, Any], shared)))
    return found


class UpdateCache:
    """Replies in a folder, one safetensors file each, named by what they depend on.

    Any number of processes may use the folder at once: a file appears whole or not at all. Entries that are damaged
    (each holds the sum of its tensors) are announced by a warning and count as absent; the next reply replaces them.
    limit: bytes that the folder may hold; entries that were not asked for the longest time go first.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: float = 2e9) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._last: tuple[Weights, str] | None = None
        self.hits = 0
        """Replies that were found since this object was made."""
        self.misses = 0
        """Replies that were asked for and not there."""

    def path(self, key: str) -> Path:
        """File of the reply with this key."""
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> Reply | None:
        """The reply of this key, on the CPU, if there is one."""
        path = self.path(key)
        try:
            reply = _read(path)
        except FileNotFoundError:
            reply = None
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"the kept reply {path} is damaged ({error}); its client trains again", stacklevel=2)
            reply = None
        else:
            with suppress(OSError):
                os.utime(path)
        self.hits += reply is not None
        self.misses += reply is None
        return reply

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply that has weights in memory. Raises OSError if that fails, and leaves nothing behind."""
        if not isinstance(reply.weights, Mapping):
            raise FederationError(f"client {reply.client!r}: only a reply that holds its weights in memory is kept.")
        tensors = {f"weights/{name}": _plain(tensor) for name, tensor in reply.weights.items()}
        tensors.update({f"fisher/{name}": _plain(tensor) for name, tensor in (reply.fisher or {}).items()})
        fields = {k: v for k, v in vars(reply).items() if k not in ("weights", "fisher")}
        fields["metrics"] = dict(reply.metrics)
        header = {"reply": json.dumps(fields), "fisher": str(reply.fisher is not None), "sum": digest(tensors)}
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        os.close(handle)
        try:
            save_file(tensors, partial, metadata=header)
            self._make_room(Path(partial).stat().st_size)
            Path(partial).replace(self.path(key))
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process may be making room, too
                found = path.stat()
                entries.append((found.st_mtime, found.st_size, path))
        total = size + sum(entry[1] for entry in entries)
        for _, held, path in sorted(entries):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= held

    def anchor(self, weights: Weights) -> str:
        """The digest of the weights of a round, computed once for all of its clients."""
        last = self._last
        if last is None or last[0] is not weights:
            last = self._last = (weights, digest(weights))
        return last[1]


def _read(path: Path) -> Reply:
    # In one piece: safe_open opens a file twice, and between the two another process may have replaced it.
    data = path.read_bytes()
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if digest(tensors) != header["sum"]:
        raise ValueError("its tensors are not those that were written")
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "fisher": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = tensor
    fisher = parts["fisher"] if header["fisher"] == "True" else None
    return Reply(**json.loads(header["reply"]), weights=parts["weights"], fisher=fisher)


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares its memory with no other tensor."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes; the order of the names does not matter."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fit_all(
    clients: Sequence[Client], weights: Weights, round: int, workers: int = 1, progress: Progress | None = None
) -> list[Reply]:
    """The replies of all clients, in their order. A client that raises has a reply without weights that says why.

    workers: clients that train at once, in threads of this process. With more than one, torch should have
    cores / workers threads (`torch.set_num_threads`). The replies do not depend on it.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise FederationError(f"fit_all: workers must be an integer of at least 1, got {workers!r}.")
    replies: list[Reply] = []
    for reply in _replies(clients, weights, round, min(workers, max(len(clients), 1))):
        replies.append(reply)
        if progress is not None:
            progress(reply, len(replies), len(clients))
    return replies


def _replies(clients: Sequence[Client], weights: Weights, round: int, workers: int) -> Iterator[Reply]:
    if workers == 1:
        for client in clients:
            yield _reply(client, weights, round)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda client: _reply(client, weights, round), clients)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _reply(client: Client, weights: Weights, round: int) -> Reply:
    began = time.perf_counter()
    try:
        reply: object = client.fit(weights, round)
        if not isinstance(reply, Reply):
            raise TypeError(f"fit returned {type(reply).__name__}, no Reply")
        return reply
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        seconds = time.perf_counter() - began
        return Reply(client.name, None, round, samples=client.samples, steps=0, seconds=seconds, error=text)
