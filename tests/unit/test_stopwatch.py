"""The stopwatch: time that the kernel counts as waiting for a processor is left out, and no other time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support import clock
from tests.support.clock import Stopwatch


def test_time_without_a_processor_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a sleep of 50 ms, the thread waited 30 ms for a processor."""
    account = tmp_path / "schedstat"
    monkeypatch.setattr(clock, "ACCOUNT", account)
    account.write_text("5000000 1000000000 7\n")
    with Stopwatch() as watch:
        time.sleep(0.05)
        account.write_text("6000000 1030000000 9\n")
    assert watch.seconds == pytest.approx(watch.ended - watch.began - 0.03)
    assert watch.seconds >= 0.02


def test_without_an_account_everything_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other systems do not count the time."""
    monkeypatch.setattr(clock, "ACCOUNT", tmp_path / "none")
    with Stopwatch() as watch:
        time.sleep(0.01)
    assert watch.seconds == watch.ended - watch.began >= 0.01


@pytest.mark.skipif(not clock.ACCOUNT.exists(), reason="this system does not count the time")
def test_a_wait_is_not_left_out() -> None:
    """A thread that waits for anything but a processor is measured in full.

    On a busy machine, one of the attempts is.
    """

    def slept() -> float:
        with Stopwatch() as watch:
            time.sleep(0.1)
        return watch.seconds

    assert any(slept() >= 0.09 for _ in range(20))
