"""How does an intent become one atomic step on a server that runs Lua?

Knows: the scripts, their arguments and answers, EVALSHA and NOSCRIPT.  Does not know: what an intent is for.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from functools import cache
from importlib import resources
from typing import Any

from pybreaker_redis._answers import NO_VALUE, parse_script_reply
from pybreaker_redis._carrier import MissingFeature, NoteMissingFeature, Reply
from pybreaker_redis._circuit import Circuit
from pybreaker_redis._intents import INTENTS, Intent
from pybreaker_redis.errors import ScriptingUnavailableError, is_instance_of_named, is_unsupported_command

#: The arguments of each script, in their order.
_FIELDS_OF_INTENT = {intent: tuple(field.name for field in fields(intent)) for intent in INTENTS}


class LuaEngine:
    """A circuit in Redis, moved by one script per intent: one round trip each.

    Args:
        client: Of the server.
        keys: Of the circuit, in the order of the scripts.
        channel: On which those who listen are told when the circuit moves or gets noisy; empty: nobody is told.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
        note_missing_feature: Told what the server does not have, each time that it is missed.
    """

    mode = "lua"

    def __init__(
        self,
        client: Any,
        keys: tuple[str, ...],
        channel: str = "",
        ttl_ms: int = 0,
        *,
        note_missing_feature: NoteMissingFeature = lambda lack, reason: None,
    ) -> None:
        self.client = client
        self._keys = keys
        self._publish_arguments = channel, ttl_ms
        self._note_missing_feature = note_missing_feature
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
            self._note_missing_feature(MissingFeature.PUBLISH, unheard)
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
            self._note_missing_feature(MissingFeature.EVALSHA, missed)
        return answer


@cache
def compose_script(name: str) -> tuple[bytes, str]:
    """Source and SHA-1 of a script: `circuit.lua`, which they all share, and the intent's own file behind it.

    Bytes: a client may have an encoding that does not have all of its characters.
    """
    folder = resources.files(__package__) / "lua"
    source = b"\n".join((folder / f"{part}.lua").read_bytes() for part in ("circuit", name))
    return source, hashlib.sha1(source, usedforsecurity=False).hexdigest()


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
