"""The ClientApp: one client of the federation, which its SuperNode's partition-id selects, trains and answers.

A client that raises answers with the reason, under its own name, as a client in one process does.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..clients import fit_all
from ..errors import FederationError
from ..replies import Client, Reply
from .arrays import REPLY, WEIGHTS, from_arrays, from_reply
from .settings import Settings, client_of
from .strategy import ROUND


def answer(client: Client, message: Message) -> Message:
    """Train from the model in the message, and return the message for the server."""
    weights = from_arrays(message.content.array_records[WEIGHTS])
    number = message.content.config_records[REPLY][ROUND]
    (reply,) = fit_all([client], weights, int(number))
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


def train(message: Message, context: Context) -> Message:
    """What a SuperNode runs in a round."""
    return answer(client_of(Settings.of(context.run_config), partition(context)), message)


def query(message: Message, context: Context) -> Message:
    """Say which client this is."""
    client = client_of(Settings.of(context.run_config), partition(context))
    return Message(from_reply(Reply(client.name, None, 0, samples=client.samples)), reply_to=message)


app = ClientApp()
app.train()(train)
app.query()(query)
