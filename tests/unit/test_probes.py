"""Tokens of probes: those that this process has released, and when one may be used again."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time

import pytest

from pybreaker_redis._circuits.probes import PROBE_TOKENS, PROBE_TOKENS_MAX, ProbeTokens
from pybreaker_redis._model.circuit import HALF_OPEN, OPEN, Circuit
from pybreaker_redis._model.intents import (
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    RecordFailure,
    RecordSuccess,
    Reply,
    Trip,
)

#: Seconds within which a circuit recovers, on a busy machine.
SOON = 20


class TestReleasedTokens:
    """Tokens that no call of this process holds any longer."""

    def half_open(self, token: str) -> Reply:
        """Return a reply in which this token holds the probe for a long time."""
        circuit = Circuit(HALF_OPEN, generation=2, probe_token=token, probe_until_ms=1e15)
        return Reply(True, circuit, 1e12)

    def test_released_token_is_free_until_one_caller_takes_it(self) -> None:
        """Of many callers, exactly one takes the token."""
        probes = ProbeTokens()
        assert probes.mask_free_probe(self.half_open("a")).circuit.is_probe_leased(1e12)
        probes.release("a")
        assert not probes.mask_free_probe(self.half_open("a")).circuit.is_probe_leased(1e12)
        assert probes.mask_free_probe(self.half_open("b")).circuit.is_probe_leased(1e12)
        assert not probes.has_ended("b")
        assert [probes.take("a") for _ in range(3)] == [True, False, False]
        assert probes.has_ended("a")
        assert probes.mask_free_probe(self.half_open("a")).circuit.is_probe_leased(1e12)

    def test_no_token_is_never_taken(self) -> None:
        """Neither the empty token nor an unreleased one can be taken."""
        assert not ProbeTokens().take("")
        assert not ProbeTokens().take("a")

    def test_oldest_tokens_are_dropped_beyond_the_limit(self) -> None:
        """The memory of a process that runs for a year is bounded."""
        probes = ProbeTokens()
        for number in range(PROBE_TOKENS_MAX + 1):
            probes.release(str(number))
        assert not probes.take("0")
        assert probes.take("1")
        assert probes.take(str(PROBE_TOKENS_MAX))

    def test_child_of_a_fork_has_no_tokens(self) -> None:
        """Only the parent claims the probe again, not each of its children."""
        PROBE_TOKENS.release("inherited")
        pid = os.fork()
        if not pid:
            os._exit(int(PROBE_TOKENS.take("inherited")))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert PROBE_TOKENS.take("inherited")

    @pytest.mark.parametrize(
        ("intent", "accepted", "token_after", "is_released"),
        [
            (ClaimProbe(1, "a", 1), True, "a", False),
            (ClaimProbe(1, "a", 1), False, "b", True),
            (RecordFailure(2, "a"), True, "a", False),
            (RecordFailure(2, "a"), False, "a", True),
            (CountProbe(2, "a", 1), True, "a", False),
            (CountProbe(2, "a", 1, 3), True, "", True),
            (CountProbe(2, "a", 1), False, "a", True),
            (Close(2, "a"), True, "", True),
            (Trip(2, "a"), True, "", True),
            (RecordSuccess(2, "a"), True, "a", False),
        ],
    )
    def test_token_is_held_until_the_last_report_of_its_call(
        self, intent: Intent, accepted: bool, token_after: str, is_released: bool
    ) -> None:
        """A call that has reported holds no probe, whatever the result of the report."""
        probes = ProbeTokens()
        reply = Reply(accepted, Circuit(OPEN, probe_token=token_after), 0)
        assert probes.track(lambda _: reply, intent, "a") is reply
        assert probes.take("a") == is_released

    @pytest.mark.parametrize("accepted", [True, False])
    def test_replaced_token_stays_released(self, accepted: bool) -> None:
        """Another circuit may have given the answer, so the record may not have the new token."""
        probes = ProbeTokens()
        probes.release("a")
        assert probes.take("a")
        reply = Reply(accepted, Circuit(HALF_OPEN, probe_token="b"), 0)
        probes.track(lambda _: reply, ClaimProbe(1, "b", 1, "a"), "b")
        assert probes.take("a")
        assert probes.take("b") is not accepted

    @pytest.mark.parametrize(
        "intent",
        [
            *(ClaimProbe(1, "a", 1), RecordFailure(2, "a"), Trip(2, "a")),
            *(RecordSuccess(2, "a"), CountProbe(2, "a", 1), Close(2, "a")),
        ],
    )
    def test_token_is_released_after_an_exception_from_outside(self, intent: Intent) -> None:
        """A greenlet's timeout interrupts the wait for an answer, and the server may have applied the intent."""
        probes = ProbeTokens()

        def interrupted(_: Intent) -> Reply:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            probes.track(interrupted, intent, "a")
        assert probes.take("a")

    def test_tokens_released_by_many_threads_at_once_raise_nothing(self) -> None:
        """Guarded calls run `release`, so even the removal of the oldest tokens must not raise."""
        probes = ProbeTokens()
        errors: list[RuntimeError] = []
        ends = time.monotonic() + 1

        def release(name: int) -> None:
            try:
                for number in itertools.count():
                    probes.release(f"{name} {number}")
                    if errors or time.monotonic() > ends:
                        break
            except RuntimeError as error:
                errors.append(error)

        threads = [threading.Thread(target=release, args=(name,)) for name in range(8)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(SOON)
        finally:
            sys.setswitchinterval(interval)
        assert not errors
