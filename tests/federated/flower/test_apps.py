import importlib.util
import json
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="needs Flower: pip install 'mergesolve[flower]'", exc_type=ImportError)

from flwr.app import ConfigRecord, Context, Message, RecordDict
from mergesolve.federated import FederationError, Membership, Reply
from mergesolve.federated.federation import Accuracy, Federation, federate, read_rounds
from mergesolve.federated.flower.arrays import from_reply, to_arrays, to_reply
from mergesolve.federated.flower.client_app import answer, partition
from mergesolve.federated.flower.server_app import serve, table
from mergesolve.federated.flower.settings import Settings
from mergesolve.federated.registry import make_step
from mergesolve.federated.screening import Screening
from mergesolve.federated.step import ServerData
from mergesolve.objectives import ModuleModel, Task
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("identity")

NAMES = ["ants", "bees", "cats"]
START = {"w": torch.linspace(-1, 1, 12).reshape(3, 4), "h": torch.ones(4).bfloat16(), "n": torch.tensor(3)}


class Walker:
    """A client that takes a random step; it raises in the rounds that the test names."""

    samples = 10

    def __init__(self, name: str, fails: tuple[int, ...] = ()) -> None:
        self.name, self.fails = name, fails

    def fit(self, weights, round: int) -> Reply:
        if round in self.fails:
            raise OSError("disk is gone")
        generator = torch.Generator().manual_seed(NAMES.index(self.name) + 10 * round)
        moved = {
            name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor.clone()
            for name, tensor in weights.items()
        }
        return Reply(self.name, moved, round, samples=10, steps=2)


class Nodes:
    """A grid whose nodes run the client app on bytes, and answer in the wrong order."""

    def __init__(self, over_the_wire, clients, ids) -> None:
        self.send, self.clients = over_the_wire, dict(zip(ids, clients, strict=True))
        self.asked = 0

    def get_node_ids(self):
        return list(self.clients)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            if message.metadata.message_type == "query":
                name = self.clients[message.metadata.dst_node_id].name
                replies.append(self.send(Message(from_reply(Reply(name, None, 0)), reply_to=message)))
                continue
            self.asked += 1
            replies.append(self.send(answer(self.clients[message.metadata.dst_node_id], self.send(message))))
        return replies[::-1]


def federation(fails: tuple[int, ...] = (), **options) -> Federation:
    clients = [Walker(name, fails if name == "bees" else ()) for name in NAMES]
    return Federation(
        clients,
        START,
        make_step("fedavgm"),
        evaluate=lambda weights: Accuracy({"all": float(weights["w"].mean())}),
        **options,
    )


def same_records(found, expected) -> bool:
    """Equal but for what is measured: seconds and memory."""
    measured = ("seconds", "peak_memory")
    strip = [[{k: v for k, v in record.items() if k not in measured} for record in side] for side in (found, expected)]
    return json.dumps(strip[0], sort_keys=True) == json.dumps(strip[1], sort_keys=True)


def test_a_run_over_flower_leaves_the_files_of_a_run_in_one_process(over_the_wire, tmp_path):
    expected = federate(federation(fails=(2,)), 3, tmp_path / "loop")
    setting = federation(fails=(2,))
    history = serve(
        setting, Nodes(over_the_wire, setting.clients, (9, 4, 6)), Settings(rounds=3, folder=str(tmp_path / "flower"))
    )
    assert history.status == expected.status == "finished"
    for name in ("model.safetensors", "state.safetensors", "origin.safetensors"):
        found, wanted = (load_file(tmp_path / side / name) for side in ("flower", "loop"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    header, records = read_rounds(tmp_path / "flower" / "rounds.jsonl")
    wanted_header, wanted_records = read_rounds(tmp_path / "loop" / "rounds.jsonl")
    assert header == wanted_header
    assert same_records(records, wanted_records)
    assert records[1]["rejected"] == [
        {"client": "bees", "reason": "failed", "detail": wanted_records[1]["rejected"][0]["detail"]}
    ]
    assert "OSError: disk is gone" in records[1]["rejected"][0]["detail"]


def test_a_server_that_is_started_again_goes_on_with_the_next_round(over_the_wire, tmp_path):
    expected = federate(federation(), 4)
    first, second = federation(), federation()
    serve(first, Nodes(over_the_wire, first.clients, (1, 2, 3)), Settings(rounds=2, folder=str(tmp_path)))
    grid = Nodes(over_the_wire, second.clients, (30, 20, 10))
    history = serve(second, grid, Settings(rounds=4, folder=str(tmp_path)))
    assert grid.asked == 2 * len(NAMES)
    assert [record["round"] for record in history.records] == [1, 2, 3, 4]
    assert list(history.weights) == list(START)
    assert all(torch.equal(history.weights[name], expected.weights[name]) for name in START)
    assert len(table(history).splitlines()) == 5


def test_another_federations_folder_is_refused(over_the_wire, tmp_path):
    first, second = federation(), federation(seed=1)
    serve(first, Nodes(over_the_wire, first.clients, (1, 2, 3)), Settings(rounds=1, folder=str(tmp_path)))
    with pytest.raises(FederationError, match="belongs to another federation: seed"):
        serve(second, Nodes(over_the_wire, second.clients, (1, 2, 3)), Settings(rounds=2, folder=str(tmp_path)))


def test_a_round_without_enough_replies_fails_the_run_and_keeps_what_was_reached(over_the_wire, tmp_path):
    setting = federation(fails=(2,), screening=Screening(minimum=3, attempts=2))
    grid = Nodes(over_the_wire, setting.clients, (1, 2, 3))
    with pytest.raises(FederationError, match="round 2 had too few usable replies in each of 2 attempts"):
        serve(setting, grid, Settings(rounds=3, folder=str(tmp_path)))
    _, records = read_rounds(tmp_path / "rounds.jsonl")
    assert [(record["round"], record["attempt"], record["repeat"]) for record in records] == [
        (1, 1, False),
        (2, 1, True),
        (2, 2, True),
    ]
    reached = load_file(tmp_path / "model.safetensors")
    one = federate(federation(), 1).weights
    assert all(torch.equal(reached[name], one[name]) for name in START)


def test_a_client_that_raises_answers_with_the_reason_under_its_own_name(over_the_wire):
    content = RecordDict({"weights": to_arrays(START), "reply": ConfigRecord({"round": 2})})
    question = Message(content, dst_node_id=7, message_type="train")
    reply = to_reply(over_the_wire(answer(Walker("bees", fails=(2,)), question)), client="node-7", round=2)
    assert (reply.client, reply.weights, reply.error) == ("bees", None, "OSError: disk is gone")


@pytest.mark.parametrize("config", [{}, {"partition-id": "0"}, {"partition-id": -1}, {"partition-id": True}])
def test_a_supernode_without_a_partition_id_says_how_to_give_one(config):
    context = Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})
    with pytest.raises(FederationError, match="--node-config 'partition-id=0'"):
        partition(context)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rounds": "3"}, "rounds must be int. Got '3'"),
        ({"sampled": True}, "sampled must be int. Got True"),
        ({"timeout": -1.0}, "timeout must be at least 0. Got -1.0"),
    ],
)
def test_run_config_is_checked(config, words):
    with pytest.raises(FederationError, match=words):
        Settings.of(config)


def test_clients_come_and_go_as_in_one_process_and_absent_ones_are_not_asked(over_the_wire):
    def built() -> Federation:
        members = [
            Membership(Walker("ants")),
            Membership(Walker("bees"), joins=2),
            Membership(Walker("cats"), leaves=3),
        ]
        return Federation(members, START, make_step("fedavg"))

    expected, setting = federate(built(), 3), built()
    grid = Nodes(over_the_wire, setting.clients, (9, 4, 6))
    history = serve(setting, grid, Settings(rounds=3))
    assert [record["accepted"] for record in history.records] == [["ants", "cats"], NAMES, ["ants", "bees"]]
    assert all(torch.equal(history.weights[name], expected.weights[name]) for name in START)
    assert same_records(history.records, expected.records)


def test_a_step_that_asks_clients_within_a_round_is_refused(over_the_wire):
    task = Task("all", torch.zeros(2, 4), torch.tensor([0, 1]), ("a", "b"))
    model = ModuleModel(torch.nn.Linear(4, 2))
    step = make_step("fw-federated")
    setting = Federation([Walker("ants")], START, step, data=ServerData(model, {"ants": task}))
    with pytest.raises(FederationError, match="Take 'fw-hard'"):
        serve(setting, Nodes(over_the_wire, setting.clients, (1,)), Settings(rounds=1))


@pytest.fixture
def example():
    """The modules and the configuration of the app in the docs."""
    folder = Path(__file__).parents[3] / "docs/examples/flower"
    spec = importlib.util.spec_from_file_location("federation_app", folder / "federation_app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]


def test_the_examples_configuration_has_every_setting_with_its_kind(example):
    module, app = example
    config = app["config"]
    assert Settings.of(config) == Settings(**{key: config[key] for key in asdict(Settings())})
    for reference in app["components"].values():
        name, _, attribute = reference.partition(":")
        assert name == "federation_app"
        assert hasattr(module, attribute)


def test_the_examples_apps_build_what_the_command_line_builds(example):
    module, app = example
    config = {**app["config"], "clients": "digits chess", "step": "ties:density=0.2", "set": "training.images=8 seed=3"}
    recipe = module.setup(config).recipe
    assert [client.name for client in recipe.clients] == ["digits", "chess"]
    assert (recipe.protocol, recipe.step.plain(), recipe.training.images, recipe.seed) == (
        "continual-clip",
        {"name": "ties", "density": 0.2},
        8,
        3,
    )
