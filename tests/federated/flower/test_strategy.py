import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("flwr", reason="needs Flower: pip install 'mergesolve[flower]'", exc_type=ImportError)

from flwr.app import ConfigRecord, Error, Message, RecordDict
from mergesolve.federated import FederationError, Reply
from mergesolve.federated.flower.arrays import from_arrays, from_reply, to_arrays
from mergesolve.federated.flower.strategy import MergeStrategy
from mergesolve.federated.registry import make_step
from mergesolve.federated.rounds import merge_round
from mergesolve.federated.state import ServerState

pytestmark = pytest.mark.usefixtures("identity")

NAMES = ["ants", "bees", "cats"]
START = {
    "w": torch.linspace(-1, 1, 12).reshape(3, 4),
    "h": torch.linspace(0, 1, 5).bfloat16(),
    "count": torch.tensor(3),
    "flag": torch.tensor([True, False]),
}


def trained(name: str, weights, round: int) -> Reply:
    """A client as a function: what it sends depends on its name, the round, and the weights alone."""
    generator = torch.Generator().manual_seed(NAMES.index(name) + 10 * round)
    moved = {
        key: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for key, tensor in weights.items()
    }
    return Reply(name, moved, round, samples=10 * (NAMES.index(name) + 1), steps=5, metrics={"loss": 0.5})


class Wire:
    """A grid in memory: nodes that answer from bytes, in an order and with faults that the test decides."""

    def __init__(self, over_the_wire, nodes: dict[int, str], order=list, faults=None, names=None) -> None:
        self.send, self.nodes, self.order = over_the_wire, dict(nodes), order
        self.faults = faults or {}
        self.asked: list[list[str]] = []
        self.queries = 0

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        replies, asked = [], []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            replies += self._answer(self.send(message), asked)
        if asked:
            self.asked.append(asked)
        return self.order(replies)

    def _answer(self, message, asked):
        name = self.nodes[message.metadata.dst_node_id]
        if message.metadata.message_type == "query":
            self.queries += 1
            return [self.send(Message(from_reply(Reply(name, None, 0)), reply_to=message))]
        asked.append(name)
        round = message.content.config_records["reply"]["round"]
        fault = self.faults.get((round, len(self.asked) + 1, name), self.faults.get((round, name)))
        if fault == "silent":
            return []
        if fault == "gone":  # the SuperLink answers for the node
            error = Message(Error(5, "Node Unavailable"), reply_to=message)
            error.metadata.__dict__["_src_node_id"] = 1
            return [error]
        if fault == "raised":
            return [Message(Error(2, "traceback\n<class 'ValueError'>:<'no data'>"), reply_to=message)]
        weights = from_arrays(message.content.array_records["weights"])
        return [self.send(Message(from_reply(trained(name, weights, round)), reply_to=message))]


def merge(step="fedavg", **options):
    return partial(merge_round, step=make_step({"name": step, **options}))


def in_process(rounds: int, faults=(), **options):
    """The same federation without Flower."""
    weights, state, records = START, ServerState(START), []
    for number in range(1, rounds + 1):
        replies = [
            Reply(name, None, number, error="gone") if (number, name) in faults else trained(name, weights, number)
            for name in NAMES
        ]
        weights, state, record = merge(**options)(weights, replies, state)
        records.append(record)
    return weights, state, records


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def ids(*numbers: int) -> dict[int, str]:
    return dict(zip(numbers, NAMES, strict=True))


def strategy(**options) -> MergeStrategy:
    given = {"merge": merge(), "state": ServerState(START), "clients": NAMES, "patience": 0.0, **options}
    return MergeStrategy(given.pop("merge"), given.pop("state"), given.pop("clients"), **given)


@pytest.mark.parametrize("step", [{"step": "fedavg", "by": "samples"}, {"step": "fedadam"}, {"step": "ties"}])
def test_rounds_through_flower_equal_rounds_in_process_whatever_ids_and_order(over_the_wire, step):
    expected, state, _ = in_process(2, **step)
    for nodes, order in itertools.product([ids(5, 6, 7), ids(99, 3, 42)], [list, lambda r: r[::-1]]):
        flower = strategy(merge=merge(**step))
        result = flower.start(Wire(over_the_wire, nodes, order), to_arrays(START), num_rounds=2)
        assert_same(from_arrays(result.arrays), expected)
        assert flower.state.round == 2
        assert flower.state.fingerprints == state.fingerprints
        assert flower.state.norms == state.norms


@pytest.mark.parametrize("fault", ["silent", "gone", "raised"])
def test_a_client_without_an_answer_is_left_out_by_name_and_the_round_goes_on(over_the_wire, fault):
    expected, _, _ = in_process(2, faults={(2, "bees")})
    records = []
    flower = strategy(after=lambda weights, state, record: records.append(record))
    grid = Wire(over_the_wire, ids(5, 6, 7), lambda r: r[::-1], {(2, "bees"): fault})
    result = flower.start(grid, to_arrays(START), num_rounds=2, timeout=7)
    assert_same(from_arrays(result.arrays), expected)
    assert [r["client"] for r in records[1]["rejected"]] == ["bees"]
    said = {"silent": "no answer within 7 s", "gone": "Node Unavailable", "raised": "no data"}
    assert said[fault] in records[1]["rejected"][0]["detail"]


def test_a_node_that_fails_before_it_said_its_name_is_named_by_its_id(over_the_wire):
    records = []
    flower = strategy(after=lambda weights, state, record: records.append(record))
    flower.start(Wire(over_the_wire, ids(5, 6, 7), faults={(1, "bees"): "gone"}), to_arrays(START), num_rounds=1)
    assert [r["client"] for r in records[0]["rejected"]] == ["node-6"]


def test_a_client_that_answers_as_a_new_node_is_not_counted_as_gone(over_the_wire):
    flower, records = strategy(after=lambda weights, state, record: records.append(record)), []
    grid = Wire(over_the_wire, ids(5, 6, 7))
    flower.start(grid, to_arrays(START), num_rounds=1)
    grid.nodes[8] = "bees"
    answer = grid._answer
    grid._answer = lambda message, asked: (
        [Message(Error(5, "Node Unavailable"), reply_to=message)]
        if message.metadata.dst_node_id == 6
        else answer(message, asked)
    )
    flower.start(grid, to_arrays(START), num_rounds=2)
    assert records[1]["accepted"] == NAMES
    assert records[1]["rejected"] == []


def test_a_round_with_too_few_replies_is_repeated_from_the_same_weights(over_the_wire):
    expected, _, _ = in_process(2)
    faults = {(2, 2, name): "gone" for name in NAMES}  # all fail in the second message round, which is round 2
    records = []
    flower = strategy(after=lambda weights, state, record: records.append((state.round, record["repeat"])))
    grid = Wire(over_the_wire, ids(5, 6, 7), faults=faults)
    result = flower.start(grid, to_arrays(START), num_rounds=2)
    assert records == [(1, False), (1, True), (2, False)]
    assert_same(from_arrays(result.arrays), expected)


def test_a_round_that_fails_in_all_attempts_raises_and_keeps_the_rounds_before(over_the_wire):
    flower = strategy(attempts=2)
    grid = Wire(over_the_wire, ids(5, 6, 7), faults={(2, name): "raised" for name in NAMES})
    with pytest.raises(FederationError, match="round 2 had too few usable replies in each of 2 attempts"):
        flower.start(grid, to_arrays(START), num_rounds=3)
    assert flower.state.round == 1
    assert len(grid.asked) == 3


def test_an_error_in_the_merge_is_not_swallowed(over_the_wire):
    def broken(*_):
        raise ArithmeticError("singular")

    with pytest.raises(ArithmeticError, match="singular"):
        strategy(merge=broken).start(Wire(over_the_wire, ids(5, 6, 7)), to_arrays(START), num_rounds=1)


def test_a_server_that_was_stopped_goes_on_with_the_next_round(over_the_wire, tmp_path):
    expected, _, _ = in_process(4, step="fedavgm")
    path, identity = tmp_path / "state.safetensors", {"step": "fedavgm"}
    first = strategy(merge=merge("fedavgm"), after=lambda weights, state, record: state.save(path, weights, identity))
    grid = Wire(over_the_wire, ids(5, 6, 7))
    first.start(grid, to_arrays(START), num_rounds=2)
    state, weights = ServerState.load(path, START, identity)
    later = strategy(merge=merge("fedavgm"), state=state)
    again = Wire(over_the_wire, ids(31, 30, 29), lambda r: r[::-1])
    result = later.start(again, to_arrays({name: weights[name] for name in START}), num_rounds=4)
    assert len(again.asked) == 2
    assert_same(from_arrays(result.arrays), expected)


def test_a_run_that_is_complete_asks_nobody(over_the_wire):
    grid = Wire(over_the_wire, {})
    result = strategy(state=ServerState(START, round=2)).start(grid, to_arrays(START), num_rounds=2)
    assert grid.asked == []
    assert_same(from_arrays(result.arrays), START)


def test_clients_are_drawn_by_seed_round_and_name_not_by_node_id_or_the_global_generator(over_the_wire):
    drawn = []
    for nodes in (ids(5, 6, 7), ids(99, 3, 42)):
        grid = Wire(over_the_wire, nodes)
        strategy(sampled=2, seed=4).start(grid, to_arrays(START), num_rounds=6)
        drawn.append([sorted(names) for names in grid.asked])
        assert all(len(names) == 2 for names in grid.asked)
        assert grid.queries == 3
    assert drawn[0] == drawn[1]
    assert len({tuple(names) for names in drawn[0]}) > 1
    other = Wire(over_the_wire, ids(5, 6, 7))
    strategy(sampled=2, seed=5).start(other, to_arrays(START), num_rounds=6)
    assert [sorted(names) for names in other.asked] != drawn[0]


def test_the_message_carries_the_global_model_and_the_round(over_the_wire):
    flower = strategy()
    (message, *_) = flower.configure_train(
        3, to_arrays(START), ConfigRecord({"lr": 0.1}), Wire(over_the_wire, ids(5, 6, 7))
    )
    content = over_the_wire(message).content
    assert_same(from_arrays(content.array_records["weights"]), START)
    assert dict(content.config_records["reply"]) == {"lr": 0.1, "round": 3}


def test_an_answer_of_a_node_that_was_not_asked_is_left_out(over_the_wire):
    flower = strategy()
    grid = Wire(over_the_wire, ids(5, 6, 7))
    replies = list(grid.send_and_receive(flower.configure_train(1, to_arrays(START), ConfigRecord(), grid)))
    stranger = Message(RecordDict(), dst_node_id=77, message_type="train")
    replies.append(Message(from_reply(trained("ants", START, 1)), reply_to=stranger))
    arrays, metrics = flower.aggregate_train(1, replies)
    assert dict(metrics) == {"accepted": 3, "rejected": 0}
    assert_same(from_arrays(arrays), in_process(1)[0])


def test_too_few_supernodes_raise_with_both_numbers(over_the_wire):
    grid = Wire(over_the_wire, {5: "ants"})
    with pytest.raises(FederationError, match="1 SuperNodes are connected after 0 s; 2 are needed"):
        strategy(minimum=2).start(grid, to_arrays(START), num_rounds=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clients": []}, "no clients"),
        ({"minimum": 0}, "at least 0 SuperNodes"),
        ({"minimum": 4}, "at least 4 SuperNodes, and the federation has 3"),
        ({"sampled": 4}, "4 clients a round cannot be drawn"),
        ({"sampled": 1, "minimum": 2}, "from 2 .the minimum. to 3"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(FederationError, match=words):
        strategy(**options)
