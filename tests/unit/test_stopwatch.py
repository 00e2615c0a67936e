"""The stopwatch: it leaves out what the kernel says, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support import clock
from tests.support.clock import Stopwatch


def test_time_without_a_processor_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a sleep of 50 ms, 30 ms were the machine's."""
    account = tmp_path / "schedstat"
    monkeypatch.setattr(clock, "ACCOUNT", account)
    account.write_text("5000000 1000000000 7\n")
    with Stopwatch() as watch:
        time.sleep(0.05)
        account.write_text("6000000 1030000000 9\n")
    assert watch.seconds == pytest.approx(watch.ended - watch.began - 0.03)
    assert watch.seconds >= 0.02


def test_without_an_account_everything_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other systems keep none."""
    monkeypatch.setattr(clock, "ACCOUNT", tmp_path / "none")
    with Stopwatch() as watch:
        time.sleep(0.01)
    assert watch.seconds == watch.ended - watch.began >= 0.01


@pytest.mark.skipif(not clock.ACCOUNT.exists(), reason="nobody counts it here")
def test_a_wait_is_not_left_out() -> None:
    """A thread that waits for something else could not have run; on a busy machine some attempt is long enough."""

    def slept() -> float:
        with Stopwatch() as watch:
            time.sleep(0.1)
        return watch.seconds

    assert any(slept() >= 0.09 for _ in range(20))
