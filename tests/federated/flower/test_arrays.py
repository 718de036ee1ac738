import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="needs Flower: pip install 'mergesolve[flower]'", exc_type=ImportError)

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from mergesolve.federated import FederationError, Reply
from mergesolve.federated.flower.arrays import from_arrays, from_reply, to_arrays, to_reply
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("identity")

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.complex64),
]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bit pattern, NaNs with payloads included, of any dtype; 0-d, empty and transposed shapes among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.tensor(list(raw), dtype=torch.uint8)
    tensor = flat.view(dtype) if size else torch.empty(0, dtype=dtype)
    tensor = tensor.reshape(shape)
    return tensor.mT if tensor.ndim >= 2 and draw(st.booleans()) else tensor


models = st.dictionaries(st.text(min_size=1, max_size=8), tensors(), max_size=4)


@given(models)
@settings(deadline=None, max_examples=150)
def test_every_tensor_returns_bit_for_bit_in_its_order(weights):
    assert_same(from_arrays(to_arrays(weights)), weights)


@given(models, st.floats(allow_nan=False), st.integers(0, 2**40), st.text(max_size=10))
@settings(deadline=None, max_examples=75)
def test_a_reply_is_the_same_on_both_sides_of_the_wire(answer, weights, number, count, text):
    sent = Reply(
        "client " + text, weights, 3, samples=count, steps=count, seconds=number, metrics={"loss": number, text: 0.5}
    )
    got = to_reply(answer(from_reply(sent)), client="node", round=9)
    assert_same(dict(got.weights), weights)
    assert (got.client, got.round, got.samples, got.steps) == (sent.client, 3, count, count)
    assert (got.seconds, got.metrics, got.fisher, got.error) == (sent.seconds, sent.metrics, None, None)


def test_tensors_that_share_their_bytes_stay_two(answer):
    weights = {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(3, dtype=torch.bfloat16)}
    got = to_reply(answer(from_reply(Reply("x", weights, 1))), client="x", round=1)
    assert_same(dict(got.weights), weights)
    got.weights["a"].add_(1)
    assert bits(got.weights["b"]) == bits(torch.zeros(3))


def test_a_parameter_travels_without_its_graph():
    weight = torch.nn.Parameter(torch.arange(3.0))
    assert not from_arrays(to_arrays({"w": weight}))["w"].requires_grad


def test_fisher_and_error_travel_too(answer):
    reply = Reply("x", None, 2, fisher={"w": torch.ones(2)}, error="ValueError: no data")
    got = to_reply(answer(from_reply(reply)), client="y", round=2)
    assert got.weights is None
    assert got.error == "ValueError: no data"
    assert_same(dict(got.fisher), {"w": torch.ones(2)})


def test_weights_given_as_a_path_are_read(answer, tmp_path):
    weights = {"a": torch.arange(6.0).reshape(2, 3).bfloat16(), "n": torch.tensor(4), "e": torch.empty(0, 2)}
    save_file(weights, tmp_path / "m.safetensors")
    got = to_reply(answer(from_reply(Reply("x", tmp_path / "m.safetensors", 1))), client="x", round=1)
    assert_same({name: got.weights[name] for name in weights}, weights)


def test_flowers_own_error_is_a_reply_with_an_error_of_the_client_that_was_asked():
    question = Message(RecordDict(), dst_node_id=7, message_type="train")
    got = to_reply(Message(Error(5, "node gone"), reply_to=question), client="pets", round=4)
    assert (got.client, got.round, got.weights) == ("pets", 4, None)
    assert got.error == "Flower error 5: node gone"


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"weights": ArrayRecord({"w": Array("float32", (1,), "numpy.ndarray", b"no array")})}),
    ],
)
def test_a_content_that_cannot_be_read_is_an_error_of_that_client_only(answer, content):
    got = to_reply(answer(content), client="pets", round=4)
    assert (got.client, got.round, got.weights) == ("pets", 4, None)
    assert "cannot be read" in got.error


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (Array("float32", (1,), "numpy.ndarray", b"no array"), "cannot be read as NumPy"),
        (Array("float32", (1,), "numpy.ndarray", b""), "cannot be read as NumPy"),
        (Array("bfloat16", (1,), "numpy.ndarray", Array(torch.zeros(1)).data), "says dtype 'bfloat16', but holds"),
        (Array("Tensor", (1,), "numpy.ndarray", Array(torch.zeros(1)).data), "says dtype 'Tensor'"),
    ],
)
def test_an_array_that_contradicts_itself_is_named(array, words):
    with pytest.raises(FederationError, match=f"'layer.weight' {words}"):
        from_arrays(ArrayRecord({"layer.weight": array}))


def test_sparse_tensors_are_refused_by_name():
    with pytest.raises(FederationError, match=r"'w' is torch\.sparse_coo"):
        to_arrays({"w": torch.eye(2).to_sparse()})
