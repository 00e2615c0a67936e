"""Which commands the running thread sends one by one to the server of a client, on any connection of its class."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

#: Commands by which connections introduce themselves.
GREETINGS = frozenset(("AUTH", "CLIENT", "HELLO", "SELECT"))


@contextlib.contextmanager
def commands_sent(client: Any) -> Iterator[list[str]]:
    """Record the names of commands, but for greetings and what pipelines send.

    A storage has connections and clients of its own, whose class descends from that of the client's connections.
    """
    connection_class, caller, sent = client.connection_pool.connection_class, threading.get_ident(), []
    send_command = connection_class.send_command

    def record(self: Any, *words: Any, **options: Any) -> Any:
        if threading.get_ident() == caller and words[0] not in GREETINGS:
            sent.append(words[0])
        return send_command(self, *words, **options)

    with mock.patch.object(connection_class, "send_command", record):
        yield sent
