"""From a federation's recipe to live objects: clients, what the server holds, evaluation, the federation itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .names import UsageProblem, choose
from .protocol import ClientPart, FederationRecipe, federation_recipe
from .recipe import PoolPart, Recipe, TaskPart, plain
from .setup import Setup

if TYPE_CHECKING:
    from ..federated import Client, Federation, UpdateCache
    from ..federated.federation import Accuracy
    from ..federated.step import ServerData
    from ..objectives import Task

REFERENCE = "reference"


def cache_folder() -> Path:
    """Where clients' updates are kept: $MERGESOLVE_CACHE/updates, or ~/.cache/mergesolve/updates."""
    return Path(os.environ.get("MERGESOLVE_CACHE") or Path.home() / ".cache" / "mergesolve") / "updates"


class FederationSetup:
    """The live counterpart of a federation's recipe; every part is made when it is first asked for."""

    def __init__(self, recipe: FederationRecipe, updates: Path | None = None) -> None:
        self.recipe = recipe
        self._updates = updates
        experts = {} if recipe.zoo or recipe.base is None else {"itself": recipe.base}  # a pool is never without
        pool = PoolPart(base=recipe.base, experts=experts, device=recipe.device)
        self._single = Setup(Recipe(zoo=recipe.zoo, pool=pool, model=recipe.model))

    def check(self) -> None:
        """Find what is missing or misspelled before anything is loaded."""
        from ..federated.faults import FAULTS
        from ..federated.registry import make_step
        from ..pools import BACKENDS

        recipe = self.recipe
        if not recipe.clients and recipe.partition is None:
            raise UsageProblem(
                "the federation has no clients. Give --protocol continual-clip, --client NAME for tasks of the zoo, or "
                "a recipe file with clients."
            )
        if recipe.zoo and (recipe.base, recipe.model.architecture, recipe.model.module) != (None, None, None):
            raise UsageProblem("the zoo brings its own base and model; leave 'base' and 'model' out, or the zoo.")
        if not recipe.zoo and recipe.base is None:
            raise UsageProblem("the federation has no base to begin with. Give 'base: PATH' in the recipe, or --zoo.")
        for client in recipe.clients:
            if client.fault is not None:
                choose("fault", client.fault.kind, FAULTS, where=f"client '{client.name}'")
        choose("backend", recipe.backend, BACKENDS)
        self._check_statistics(make_step(recipe.step.plain()))

    def _check_statistics(self, step: Any) -> None:
        """Find out before the first round that a merge needs what clients do not send."""
        inner = getattr(step, "step", None)  # of a server optimizer
        if inner is not None:
            self._check_statistics(inner)
        kind = getattr(getattr(step, "merge", None), "statistics", None)
        if kind is None or (kind == "fisher" and self.recipe.server.client_fisher):
            return
        remedy = "choose another step"
        if kind == "fisher":
            remedy = f"let the clients send them (--set server.client_fisher=SAMPLES), or {remedy}"
        raise UsageProblem(f"the server step needs {kind} statistics of every client, and there are none; {remedy}.")

    @cached_property
    def model(self) -> Any:
        """What turns weights and images into logits; shared by clients, server and evaluation."""
        if self.recipe.zoo:
            return self._single.zoo.model(device=self.recipe.device, precision=self.recipe.model.precision)
        if self.recipe.model.architecture is not None and self.recipe.model.weights is None:
            single = Setup(replace(self._single.recipe, model=replace(self.recipe.model, weights=self.recipe.base)))
            return single.model
        return self._single.model

    # Data

    @cached_property
    def _parts(self) -> tuple[tuple[str, Task, Task | None, Task | None], ...]:
        """By client: its name, its training set, its test set, and what the server holds of its task.

        All of them are classified among the classes of all clients; with a module, among its outputs.
        """
        recipe = self.recipe
        if recipe.partition is not None:
            return self._shares()
        names = [client.name for client in recipe.clients]
        parts = [client.task for client in recipe.clients]
        pairs = [self._train_and_server(part) for part in parts]
        train = self._joint([_called(name, task) for name, (task, _) in zip(names, pairs, strict=True)])
        test = self._joint([_called(name, self._test(part)) for name, part in zip(names, parts, strict=True)])
        held = [_called(name, task) for name, (_, task) in zip(names, pairs, strict=True) if task is not None]
        server: Sequence[Task | None] = self._joint(held) if held else [None] * len(names)
        return tuple(zip(names, train, test, server, strict=True))

    def _joint(self, tasks: Sequence[Task]) -> tuple[Task, ...]:
        """The tasks over the classes of all; those with the same classes share them, for equal ones would tie."""
        from ..objectives import joint

        if self.recipe.model.module is not None:
            return tuple(tasks)
        # A head of the zoo goes by the name of its task, any other one by the texts alone.
        keys = [task.texts if self.recipe.zoo else (task.classes, task.templates) for task in tasks]
        whole = joint([tasks[keys.index(key)] for key in dict.fromkeys(keys)])
        starts, before = {}, 0
        for key in dict.fromkeys(keys):
            starts[key] = before
            before += len(tasks[keys.index(key)].classes)
        return tuple(
            replace(
                task,
                labels=None if task.labels is None else task.labels + starts[key],
                classes=whole[0].classes,
                parts=whole[0].parts,
            )
            for task, key in zip(tasks, keys, strict=True)
        )

    def _train_and_server(self, part: TaskPart) -> tuple[Task, Task | None]:
        """A task's training set, and what the server holds of it: never the same samples."""
        whole, images = self._task(part, "train"), self.recipe.server.images
        if not images:
            return whole, None
        split = self.recipe.server.split
        if part.npz is None and part.folder is None and (part.split or "train") != split:
            return whole, self._task(replace(part, split=None), split).subset(images, seed=self.recipe.seed)
        if images >= len(whole):
            raise UsageProblem(
                f"server: {images} samples of '{part.name}' are to be held out of the {len(whole)} that there are, and "
                "none would be left to train on. Give fewer (--server-images), or 0."
            )
        numbered = replace(whole, inputs=np.arange(len(whole)))
        kept = np.asarray(numbered.subset(images, seed=self.recipe.seed).batch(np.arange(images)))
        return whole.take(np.setdiff1d(np.arange(len(whole)), kept)), whole.take(kept)

    def _shares(self) -> tuple[tuple[str, Task, Task | None, Task | None], ...]:
        from ..federated import dirichlet, iid

        part = self.recipe.partition
        assert part is not None
        whole, server = self._train_and_server(part.task)
        if part.alpha is None:
            shares = iid(whole, part.clients, self.recipe.seed)
        else:
            shares = dirichlet(whole, part.clients, part.alpha, self.recipe.seed)
        found: list[tuple[str, Task, Task | None, Task | None]] = []
        for k, share in enumerate(shares):
            held = None if server is None else replace(server, name=share.name, parts=server.texts)
            found.append((share.name, share, self._test(part.task) if k == 0 else None, held))
        return tuple(found)

    def _task(self, part: TaskPart, split: str) -> Task:
        return self._single.load_task(replace(part, split=part.split or split))

    def _test(self, part: TaskPart) -> Task:
        limit = self.recipe.evaluation.images
        task = self._single.load_test(part)
        return task if limit is None else task.subset(limit, seed=0)

    def _reference(self, split: str) -> Task | None:
        """Inputs of what the first model knows; for the server without labels, for evaluation with them."""
        recipe = self.recipe
        part = recipe.server.reference_data
        if part is not None:
            limit = recipe.evaluation.reference if split == "test" else recipe.server.reference
            if limit == 0 or (split == "test" and part.test is None and part.hub is None):
                return None
            task = _called(REFERENCE, self._single.load_test(part) if split == "test" else self._task(part, "train"))
            return task if limit is None else task.subset(limit, seed=0 if split == "test" else recipe.seed)
        if not recipe.zoo:
            return None
        each = recipe.evaluation.reference if split == "test" else recipe.server.reference
        each = 8 if each is None else each
        found: Task | None = self._single.zoo.reference(split, each=each) if each else None
        return found

    # The federation

    @cached_property
    def clients(self) -> tuple[Client, ...]:
        """All clients, with their comings and goings, and the faults that are rehearsed."""
        named = {client.name: client for client in self.recipe.clients}
        return tuple(self._client(named.get(name, ClientPart(name)), task) for name, task, _, _ in self._parts)

    def _client(self, part: ClientPart, task: Task) -> Client:
        from ..federated import Faulty, Membership, TaskClient, Training

        options = plain(self.recipe.training)
        images = options.pop("images")
        client: Client = TaskClient(
            part.name,
            self.model,
            task if images is None else task.subset(images, seed=self.recipe.seed),
            Training(**options, seed=self.recipe.seed),
            fisher=self.recipe.server.client_fisher or None,
            cache=self._cache,
        )
        if part.fault is not None:
            client = Faulty(client, part.fault.kind, part.fault.rounds)
        if part.joins != 1 or part.leaves is not None or part.absent:
            client = Membership(client, part.joins, part.leaves, part.absent)
        return client

    @cached_property
    def _cache(self) -> UpdateCache | None:
        from ..federated import UpdateCache

        return None if self._updates is None else UpdateCache(self._updates)

    @cached_property
    def start(self) -> Mapping[str, Any]:
        """The model that the federation begins with, all of its tensors."""
        from ..pools import Pool

        path = str(self._single.zoo.base) if self.recipe.zoo else str(self.recipe.base)
        if self.recipe.zoo or self.recipe.model.module is not None:
            return Pool.open(base=path, experts={"itself": path}, backend="streaming").base_weights()
        weights: Mapping[str, Any] = self.model.base_weights()
        return weights

    @cached_property
    def data(self) -> ServerData:
        """What the server may look at."""
        from ..federated.step import ServerData

        part = self.recipe.server
        held = {name: task for name, _, _, task in self._parts if task is not None}
        if not part.labels:
            held = {name: task.without_labels() for name, task in held.items()}
        reference = self._reference("train")
        fisher = None
        if part.fisher:
            if reference is None:
                raise UsageProblem("server: 'fisher' is estimated on reference inputs; give 'reference' as well.")
            from ..objectives import fisher_diagonal

            fisher = fisher_diagonal(
                self.model, dict(self.start), reference, estimator="sampled", samples=part.fisher, seed=self.recipe.seed
            ).tensors
        return ServerData(self.model, held, None if reference is None else reference.without_labels(), fisher)

    def evaluate(self, weights: Mapping[str, Any]) -> Accuracy:
        """Accuracies on the test sets, in percent."""
        from ..federated.federation import Accuracy
        from ..objectives import evaluate

        scores = evaluate(self.model, dict(weights), list(self._tests.values()))
        found = {name: 100 * scores[task.name] for name, task in self._tests.items()}
        return Accuracy({n: v for n, v in found.items() if n != REFERENCE}, found.get(REFERENCE))

    @cached_property
    def _tests(self) -> dict[str, Task]:
        tests = {test.name: test for _, _, test, _ in self._parts if test is not None}
        reference = self._reference("test")
        return tests if reference is None else {**tests, REFERENCE: reference}

    @cached_property
    def federation(self) -> Federation:
        """All of it."""
        from ..federated import Federation, Screening
        from ..federated.registry import make_step

        recipe = self.recipe
        settings = {key: plain(getattr(recipe, key)) for key in SETTINGS}
        return Federation(
            self.clients,
            self.start,
            make_step(recipe.step.plain()),
            data=self.data,
            evaluate=self.evaluate,
            screening=Screening(**plain(recipe.screening)),
            seed=recipe.seed,
            protocol=recipe.protocol,
            settings=settings,
            backend=recipe.backend,
            device=recipe.device,
        )


def _called(name: str, task: Task) -> Task:
    """The task under another name; its head stays the one of its own."""
    return task if task.name == name else replace(task, name=name, parts=task.texts)


SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(FederationRecipe)
    if field.name not in ("protocol", "step", "rounds", "seed")
)
"""Fields that a resumed federation must agree with, besides those that `Federation` knows itself."""


def build(fields: Mapping[str, Any]) -> Federation:
    """A federation from the plain fields of a recipe: what Flower's apps are given."""
    setup = FederationSetup(federation_recipe(fields), cache_folder())
    setup.check()
    return setup.federation
