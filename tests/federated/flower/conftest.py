from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(scope="module")
def identity() -> Iterator[None]:
    """Who this process is, which Flower sets in its own processes and without which no Message can be made."""
    task = pytest.importorskip("flwr.supercore.task_identity", exc_type=ImportError).TaskIdentity
    task.run_id, task.node_id, task.task_id = 1, 1, 1
    yield
    task._run_id = task._node_id = task._task_id = None


@pytest.fixture(scope="session")
def over_the_wire() -> Callable:
    """A function: the message as it leaves one process and enters another, deflated to bytes object by object."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    def send(message):
        contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
        arrived = inflate_object_from_contents(message.object_id, contents)
        arrived.metadata.__dict__["_message_id"] = message.object_id
        return arrived

    return send


@pytest.fixture(scope="session")
def answer(over_the_wire) -> Callable:
    """A function: this content as the reply of a client, received by the server."""
    from flwr.app import Message, RecordDict

    def reply(content):
        question = Message(RecordDict(), dst_node_id=7, message_type="train")
        return over_the_wire(Message(content, reply_to=question))

    return reply
