"""The federations of `mergesolve federate` over Flower: the same protocols, recipes and server steps.

`flwr run` names the two apps that are made here; a federation of one's own needs only two other functions.
"""

from collections.abc import Mapping
from typing import Any

from mergesolve.cli.federate import read_recipe
from mergesolve.cli.federating import FederationSetup
from mergesolve.federated import Client, Federation, FederationError
from mergesolve.federated.flower.client_app import client_app
from mergesolve.federated.flower.server_app import server_app


def setup(config: Mapping[str, Any]) -> FederationSetup:
    """What `mergesolve federate RECIPE --protocol ... --step ... --client ... --seed ... --set ...` would set up."""
    flags: dict[str, Any] = dict.fromkeys(("rounds", "images", "server_images", "labels", "reference"))
    flags |= {key: config[key] or None for key in ("protocol", "step")}
    flags |= {"seed": config["seed"], "faults": ()}
    flags |= {"clients": tuple(config["clients"].split()), "sets": tuple(config["set"].split())}
    found = FederationSetup(read_recipe(config["recipe"] or None, None, flags))
    found.check()
    return found


def federation(config: Mapping[str, Any]) -> Federation:
    """Everything, for the server."""
    return setup(config).federation


def client(config: Mapping[str, Any], index: int) -> Client:
    """One client, for its SuperNode."""
    clients = setup(config).clients
    if index >= len(clients):
        raise FederationError(
            f"flower: this SuperNode's partition-id is {index}, and the federation has {len(clients)} clients; the "
            f"largest partition-id is {len(clients) - 1}."
        )
    return clients[index]


server_side = server_app(federation)
client_side = client_app(client)
