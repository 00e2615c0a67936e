"""Time budgets of calls and of operators' commands, and claims of probes."""

from __future__ import annotations

import pybreaker
import pytest

from pybreaker_redis import operators
from pybreaker_redis._circuits import budget as budget_module
from pybreaker_redis._circuits.budget import CallBudget, operator_wait, request_wait
from pybreaker_redis._circuits.local import LOCAL_GENERATION_MIN, LocalCircuit
from pybreaker_redis._circuits.probes import CLAIMS_PER_CIRCUIT_MAX, HeldProbes
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.intents import Load, RecordFailure
from pybreaker_redis._redis.connections.deadline import seconds_left
from pybreaker_redis.errors import StorageUnavailableError


class JobTimeout(Exception):
    """Time limit of a job."""


def test_request_waits_for_what_its_call_has_left() -> None:
    """Requests of one call share its timeout.  A request of no call has the whole timeout."""
    budget = CallBudget(spent_s=6.0, has_reported=False)
    with request_wait(budget, 10.0):
        assert 3 < (seconds_left() or 0) <= 4
    assert budget.spent_s >= 6.0
    with request_wait(None, 10.0):
        assert 9 < (seconds_left() or 0) <= 10
    with request_wait(budget, None):
        assert seconds_left() is None


def test_error_of_a_client_is_wrapped_for_an_operator() -> None:
    """The error has the circuits, the server, the limit and the cause."""
    cause = ConnectionError("refused")
    with pytest.raises(StorageUnavailableError) as raised, operator_wait(("a", "b"), lambda: "there:1/0", 2.0):
        raise cause
    error = raised.value
    assert (error.circuits, error.server, error.timeout, error.cause) == (("a", "b"), "there:1/0", 2.0, cause)


def test_interruption_behind_an_error_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client library may replace the exception that was raised into its wait."""
    outside = JobTimeout()
    monkeypatch.setattr(budget_module, "find_interruption", lambda error, handled: outside)
    with pytest.raises(JobTimeout), operator_wait(("a",), lambda: "", 2.0):
        raise ConnectionError


def test_claims_of_a_circuit_are_bounded() -> None:
    """The memory of a process that probes for a year is bounded."""
    probes = HeldProbes()
    for number in range(CLAIMS_PER_CIRCUIT_MAX + 1):
        probes.claim(str(number))
    assert not probes.is_held_here("0")
    assert probes.is_held_here(str(CLAIMS_PER_CIRCUIT_MAX))


def test_report_of_an_earlier_run_keeps_its_generation() -> None:
    """A call that another run of the local circuit admitted counts in no circuit."""
    local = LocalCircuit("closed", "closed")
    local.decide_locally(Load(), Circuit(), can_read=False)
    intent = RecordFailure(LOCAL_GENERATION_MIN, "")
    assert local.to_shared_intent(intent) is intent


def test_operators_refuse_a_breaker_of_another_storage() -> None:
    """A command on pybreaker's own storage would act in one process only."""
    breaker = pybreaker.CircuitBreaker(name="plain", state_storage=pybreaker.CircuitMemoryStorage("closed"))
    with pytest.raises(TypeError, match="'plain' has no storage of this package"):
        operators.reset(breaker)
