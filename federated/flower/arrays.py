"""Models and replies as Flower's records, bit for bit.

    content = from_reply(client.fit(from_arrays(record), round))
    reply = to_reply(message, client="pets", round=3)

An ArrayRecord holds NumPy arrays, so that bfloat16 and the 8-bit floats do not fit: their bits travel as unsigned
integers of the same size, and the `dtype` of the Array says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ...pools.checkpoint import Buffer, open_checkpoint
from ..errors import FederationError
from ..replies import Reply, Weights

WEIGHTS, FISHER, METRICS, REPLY = "weights", "fisher", "metrics", "reply"

_NATIVE = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def to_arrays(weights: Weights) -> ArrayRecord:
    """Tensors of any dtype and shape as an ArrayRecord, in their order."""
    return ArrayRecord({name: _to_array(name, tensor) for name, tensor in weights.items()})


def from_arrays(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The tensors that `to_arrays` was given, on the CPU. Raises FederationError if an array cannot be read."""
    return {name: _from_array(name, array) for name, array in record.items()}


def _to_array(name: str, tensor: torch.Tensor) -> Array:
    values = tensor.detach().cpu()
    if values.layout is not torch.strided or values.is_quantized:
        raise FederationError(
            f"flower: tensor '{name}' is {tensor.layout} of {tensor.dtype}; only dense tensors travel."
        )
    if values.dtype not in _NATIVE:
        values = values.contiguous().view(_BITS[values.element_size()])
    array = Array(values.numpy())
    return Array(dtype=_name(tensor.dtype), shape=array.shape, stype=array.stype, data=array.data)


def _from_array(name: str, array: Array) -> torch.Tensor:
    try:
        values = torch.from_numpy(array.numpy())
    except (EOFError, TypeError, ValueError) as error:
        raise FederationError(f"flower: array '{name}' cannot be read as NumPy ({error}).") from error
    dtype = getattr(torch, array.dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != values.dtype.itemsize:
        raise FederationError(f"flower: array '{name}' says dtype {array.dtype!r}, but holds {_name(values.dtype)}.")
    return values if values.dtype is dtype else values.view(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_reply(reply: Reply) -> RecordDict:
    """Content of the message that brings this reply to the server; weights given as a path are read."""
    about: dict[str, Any] = {
        "client": reply.client,
        "round": reply.round,
        "samples": reply.samples,
        "steps": reply.steps,
        "seconds": float(reply.seconds),
    }
    if reply.error is not None:
        about["error"] = reply.error
    content = RecordDict(
        {REPLY: ConfigRecord(about), METRICS: MetricRecord({k: float(v) for k, v in reply.metrics.items()})}
    )
    if reply.weights is not None:
        weights = reply.weights if isinstance(reply.weights, Mapping) else _read(reply.weights)
        content[WEIGHTS] = to_arrays(weights)
    if reply.fisher is not None:
        content[FISHER] = to_arrays(reply.fisher)
    return content


def to_reply(message: Message, *, client: str, round: int) -> Reply:
    """What a message says, as the in-process loop would have it.

    client, round: whom the server asked, and in which round; used where the message does not say, as in Flower's own
    error messages. A content that cannot be read is a reply with an error: one client must not end the round.
    """
    if message.has_error():
        lines = (message.error.reason or "no reason given").strip().splitlines()  # may end a traceback
        return Reply(client, None, round, error=f"Flower error {message.error.code}: {lines[-1]}")
    try:
        return _from_content(message.content)
    except (FederationError, KeyError, TypeError, ValueError) as error:
        return Reply(client, None, round, error=f"its message cannot be read ({error})")


def _from_content(content: RecordDict) -> Reply:
    about = content.config_records[REPLY]
    arrays = content.array_records
    error = about.get("error")
    return Reply(
        client=str(about["client"]),
        weights=from_arrays(arrays[WEIGHTS]) if WEIGHTS in arrays else None,
        round=int(about["round"]),  # type: ignore[arg-type]
        samples=int(about["samples"]),  # type: ignore[arg-type]
        steps=int(about["steps"]),  # type: ignore[arg-type]
        seconds=float(about["seconds"]),  # type: ignore[arg-type]
        metrics={key: float(value) for key, value in content.metric_records[METRICS].items()},  # type: ignore[arg-type]
        fisher=from_arrays(arrays[FISHER]) if FISHER in arrays else None,
        error=None if error is None else str(error),
    )


def _read(path: str | PathLike[str]) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {
        name: checkpoint.reader(name)(0, info.numel, Buffer(info.nbytes)).reshape(info.shape)
        for name, info in checkpoint.tensors.items()
    }
