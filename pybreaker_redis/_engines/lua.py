"""How does an intent become one atomic step on a server that runs Lua?

Knows: the scripts, their arguments and answers, EVALSHA and NOSCRIPT.  Does not know: what an intent is for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from typing import Any

from pybreaker_redis._engines.base import LUA_MODE
from pybreaker_redis._engines.scripts import compose_script
from pybreaker_redis._model.answers import _unusable, checked_sequence
from pybreaker_redis._model.circuit import COUNT_LIMIT, LEASE_MAX_MS, NOISE_MAX_MS, OPEN, STATES, TIME_MAX_MS, Circuit
from pybreaker_redis._model.codec import PROBE_TOKEN_PATTERN, to_text
from pybreaker_redis._model.intents import INTENTS, Intent, Reply
from pybreaker_redis._redis.classify import (
    MissingFeature,
    ScriptingUnavailableError,
    is_instance_of_named,
    is_unsupported_command,
)

#: The arguments of each script, in their order.
_FIELDS_OF_INTENT = {intent: tuple(field.name for field in fields(intent)) for intent in INTENTS}


class LuaEngine:
    """A circuit in Redis, moved by one script per intent: one round trip each.

    Args:
        client: Of the server.
        keys: Of the circuit, in the order of the scripts.
        channel: On which those who listen are told when the circuit moves or gets noisy; empty: nobody is told.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
        missing: Receives each feature that the server does not have, with the server's refusal; ``None``: dropped.
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
        self._missing = missing
        #: Whether the server knows scripts by their names.
        self._can_use_evalsha = True

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Run the intent's script; see `Engine.execute`.

        Raises:
            ScriptingUnavailableError: The server has neither EVALSHA nor EVAL, or forbids them to this user.
            redis.exceptions.RedisError: No usable answer.
            UnusableReplyError: An answer that is none of the script's.
        """
        source, digest = compose_script(intent.operation)
        own = [_script_argument(getattr(intent, name)) for name in _FIELDS_OF_INTENT[type(intent)]]
        arguments = (*self._keys, state_if_missing, *_known_arguments(known), *self._publish_arguments, *own)
        try:
            reply, unheard = parse_script_reply(self._run(source, digest, arguments))
        except Exception as error:
            # Older versions of fakeredis look for lupa only when a script is to run.
            if is_unsupported_command(error, "eval") or isinstance(error, ModuleNotFoundError):
                raise ScriptingUnavailableError(str(error)) from error
            raise
        if unheard:
            self._note_missing(MissingFeature.PUBLISH, unheard)
        return reply

    def _run(self, source: bytes, digest: str, arguments: tuple[Any, ...]) -> object:
        missed = None
        if self._can_use_evalsha:
            try:
                answer: object = self.client.evalsha(digest, len(self._keys), *arguments)
            except Exception as error:
                if is_unsupported_command(error, "evalsha"):
                    missed = error
                elif not is_instance_of_named(error, "NoScriptError"):
                    raise
                # First use on this server, or SCRIPT FLUSH, or a failover: EVAL leaves the script in the cache.
            else:
                return answer
        answer = self.client.eval(source, len(self._keys), *arguments)
        if missed is not None:
            self._can_use_evalsha = False
            self._note_missing(MissingFeature.EVALSHA, missed)
        return answer

    def _note_missing(self, feature: MissingFeature, reason: object) -> None:
        if self._missing is not None:
            self._missing.append((feature, str(reason)))


def _known_arguments(circuit: Circuit | None) -> tuple[int | str, ...]:
    if circuit is None:
        return NO_VALUE, "", NO_VALUE, "", 0, 0
    return (
        circuit.generation,
        circuit.state,
        _script_argument(circuit.opened_at_ms),
        circuit.probe_token,
        _script_argument(circuit.probe_until_ms),
        _script_argument(circuit.probe_lease_ms),
    )


def _script_argument(value: float | str | None) -> int | str:
    if value is None:
        return NO_VALUE
    return value if isinstance(value, str) else int(value)


#: How scripts and their arguments spell "by hand" and "never".
NO_VALUE = -1


#: How many values a script returns.
_VALUES = 13


def parse_script_reply(answer: object) -> tuple[Reply, str]:
    """Return the answer of a script, and why PUBLISH was refused or an empty text.

    Raises:
        UnusableReplyError: An answer that no script returns.
    """
    accepted, now_ms, state, fails, successes, opened_at_ms, generation, token, *rest = checked_sequence(
        "a script", answer, _VALUES
    )
    until_ms, noisy_ms, lease_ms, event, unheard = rest
    texts = state, token, event, unheard
    if bytes in set(map(type, texts)):
        state, token, event, unheard = map(to_text, texts)
    numbers = accepted, now_ms, fails, successes, opened_at_ms, generation, until_ms, noisy_ms, lease_ms
    # One look at all types costs a third of one at each value.
    is_sound = (
        set(map(type, numbers)) == {int}
        and set(map(type, (state, token, event, unheard))) == {str}
        and 0 <= accepted <= 1
        and 0 <= now_ms <= TIME_MAX_MS
        and state in STATES
        and 0 <= fails < COUNT_LIMIT
        and 0 <= successes < COUNT_LIMIT
        and 0 <= generation < COUNT_LIMIT
        # An open circuit has a time: without it a probe would pass at once.
        and (0 if state == OPEN else NO_VALUE) <= opened_at_ms <= now_ms
        and PROBE_TOKEN_PATTERN.fullmatch(token)
        and 0 <= until_ms <= now_ms + LEASE_MAX_MS
        and 0 <= noisy_ms <= now_ms + NOISE_MAX_MS
        and 0 <= lease_ms <= LEASE_MAX_MS
    )
    if not is_sound:
        raise _unusable("a script", answer)
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
    return Reply(bool(accepted), circuit, now_ms, event), unheard
