"""Engine that executes each intent by one Lua script, in one round trip."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from pybreaker_redis._engines.base import LUA_MODE
from pybreaker_redis._engines.scripts import compose_script
from pybreaker_redis._model.answers import unusable_reply
from pybreaker_redis._model.circuit import (
    CLOSED,
    COUNT_LIMIT,
    LEASE_MAX_MS,
    NOISE_MAX_MS,
    OPEN,
    STATES,
    TIME_MAX_MS,
    Circuit,
)
from pybreaker_redis._model.codec import PROBE_TOKEN_PATTERN
from pybreaker_redis._model.intents import INTENTS, Intent, Reply
from pybreaker_redis._redis.classify import (
    MissingFeature,
    ScriptingUnavailableError,
    is_instance_of_named,
    is_unsupported_command,
)
from pybreaker_redis._redis.connections.spare import spare_connections_of

#: Arguments that all scripts share, in the order of ARGV.
SHARED_ARGUMENTS = (
    "state_if_missing",
    *("known_generation", "known_state", "known_opened_at_ms", "known_token", "known_until_ms", "known_lease_ms"),
    *("channel", "ttl_ms"),
)

#: Values of a script's reply, in their order.
REPLY_FIELDS = (
    *("accepted", "now_ms", "state", "fail_counter", "success_counter", "opened_at_ms", "generation"),
    *("probe_token", "probe_until_ms", "noisy_until_ms", "probe_lease_ms", "repair_note", "publish_error"),
)

#: Number of values in the reply of the fast lane, see `parse_lane_reply`.
LANE_REPLY_LENGTH = 3

#: Number that means "no generation" and "no time" in arguments and replies.
NO_VALUE = -1


def _getter_of(intent: type[Intent]) -> Callable[[Intent], tuple[Any, ...]]:
    names = [field.name for field in fields(intent)]
    if len(names) > 1:
        # In C, because each failed call gets five values.
        return attrgetter(*names)
    return lambda made: tuple(getattr(made, name) for name in names)


#: Functions that return the arguments of each operation, in the order of ARGV.
_VALUES_OF_INTENT = {intent: _getter_of(intent) for intent in INTENTS}


#: Function that returns what a caller knows of a circuit, in the order of ARGV, and the values of a caller without.
_values_known_of = attrgetter(
    *("generation", "state", "opened_at_ms", "probe_token", "probe_until_ms", "probe_lease_ms"),
)
_NEVER_READ = (NO_VALUE, "", NO_VALUE, "", 0, 0)


class LuaEngine:
    """Engine of a circuit in Redis that runs one script per intent.

    Args:
        client: Client of the server.
        keys: Keys of the circuit, in the order of the scripts.
        channel: Channel on which transitions and noise are published (empty: nothing is published).
        ttl_ms: Shortest time to live of an unused circuit, milliseconds (0: the circuit never expires).
        missing: Receives each feature that the server does not have, with the server's refusal (``None``: dropped).
    """

    mode = LUA_MODE

    def __init__(
        self,
        client: Any,
        keys: tuple[str, ...],
        channel: str = "",
        ttl_ms: int = 0,
        *,
        missing: deque[tuple[MissingFeature, str]] | None = None,
    ) -> None:
        self.client = client
        self._keys = keys
        self._publish_arguments = channel, ttl_ms
        spare = spare_connections_of(client)
        #: Function that executes a command, where possible without the bookkeeping of the pool.
        self._execute_command: Callable[..., object] = self._execute_by_client if spare is None else spare.execute
        #: Values of the last intent, and the arguments that were made of them.
        self._last: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        self._missing = missing
        #: Whether the server has EVALSHA.  False after the server has refused EVALSHA and executed EVAL.
        self._can_use_evalsha = True

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Run the intent's script, see `Engine.execute`.

        Args:
            intent: See `Engine.execute`.
            known: See `Engine.execute`.
            state_if_missing: See `Engine.execute`.

        Raises:
            ScriptingUnavailableError: The server has no EVAL, or forbids EVAL to this user.
            redis.RedisError: No reply, or an error reply, or the class of that name of the client's library.
            OSError: No connection.
            UnusableReplyError: A reply that the script does not return.
        """
        source, digest = compose_script(intent.operation)
        # Calls that fail in a row often send the same arguments, so the last ones are kept.
        values = digest, state_if_missing, _known_values(known), _VALUES_OF_INTENT[type(intent)](intent)
        last_values, arguments = self._last
        if last_values != values:
            known_arguments, own = _script_arguments(values[2]), _script_arguments(values[3])
            arguments = (*self._keys, state_if_missing, *known_arguments, *self._publish_arguments, *own)
            self._last = values, arguments
        try:
            reply, publish_error = parse_script_reply(self._run(source, digest, arguments), known)
        except Exception as error:
            # Older versions of fakeredis import lupa only when a script is to run.
            if is_unsupported_command(error, "eval") or isinstance(error, ModuleNotFoundError):
                raise ScriptingUnavailableError(str(error)) from error
            raise
        if publish_error:
            self._note_missing(MissingFeature.PUBLISH, publish_error)
        return reply

    def _execute_by_client(self, command: str, *arguments: Any) -> object:
        # By its method, which clients of clusters and of applications override.
        return getattr(self.client, command.lower())(*arguments)

    def _run(self, source: bytes, digest: str, arguments: tuple[Any, ...]) -> object:
        refusal = None
        if self._can_use_evalsha:
            try:
                answer = self._execute_command("EVALSHA", digest, len(self._keys), *arguments)
            except Exception as error:
                if is_unsupported_command(error, "evalsha"):
                    refusal = error
                elif not is_instance_of_named(error, "NoScriptError"):
                    raise
                # First use on this server, SCRIPT FLUSH, or a failover.  EVAL stores the script in the server's cache.
            else:
                return answer
        answer = self._execute_command("EVAL", source, len(self._keys), *arguments)
        if refusal is not None:
            self._can_use_evalsha = False
            self._note_missing(MissingFeature.EVALSHA, refusal)
        return answer

    def _note_missing(self, feature: MissingFeature, reason: object) -> None:
        if self._missing is not None:
            self._missing.append((feature, str(reason)))


def _known_values(circuit: Circuit | None) -> tuple[Any, ...]:
    return _NEVER_READ if circuit is None else _values_known_of(circuit)


def _script_arguments(values: Iterable[float | str | None]) -> list[int | str]:
    return [NO_VALUE if value is None else value if isinstance(value, str) else int(value) for value in values]


def parse_lane_reply(answer: Sequence[object], known: Circuit) -> Reply:
    """Parse the reply of the fast lane.  All that it does not contain is as the caller knows it.

    Args:
        answer: Reply of the client: server time, failures, end of the noise.
        known: Circuit as the caller knew it.

    Raises:
        UnusableReplyError: A reply that no lane returns.
    """
    now_ms, failures, noisy_ms = answer
    if not (
        isinstance(now_ms, int)
        and isinstance(failures, int)
        and isinstance(noisy_ms, int)
        and 0 <= now_ms <= TIME_MAX_MS
        and 0 <= failures < COUNT_LIMIT
        and 0 <= noisy_ms <= now_ms + NOISE_MAX_MS
    ):
        raise unusable_reply("a script", answer)
    circuit = Circuit(CLOSED, failures, 0, known.opened_at_ms, known.generation, noisy_until_ms=noisy_ms)
    return Reply(True, circuit, now_ms)


def parse_script_reply(answer: object, known: Circuit | None = None) -> tuple[Reply, str]:
    """Parse the reply of a script.

    Args:
        answer: Reply of the client.
        known: Circuit as the caller knew it (``None``: never read).

    Returns:
        The reply, and the error of PUBLISH or an empty text.

    Raises:
        UnusableReplyError: A reply that no script returns.
    """
    if isinstance(answer, list) and len(answer) == LANE_REPLY_LENGTH and known is not None:
        return parse_lane_reply(answer, known), ""
    # Inline, and not by functions: every reply takes this way.
    if not isinstance(answer, (list, tuple)) or len(answer) != len(REPLY_FIELDS):
        raise unusable_reply("a script", answer)
    accepted, now_ms, state, fails, successes, opened_at_ms, generation, token, *rest = answer
    until_ms, noisy_ms, lease_ms, repair_note, publish_error = rest
    texts = state, token, repair_note, publish_error
    if bytes in set(map(type, texts)):
        state, token, repair_note, publish_error = [
            text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text for text in texts
        ]
    numbers = accepted, now_ms, fails, successes, opened_at_ms, generation, until_ms, noisy_ms, lease_ms
    # One check of all types takes a third of the time of a check per value.
    is_sound = (
        set(map(type, numbers)) == {int}
        and set(map(type, (state, token, repair_note, publish_error))) == {str}
        and 0 <= accepted <= 1
        and 0 <= now_ms <= TIME_MAX_MS
        and state in STATES
        and 0 <= fails < COUNT_LIMIT
        and 0 <= successes < COUNT_LIMIT
        and 0 <= generation < COUNT_LIMIT
        # An open circuit has a time.  Without one, the next call would be admitted as a probe.
        and (0 if state == OPEN else NO_VALUE) <= opened_at_ms <= now_ms
        and PROBE_TOKEN_PATTERN.fullmatch(token)
        and 0 <= until_ms <= now_ms + LEASE_MAX_MS
        and 0 <= noisy_ms <= now_ms + NOISE_MAX_MS
        and 0 <= lease_ms <= LEASE_MAX_MS
    )
    if not is_sound:
        raise unusable_reply("a script", answer)
    circuit = Circuit(
        state=state,
        fail_counter=fails,
        success_counter=successes,
        opened_at_ms=None if opened_at_ms == NO_VALUE else opened_at_ms,
        generation=generation,
        probe_token=token,
        probe_until_ms=until_ms,
        noisy_until_ms=noisy_ms,
        probe_lease_ms=lease_ms,
    )
    return Reply(bool(accepted), circuit, now_ms, repair_note), publish_error
