"""How does an intent become one atomic step on a server that runs Lua?

Knows: the scripts, their arguments and answers, EVALSHA and NOSCRIPT.  Does not know: what an intent is for.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from functools import cache
from importlib import resources
from typing import Any

from pybreaker_redis._answers import NONE, script_reply
from pybreaker_redis._carrier import Lack, Reply, SayLack
from pybreaker_redis._circuit import Circuit
from pybreaker_redis._intents import INTENTS, Intent
from pybreaker_redis.errors import ScriptingUnavailable, is_a, lacks

#: The arguments of each script, in their order.
_ARGUMENTS = {intent: tuple(field.name for field in fields(intent)) for intent in INTENTS}


class LuaCarrier:
    """A circuit in Redis, moved by one script per intent: one round trip each.

    Args:
        client: Of the server.
        keys: Of the circuit, in the order of the scripts.
        channel: On which those who listen are told when the circuit moves or gets noisy; empty: nobody is told.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
        say_lack: Told what the server does not have, each time that it is missed.
    """

    mode = "lua"

    def __init__(
        self,
        client: Any,
        keys: tuple[str, ...],
        channel: str = "",
        ttl_ms: int = 0,
        *,
        say_lack: SayLack = lambda lack, reason: None,
    ) -> None:
        self.client = client
        self._keys = keys
        self._told = channel, ttl_ms
        self._say_lack = say_lack
        #: Whether the server knows scripts by their names.
        self._knows_names = True

    def execute(self, intent: Intent, known: Circuit | None, create: str) -> Reply:
        """Run the intent's script; see `Carrier.execute`.

        Raises:
            ScriptingUnavailable: The server has neither EVALSHA nor EVAL, or forbids them to this user.
            redis.exceptions.RedisError: No usable answer.
            UnusableAnswer: An answer that is none of the script's.
        """
        source, digest = script(intent.script)
        own = [_argument(getattr(intent, name)) for name in _ARGUMENTS[type(intent)]]
        arguments = (*self._keys, create, *_known(known), *self._told, *own)
        try:
            reply, unheard = script_reply(self._run(source, digest, arguments))
        except Exception as error:
            # Older versions of fakeredis look for lupa only when a script is to run.
            if lacks(error, "eval") or isinstance(error, ModuleNotFoundError):
                raise ScriptingUnavailable(str(error)) from error
            raise
        if unheard:
            self._say_lack(Lack.PUBLISHING, unheard)
        return reply

    def _run(self, source: bytes, digest: str, arguments: tuple[Any, ...]) -> object:
        missed = None
        if self._knows_names:
            try:
                answer: object = self.client.evalsha(digest, len(self._keys), *arguments)
            except Exception as error:
                if lacks(error, "evalsha"):
                    missed = error
                elif not is_a(error, "NoScriptError"):
                    raise
                # First use on this server, or SCRIPT FLUSH, or a failover: EVAL leaves the script in the cache.
            else:
                return answer
        answer = self.client.eval(source, len(self._keys), *arguments)
        if missed is not None:
            self._knows_names = False
            self._say_lack(Lack.NAMES, missed)
        return answer


@cache
def script(name: str) -> tuple[bytes, str]:
    """Source and SHA-1 of a script: `circuit.lua`, which they all share, and the intent's own file behind it.

    Bytes: a client may have an encoding that does not have all of its characters.
    """
    folder = resources.files(__package__) / "lua"
    source = b"\n".join((folder / f"{part}.lua").read_bytes() for part in ("circuit", name))
    return source, hashlib.sha1(source, usedforsecurity=False).hexdigest()


def _known(circuit: Circuit | None) -> tuple[int | str, ...]:
    if circuit is None:
        return NONE, "", NONE, "", 0, 0
    return (
        circuit.generation,
        circuit.state,
        _argument(circuit.opened_at_ms),
        circuit.probe_token,
        _argument(circuit.probe_until_ms),
        _argument(circuit.probe_lease_ms),
    )


def _argument(value: float | str | None) -> int | str:
    if value is None:
        return NONE
    return value if isinstance(value, str) else int(value)
