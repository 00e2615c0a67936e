"""Benchmark: time of the script of a failing call at the server, with its fast lane and without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from benchmarks.figures import Spread, short, table
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.scripts import compose_script
from pybreaker_redis._model.circuit import CLOSED, NOISE_DURATION_MS, Circuit
from pybreaker_redis._model.intents import Load, RecordFailure
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer

#: Scripts in one pipeline.  More would outlast half of the noise, and the lane needs noise.
SCRIPTS = 2000

#: Threshold that no count reaches.
NEVER = 10**9


def test_scripts(quick: bool, server: PrivateServer, show: Callable[[str], None]) -> None:
    """The scripts follow each other without a pause, so the caches of the CPU are warm."""
    rounds = 3 if quick else 20
    composed = compose_script("record_failure").source.decode()
    sources = {"with the lane": composed, "without the lane": composed[composed.index("local LEASE_MAX_MS") :]}
    taken: dict[str, list[float]] = {name: [] for name in sources}
    keys = circuit_keys("scripts", needs_one_slot=False)
    with contextlib.closing(server.client()) as client:
        engine = LuaEngine(client, keys)
        for _ in range(rounds):
            for name, source in sources.items():
                digest = client.script_load(source)
                client.delete(*keys)
                engine.execute(Load(), None, CLOSED)
                engine.execute(RecordFailure(0, "", NOISE_DURATION_MS), Circuit(), CLOSED)
                known = ("closed", 0, "closed", -1, "", 0, 0, "", 0)
                client.config_resetstat()
                with client.pipeline(transaction=False) as pipe:
                    for _ in range(SCRIPTS):
                        pipe.evalsha(digest, len(keys), *keys, *known, 0, "", NOISE_DURATION_MS, 1, NEVER)
                    pipe.execute()
                taken[name].append(client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])
                assert int(client.get(keys.fail_counter)) == SCRIPTS + 1
    rows = [[name, f"{short(Spread.of(values).median)} µs"] for name, values in taken.items()]
    show(table("Script of a failing call, at the server", ["", "time"], rows))
