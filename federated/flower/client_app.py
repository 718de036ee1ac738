"""The ClientApp: one client of the federation, which its SuperNode's partition-id selects, trains and answers.

    app = client_app(build)    # build(run_config, partition_id) -> Client

A client that raises answers with the reason, under its own name, as a client in one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..clients import fit_all
from ..errors import FederationError
from ..replies import Client, Reply
from .arrays import REPLY, WEIGHTS, from_arrays, from_reply
from .strategy import ROUND


def answer(client: Client, message: Message) -> Message:
    """Train from the model in the message, and return the message for the server."""
    weights = from_arrays(message.content.array_records[WEIGHTS])
    number = message.content.config_records[REPLY][ROUND]
    (reply,) = fit_all([client], weights, int(number))  # type: ignore[arg-type]
    return Message(from_reply(reply), reply_to=message)


def partition(context: Context) -> int:
    """Return which client this SuperNode is. Raises FederationError if it was not told."""
    index = context.node_config.get("partition-id")
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise FederationError(
            f"flower: this SuperNode's partition-id is {index!r}; start it with --node-config 'partition-id=0' for the "
            "first client, 1 for the second, and so on."
        )
    return index


def client_app(build: Callable[[Mapping[str, Any], int], Client]) -> ClientApp:
    """Return the ClientApp of the client that `build` makes from the run's configuration and the partition-id."""

    def client_of(context: Context) -> Client:
        return build(context.run_config, partition(context))

    def train(message: Message, context: Context) -> Message:
        return answer(client_of(context), message)

    def query(message: Message, context: Context) -> Message:
        return Message(from_reply(Reply(client_of(context).name, None, 0)), reply_to=message)

    app = ClientApp()
    app.train()(train)
    app.query()(query)
    return app
