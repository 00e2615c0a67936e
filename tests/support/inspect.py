"""Access to private objects of the package: the only place of the tests that reaches in.

An *owner* is a breaker, its storage, or the core of the storage.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis._circuits.mode import Mode
from pybreaker_redis._engines import transaction
from pybreaker_redis._model.intents import Load, Reply
from pybreaker_redis._redis import url
from pybreaker_redis._redis.cluster import ClusterTopology
from pybreaker_redis._redis.connections import deadline, pool
from pybreaker_redis._replica import listener as listener_module
from pybreaker_redis._replica import session as session_module
from pybreaker_redis._replica.connection import CONNECTION_NAME, PushConnection
from pybreaker_redis._replica.listener import LISTENER_THREAD_NAME, Listener
from pybreaker_redis._replica.session import Session
from pybreaker_redis._runtime import fork, redaction
from pybreaker_redis._servers import server as server_module
from pybreaker_redis._servers import settings_check, table
from pybreaker_redis._servers.retry import RETRY_THREAD_NAME

# -- objects of a circuit ----------------------------------------------------------------------------------------------


def storage_of(breaker: Any) -> Any:
    """Return the storage of a breaker."""
    return breaker._state_storage


def state_object_of(breaker: Any) -> Any:
    """Return the state object that a breaker holds, without a look at its storage."""
    return breaker._state


def state_name_of(breaker: Any) -> str:
    """Return the name of the state that a breaker holds, without a look at its storage."""
    return state_object_of(breaker).name


def set_storage(breaker: Any, storage: Any) -> None:
    """Replace the storage of a breaker."""
    breaker._state_storage = storage


def core_of(owner: Any) -> Any:
    """Return what decides between the shared and the local circuit."""
    storage = getattr(owner, "_state_storage", owner)
    return getattr(storage, "_core", storage)


def shared_of(owner: Any) -> Any:
    """Return the shared circuit."""
    return core_of(owner).shared


def local_of(owner: Any) -> Any:
    """Return the local circuit."""
    return core_of(owner).local


def server_of(owner: Any) -> Any:
    """Return the server on which the circuit lies."""
    return core_of(owner).server


def faults_of(owner: Any) -> Any:
    """Return the availability of the circuit itself, apart from its server's."""
    return core_of(owner)._faults


def is_armed(breaker: pybreaker.CircuitBreaker) -> bool:
    """Whether no beat has to read the circuit of a breaker."""
    return view_of(breaker)._armed_trust is not None


def view_of(owner: Any) -> Any:
    """Return the view of the circuit."""
    return shared_of(owner)._view


def selector_of(owner: Any) -> Any:
    """Return the selector of engines."""
    return shared_of(owner).selector


def engine_of(owner: Any) -> Any:
    """Return the engine in use."""
    return selector_of(owner).current.engine


def keys_of(owner: Any) -> Any:
    """Return the keys of the circuit."""
    return selector_of(owner).current.keys


def subscription_of(owner: Any) -> Any:
    """Return the subscription of the circuit to its listener."""
    return shared_of(owner)._subscription


def listener_of(owner: Any) -> Any:
    """Return the listener of the circuit."""
    return subscription_of(owner)._listener


def locator_of(owner: Any) -> Any:
    """Return the locator of the circuit."""
    return core_of(owner)._locator


def located_client(owner: Any) -> Any:
    """Return the client by which the circuit is reached."""
    return locator_of(owner)._client


def pools_of(owner: Any) -> Any:
    """Return the pools of connections of the circuit's server, by timeout in seconds."""
    return server_of(owner)._connections._pools


def fast_path_of(storage: Any) -> Any:
    """Return the fast path that the storage reads."""
    return core_of(storage).fast_path


def timeout_of(storage: Any) -> float:
    """Return the timeout of a storage in seconds."""
    return core_of(storage).timeout


def lease_ms_of(owner: Any) -> float:
    """Return the lease of probes in milliseconds."""
    return getattr(owner, "_state_storage", owner)._core.lease_ms


def may_read(owner: Any) -> bool:
    """Return whether the circuit is followed although it cannot be written."""
    return core_of(owner).mode is Mode.FOLLOWING


def admission_of(breaker: pybreaker.CircuitBreaker, entered: Any = None) -> Any:
    """Return what the current call of this thread was admitted for.

    Args:
        breaker: The breaker.
        entered: Value of the call's ``with breaker.calling()``, which is a permit if the breaker settles calls.
    """
    if entered is not None:
        return entered.admission
    return storage_of(breaker)._admissions.tag_of(breaker._state).admission


def follower_of(breaker: Any) -> Any:
    """Return what follows the circuit for the listeners of a breaker that settles calls."""
    return breaker._guard._follower


def local_generation(owner: Any) -> int:
    """Return the generation in which the local circuit began."""
    return local_of(owner)._ledger.begun.generation


def circuit_name_of(shared: Any) -> str:
    """Return the name of a shared circuit."""
    return shared._name


def lock_of(item: Any) -> Any:
    """Return the lock of an object."""
    return item._lock


def condition_of(availability: Any) -> Any:
    """Return the condition on which threads wait for a change of an availability."""
    return availability._change


def set_lock(item: Any, lock: Any) -> None:
    """Replace the lock of an object."""
    item._lock = lock


# -- steps of a circuit ------------------------------------------------------------------------------------------------


def execute_intent(storage: Any, intent: Any) -> Any:
    """Execute an intent as the adapter does."""
    return core_of(storage).carry_out(intent)


def load_shared(owner: Any) -> Any:
    """Read the shared record, whatever the view holds."""
    core = core_of(owner)
    return core.shared._send(core.shared.selector.current or core._locate(), Load())


def locate(owner: Any) -> None:
    """Locate the circuit and join its server."""
    core_of(owner)._locate()


def lose_server(owner: Any) -> None:
    """Have the circuit use its local circuit, as a late thread does after the return."""
    core_of(owner)._enter(Mode.LOCAL)


def uses_shared(owner: Any) -> bool:
    """Return whether the shared circuit answers calls."""
    return core_of(owner).mode is Mode.SHARED


def fail_circuit(owner: Any, error: Exception, since: float | None = None) -> None:
    """Report an error of the circuit, of a call that began at `since` on the monotonic clock."""
    core_of(owner)._note_failure(error, time.monotonic() if since is None else since)


def record_replies(storage: Any) -> list[Any]:
    """Return a list that gets each reply to the storage's intents."""
    core, replies = core_of(storage), []
    carry_out = core.carry_out
    core.carry_out = lambda *arguments: (replies.append(reply := carry_out(*arguments)), reply)[1]
    return replies


def answer_intents(storage: Any, reply: Reply) -> None:
    """Answer all further intents of a storage with one reply."""
    core_of(storage).carry_out = lambda intent, budget=None: reply


def replace_shared_execution(monkeypatch: pytest.MonkeyPatch, owner: Any, run: Callable[[Any], Any]) -> None:
    """Replace what sends an intent to the shared circuit."""
    monkeypatch.setattr(core_of(owner), "_query_shared", run)


def after_next_look(monkeypatch: pytest.MonkeyPatch, storage: Any, then: Callable[[], object]) -> None:
    """Have something happen once, right after the next look of the storage's adapter at the circuit."""
    read = type(storage)._read_circuit

    def read_once(self: Any, *arguments: Any) -> Any:
        monkeypatch.undo()
        reply = read(self, *arguments)
        then()
        return reply

    monkeypatch.setattr(type(storage), "_read_circuit", read_once)


def set_memory_engine(storage: Any, engine: Any) -> None:
    """Replace the engine of a storage in memory."""
    core_of(storage)._engine = engine


def set_memory_circuit(engine: Any, circuit: Any) -> None:
    """Replace the circuit of an engine in memory."""
    engine._circuit = circuit


def note_interruption(*arguments: Any) -> Any:
    """Note that an exception from outside has ended a command."""
    return deadline._note_interruption(*arguments)


#: Where the steps of a transaction are, by what it does in them.
TRANSACTION_STEPS = {
    "reads": (transaction, "queue_reads"),
    "decides": (transaction, "decide"),
    "writes": (transaction.TransactionEngine, "_queue_writes"),
}


def before_transaction_step(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], object]) -> None:
    """Have something happen before each such step of a transaction, one of `TRANSACTION_STEPS`."""
    home, name = TRANSACTION_STEPS[step]
    original = getattr(home, name)
    monkeypatch.setattr(home, name, lambda *arguments: (act(), original(*arguments))[1])


# -- servers and outages -----------------------------------------------------------------------------------------------


def retry_threads() -> list[threading.Thread]:
    """Return the threads of this process that query an unreachable server again."""
    return [thread for thread in threading.enumerate() if thread.name == RETRY_THREAD_NAME]


def server_table() -> Any:
    """Return the table of all servers of this process."""
    return table._servers


def members_of(server: Any) -> Collection[Any]:
    """Return the members of a server."""
    return server._members


def first_client_of(server: Any) -> Any:
    """Return the client by which a server was first met."""
    return server._client


def release_members() -> None:
    """Release the members of all servers, so that no thread retries for an earlier test."""
    for server in [*table._servers._server_by_key.values()]:
        with server._lock:
            server._members.clear()


def attempt_return(server: Any, outage: Any) -> None:
    """Query the server once more and have its members return."""
    server._attempt_return(outage)


def start_retry_thread(server: Any) -> bool:
    """Start the thread that queries the server again, and return whether it runs."""
    return server._ensure_retry_thread()


def replace_retry_thread(monkeypatch: pytest.MonkeyPatch, server: Any, *, runs: bool) -> None:
    """Replace the start of the server's thread for retries by a fixed outcome."""
    monkeypatch.setattr(server, "_ensure_retry_thread", lambda: runs)


def spare_count(spare: Any) -> int:
    """Return the number of connections on a stack of spare ones."""
    return len(spare._spare)


def reset_in_child(item: Any) -> None:
    """Renew an object as a fork does in the child."""
    item._renew_in_child()


def pretend_fork() -> None:
    """Make this process look like a child that was forked without Python's hooks."""
    fork.process_id = -1


def outage_log_of(owner: Any) -> Any:
    """Return what limits the log lines about outages of a server or a circuit."""
    core = core_of(owner)
    return core._fault_log if hasattr(core, "_fault_log") else core._loss_log


def end_log_window(owner: Any) -> None:
    """End the time in which further outages are only counted."""
    outage_log_of(owner)._window_ends_at = 0.0


def replace_retry_start(monkeypatch: pytest.MonkeyPatch, start: Callable[[Any], bool]) -> None:
    """Replace what starts the thread for retries of any server."""
    monkeypatch.setattr(server_module.Server, "_ensure_retry_thread", start)


def replace_client_copy(monkeypatch: pytest.MonkeyPatch, copy: Callable[..., Any]) -> None:
    """Replace what copies a client for another timeout."""
    monkeypatch.setattr(pool, "_copy_client", copy)


def settings_table() -> Any:
    """Return the table of settings that the storages of each circuit have."""
    return settings_check._table


def reset_settings_check() -> None:
    """Drop the settings of storages of earlier tests."""
    settings_check._table._users_by_place.clear()


def compared_circuits() -> Collection[Any]:
    """Return the circuits with settings to compare."""
    return settings_check._table._users_by_place


def idle_connections_of(pool: Any) -> list[Any]:
    """Return the open connections of a pool of this package that no command uses at present."""
    idle = [*pool.pool.queue, *pool.spare_connections._spare]
    return [connection for connection in idle if connection is not None and connection._sock is not None]


def connections_of(pool: Any) -> Collection[Any]:
    """Return the connections of a pool, in use or not."""
    return getattr(pool, "_connections", ())


def wrap_socket(socket: Any, wrapper: Callable[[Any], Any]) -> None:
    """Put another socket between a socket with a deadline and its own."""
    socket._wrapped = wrapper(socket._wrapped)


# -- clusters and URLs -------------------------------------------------------------------------------------------------


def set_located_client(locator: Any, client: Any) -> None:
    """Replace the client of a locator."""
    locator._client = client


def topology_of_locator(locator: Any) -> Any:
    """Return the topology of the cluster behind a locator."""
    return locator._cluster


def known_nodes(topology: Any) -> Collection[Any]:
    """Return the addresses of all nodes that the topology names."""
    return topology._known_nodes


def nodes_with_clients(topology: Any) -> Collection[Any]:
    """Return the addresses of nodes that the topology has a client for."""
    return topology._nodes


def seed_nodes(topology: Any) -> Collection[Any]:
    """Return the addresses that the topology began with."""
    return topology._seed_nodes


def set_seed_nodes(topology: Any, addresses: set[Any]) -> None:
    """Replace the addresses that the topology began with."""
    topology._seed_nodes = addresses


def expire_topology(topology: Any) -> None:
    """Have the next refresh query the nodes again."""
    topology._refreshed_at = 0


def replace_slot_query(monkeypatch: pytest.MonkeyPatch, query: Callable[[Any, Any, Any], Any]) -> None:
    """Replace what queries a node for slots.  The first argument is what was replaced."""
    ask = ClusterTopology._query_slots
    monkeypatch.setattr(ClusterTopology, "_query_slots", lambda self, address: query(ask, self, address))


def clients_by_url() -> Collection[Any]:
    """Return the URLs that have a shared client at present."""
    return url._clients


def parse_url(text: str) -> Any:
    """Return the parts of a URL."""
    return url._parse(text)


# -- push --------------------------------------------------------------------------------------------------------------


def listeners() -> list[threading.Thread]:
    """Return the listening threads of this process."""
    return [thread for thread in threading.enumerate() if thread.name == LISTENER_THREAD_NAME]


def listener_connections(client: redis.Redis) -> list[dict[str, str]]:
    """Return the connections of listeners, as the server lists them."""
    return [line for line in client.client_list() if line["name"] == CONNECTION_NAME]


def all_listeners() -> list[Any]:
    """Return the listeners of this process, running or not."""
    return [*listener_module._listeners._by_server.values()]


def release_subscribers() -> None:
    """Release the subscribers of all listeners, so that their threads end."""
    for listener in all_listeners():
        for item in listener.subscriber_table.snapshot():
            listener.subscriber_table.remove_subscriber(item.view)


def reset_listeners() -> None:
    """Drop the listeners of earlier tests."""
    listener_module._listeners._by_server.clear()


def shorten_listener_waits(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have listeners notice sooner than usual that their last subscriber has gone."""
    for module in (listener_module, session_module):
        patch.setattr(module, "LISTENER_WAIT_MAX_S", seconds)


def disable_resp3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have listeners use RESP2, whatever the client library can."""
    monkeypatch.setattr(PushConnection, "_connect_resp3", lambda self, origin: None)


def is_subscribed(owner: Any) -> bool:
    """Return whether the view of the circuit is kept current by push."""
    return view_of(owner)._is_subscribed


def channels_of(listener: Any) -> Collection[Any]:
    """Return the channels to which a listener is subscribed."""
    return listener.subscriber_table._of_channel


def allow_start_now(subscription: Any) -> None:
    """Have the next call start the listener, although its thread has just ended."""
    subscription._next_start_at = 0.0


def crash_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the threads of listeners end by an exception when their connection is lost."""
    monkeypatch.setattr(Listener, "_unsubscribe_views", lambda self: 1 / 0)


def hold_listener_pauses(monkeypatch: pytest.MonkeyPatch, until: threading.Event) -> None:
    """Have listeners wait for an event before each pause."""
    pause = Listener._pause
    monkeypatch.setattr(Listener, "_pause", lambda self, seconds: until.wait(10) and pause(self, seconds))


def hang_sessions(monkeypatch: pytest.MonkeyPatch, beat: Callable[[Session], None]) -> None:
    """Replace the beat of sessions, which also drop what they receive."""
    monkeypatch.setattr(Session, "_beat", beat)
    monkeypatch.setattr(Session, "_receive", lambda self, push: None)


def forget_refusal(listener: Any) -> None:
    """Have the next refusal logged, as if a poll had been answered in between."""
    listener._is_refusal_logged = False


def record_pushes(monkeypatch: pytest.MonkeyPatch, connection: Any) -> list[Any]:
    """Return a list that gets each push of a connection."""
    receive, pushes = connection._on_push, []
    monkeypatch.setattr(connection, "_on_push", lambda push: (pushes.append(push), receive(push)))
    return pushes


def reconnect_quietly(connection: PushConnection) -> None:
    """Replace the socket behind a push connection, as redis-py does after an error."""
    connection._push_connection.disconnect()
    connection._push_connection.connect()


def file_descriptors_of(connection: PushConnection) -> list[int]:
    """Return the file descriptors of a push connection."""
    return [each._sock.fileno() for each in connection._connections]


def bare_connection(**attributes: Any) -> PushConnection:
    """Return a push connection of which only some private attributes are set."""
    return _bare(PushConnection, attributes)


def bare_session(**attributes: Any) -> Session:
    """Return a session of which only some private attributes are set."""
    return _bare(Session, attributes)


def _bare(made_of: type[Any], attributes: dict[str, Any]) -> Any:
    made = object.__new__(made_of)
    for name, value in attributes.items():
        setattr(made, f"_{name}", value)
    return made


def subscribe_session(session: Session, keys: Collection[str], channel: str) -> None:
    """Have a session take a channel and its keys for subscribed."""
    session._keys_by_channel = {channel: keys}
    session._channel_by_key = dict.fromkeys(keys, channel)


def receive_push(session: Session, push: Any) -> None:
    """Have a session receive a push."""
    session._receive(push)


def send_beat(session: Session) -> None:
    """Have a session check its connection."""
    session._beat()


def poll_once(session: Session, subscribers: Any = None) -> None:
    """Have a session poll some subscribers, by default all of them."""
    session._poll(session._subscriber_table.snapshot() if subscribers is None else subscribers)


def reread_changed(session: Session) -> None:
    """Have a session read what has changed."""
    session._reread_changed()


def delay_reread(session: Session, seconds: float) -> None:
    """Have a session read nothing again for some seconds."""
    session._reread_at = time.monotonic() + seconds


def changed_channels(session: Session, *, certainly: bool = True) -> set[str]:
    """Return the channels of circuits that a session has to read again."""
    return session._changed if certainly else session._changed | session._maybe_changed


# -- the process -------------------------------------------------------------------------------------------------------


def forget_secrets() -> None:
    """Drop the secrets of earlier tests."""
    redaction._patterns_of_secrets.clear()


def replace_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without secrets, and bring back those of other tests afterwards."""
    monkeypatch.setattr(redaction, "_patterns_of_secrets", {})


def count_secrets() -> int:
    """Return how many secrets are masked."""
    return len(redaction._patterns_of_secrets)


def replace_fork_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with no object that is renewed in child processes."""
    monkeypatch.setattr(fork, "_instances", weakref.WeakValueDictionary())
    monkeypatch.setattr(fork, "process_id", -1)


def replace_renewal_lock(monkeypatch: pytest.MonkeyPatch, lock: Any) -> None:
    """Replace the lock that a process takes after a fork to renew its objects."""
    monkeypatch.setitem(fork._renewal_locks, os.getpid(), lock)


def breakers_made_by(registry: Any) -> Collection[Any]:
    """Return the breakers that a registry has made."""
    return registry._breaker_by_name


def process_of(child: Any) -> Any:
    """Return the process of one of the demo's children."""
    return child._process


def child_of(stage: Any, name: str) -> Any:
    """Return one of the demo's children."""
    return stage._children[name]


def replace_stage_namespace(monkeypatch: pytest.MonkeyPatch, stage: Any, namespace: str) -> None:
    """Have the demo look for its circuit under another name."""
    monkeypatch.setattr(stage, "_namespace", namespace)


def scratch_of(server: Any) -> Any:
    """Return the temporary directory of a private server."""
    return server._scratch
