"""What decides a federation, as one tree of typed fields that YAML and flags both fill.

    protocol  <  recipe file  <  flags  <  --set

Nothing here imports torch: a recipe is read, checked and printed before anything is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .names import UsageProblem, choose
from .recipe import Choice, ModelPart, TaskPart, merge, plain
from .schema import parse

NINE = ("digits", "greek", "chess", "shapes", "textures", "counts", "clocks", "relations", "flags")
OTHERS = ("numerals", "uppercase", "symbols", "pictograms", "polygons", "arrows", "positions", "colours", "gaps")


@dataclass(frozen=True)
class FaultPart:
    """A rehearsed fault: its kind, and the rounds in which it happens (all unless given)."""

    kind: str
    rounds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ClientPart:
    """A client: its name, its data (of the zoo's task of that name unless given), and when it takes part.

    joins: first round; leaves: first round without it; absent: rounds that it misses. fault: for rehearsals.
    """

    name: str
    data: TaskPart | None = None
    joins: int = 1
    leaves: int | None = None
    absent: tuple[int, ...] = ()
    fault: FaultPart | None = None

    @classmethod
    def read(cls, value: object, where: str) -> ClientPart:
        """From a mapping, or from a name alone."""
        return cls(value) if isinstance(value, str) else parse(cls, value, where)

    @property
    def task(self) -> TaskPart:
        """Where its data are; the task is called like the client, but for one of the zoo, which has a name already."""
        if self.data is None:
            return TaskPart(self.name)
        named = any((self.data.npz, self.data.folder, self.data.hub))
        return dataclasses.replace(self.data, name=self.name) if named else self.data


@dataclass(frozen=True)
class PartitionPart:
    """One task shared out among clients by label: by Dir(alpha), or evenly at random without alpha."""

    task: TaskPart
    clients: int = 8
    alpha: float | None = None


@dataclass(frozen=True)
class TrainingPart:
    """Local training of every client in a round; `images` of its samples, all of them if null."""

    images: int | None = None
    epochs: int = 10
    batch: int = 128
    lr: float = 1e-5
    weight_decay: float = 0.1
    warmup: int = 0
    proximal: float = 0.0
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class ServerPart:
    """What the server holds.

    images: samples for each client's task, of a split that no client trains on (they are held out of the client's own
    where the data have no other); labels: whether with labels. reference: reference inputs (zoo: images a concept; else
    of `reference_data`); 0 for none. fisher: samples of the reference that the Fisher information at the first model is
    estimated on; client_fisher: samples on which each client estimates its own, to send it.
    """

    images: int = 200
    labels: bool = False
    split: str = "validation"
    reference: int = 4
    reference_data: TaskPart | None = None
    fisher: int = 0
    client_fisher: int = 0


@dataclass(frozen=True)
class EvaluationPart:
    """Test inputs a task, and reference inputs (zoo: images a concept), after each round; null: all of them (zoo: 8 a
    concept). reference: 0 for none."""

    images: int | None = None
    reference: int | None = None


@dataclass(frozen=True)
class ScreeningPart:
    """Which replies are taken, how many a round needs, and how often it is tried."""

    norm_ratio: float = 10.0
    minimum: int = 1
    attempts: int = 3


@dataclass(frozen=True)
class FederationRecipe:
    """A federation, completely.

    clients: one a task, classified among the classes of all (with a module as model: among its outputs); or partition:
    one task shared out. base: the model that the federation begins with (of the zoo, its base).
    """

    protocol: str = "custom"
    zoo: bool | str = False
    base: str | None = None
    model: ModelPart = field(default_factory=ModelPart)
    clients: tuple[ClientPart, ...] = ()
    partition: PartitionPart | None = None
    step: Choice = field(default_factory=lambda: Choice("fedavg"))
    rounds: int = 10
    training: TrainingPart = field(default_factory=TrainingPart)
    server: ServerPart = field(default_factory=ServerPart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)
    screening: ScreeningPart = field(default_factory=ScreeningPart)
    seed: int = 0
    backend: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [client.name for client in self.clients]
        for name in names:
            if names.count(name) > 1:
                raise UsageProblem(f"federation: the client '{name}' is named twice. Give each its own name.")
            if name in RESERVED:
                raise UsageProblem(f"federation: a client cannot be called '{name}'. Give it another name.")
        if self.clients and self.partition is not None:
            raise UsageProblem("federation: give either clients or a partition of one task, not both.")
        _at_least(self, "federation", rounds=1, seed=0)
        _at_least(self.training, "federation: 'training'", images=1)
        _at_least(self.server, "federation: 'server'", images=0, reference=0, fisher=0, client_fisher=0)
        _not_test(self.server.split, "federation: 'server'")
        _at_least(self.evaluation, "federation: 'evaluation'", images=1, reference=0)
        for client in self.clients:
            where = f"federation: client '{client.name}'"
            _at_least(client, where, joins=1, leaves=2, absent=1)
            if client.fault is not None:
                _at_least(client.fault, f"{where}: 'fault'", rounds=1)
            _check_data(client.task, where)
        if self.partition is not None:
            _at_least(self.partition, "federation: 'partition'", clients=1)
            _check_data(self.partition.task, "federation: 'partition'")
        if self.server.reference_data is not None:
            _check_data(self.server.reference_data, "federation: 'reference_data'")


RESERVED = ("", "origin", "reference")
"""Names that records use for what is no client."""


def _at_least(part: object, where: str, **least: int) -> None:
    """Raise UsageProblem for a number, or one of a list, below its bound."""
    for name, bound in least.items():
        value = getattr(part, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < bound:
                raise UsageProblem(f"{where}: '{name}' must be at least {bound}; found {number}.")


def _not_test(split: str | None, where: str) -> None:
    if split is not None and split.startswith("test"):
        raise UsageProblem(
            f"{where}: the split '{split}' is what accuracies are measured on. Give another, such as 'train'."
        )


def _check_data(part: TaskPart, where: str) -> None:
    _not_test(part.split, where)
    given = {"teacher": part.teacher is not None, "weight": part.weight != 1.0, "mixed": part.mixed is not None}
    for name, found in given.items():
        if found:
            remedy = "Give it to the server's step (--set step.mixed=N)." if name == "mixed" else "Leave it out."
            raise UsageProblem(f"{where}: '{name}' of a task has no meaning in a federation. {remedy}")


CONTINUAL_CLIP: dict[str, Any] = {
    "protocol": "continual-clip",
    "zoo": True,
    "model": {"precision": "bf16"},
    "clients": list(NINE),
    "rounds": 10,
    "training": {"images": 768, "epochs": 1, "batch": 64, "lr": 8e-4, "weight_decay": 0.1},
    "server": {"images": 200, "reference": 4},
    "evaluation": {"images": 300, "reference": 2},
}
PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "continual-clip": (
        "9 clients of the zoo, one task each, 10 rounds; reference: what pre-training showed.",
        CONTINUAL_CLIP,
    ),
    "continual-clip-others": (
        "The same with 9 other clients, on which the settings of the study were chosen.",
        {**CONTINUAL_CLIP, "protocol": "continual-clip-others", "clients": list(OTHERS)},
    ),
    "label-skew": (
        "One task of the zoo shared out among 8 clients by Dir(0.3), 10 rounds.",
        {
            **CONTINUAL_CLIP,
            "protocol": "label-skew",
            "clients": [],
            "partition": {"task": "uppercase", "clients": 8, "alpha": 0.3},
            "training": {**CONTINUAL_CLIP["training"], "images": None, "epochs": 2},
        },
    ),
}
"""Protocols of the zoo by name: a line of description and fields that others stand on."""


def federation_recipe(fields: Mapping[str, Any], where: str = "federation") -> FederationRecipe:
    """A recipe from plain fields; those of its protocol, if it names a known one, are defaults under them."""
    name = fields.get("protocol", "custom")
    if name != "custom":
        choose("protocol", str(name), [*PROTOCOLS, "custom"], where=where)
        fields = merge(copy.deepcopy(PROTOCOLS[str(name)][1]), fields)
    return parse(FederationRecipe, fields, where)


def to_yaml(recipe: FederationRecipe) -> str:
    """The recipe as YAML, with every default filled in."""
    return str(yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True, width=110))


def relative_to(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a recipe file with the paths of its data made relative to where the command runs."""
    from .recipe import relative_to as place

    def data(value: Any) -> Any:
        return place({"tasks": [value]}, folder)["tasks"][0] if isinstance(value, Mapping) else value

    fields = copy.deepcopy(fields)
    found = place({key: fields[key] for key in ("zoo", "model") if key in fields}, folder)
    if isinstance(fields.get("base"), str):
        found["base"] = place({"pool": {"base": fields["base"]}}, folder)["pool"]["base"]
    clients = fields.get("clients")
    for client in clients if isinstance(clients, list) else ():
        if isinstance(client, dict) and "data" in client:
            client["data"] = data(client["data"])
    if isinstance(fields.get("partition"), dict) and "task" in fields["partition"]:
        fields["partition"]["task"] = data(fields["partition"]["task"])
    if isinstance(fields.get("server"), dict) and "reference_data" in fields["server"]:
        fields["server"]["reference_data"] = data(fields["server"]["reference_data"])
    return {**fields, **found}
