"""May I ask Redis now?

Knows: what errors mean, when Redis last failed, a monotonic clock.  Does not know: what was asked, who asks again.

Whatever a client raises, it is one of six things (`meaning_of`).  Two of them say something of the server, so that all
circuits of this process that live there are concerned; the others are a single circuit's own business.
"""

from __future__ import annotations

import enum
import math
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pybreaker_redis._forks import renew_in_children
from pybreaker_redis._secrets import described
from pybreaker_redis.errors import is_a

#: The first pause before Redis is asked again is shorter than this, seconds; each further one may be twice as long.
FIRST_PAUSE = 0.05
#: Longest pause, seconds: over so much time a fleet is spread that comes back.
LONGEST_PAUSE = 1.0
#: What is to be fresher than that has a shorter one, down to so many seconds.
SHORTEST_LONGEST_PAUSE = 0.1

#: The same where no thread asks, so that a caller has to do it, and to wait for the answer.
FIRST_TURN = 1.0
LONGEST_TURN = 30.0

#: Pause where a slot is under way, seconds: that does not take long, and to ask does not either.
MIGRATING_PAUSE = 0.1

#: How much longer each attempt may wait than the last one, if that got no answer in its time, up to so many seconds.
PATIENCE = 1.5
LONGEST_PATIENCE = 30.0


class Meaning(enum.Enum):
    """What an error says."""

    AWAY = "away"
    """Nobody answers, or not yet: of the server."""
    READ_ONLY = "read-only"
    """It answers, and takes no writes at present: of the server."""
    FORBIDDEN = "forbidden"
    """This user may not do this: of the circuit."""
    CONTENDED = "contended"
    """The server answers, and other writers were faster: of a single report."""
    MIGRATING = "migrating"
    """Its slot of a cluster is under way from one node to another: of the circuit."""
    FAULT = "fault"
    """What was sent or what came back makes no sense, or what was to give a client failed: of the circuit."""


#: Names of error classes, and what they mean; of a class's own and its ancestors' names the first that stands here
#: decides.  By name, because valkey's client and redis-py-cluster have classes of their own, called alike.
_OF_CLASSES = {
    "ReadOnlyError": Meaning.READ_ONLY,
    "OutOfMemoryError": Meaning.READ_ONLY,
    "NoPermissionError": Meaning.FORBIDDEN,
    # A server that is loading, a pool without a connection to spare, a wrong password: all of these are this, too.
    "ConnectionError": Meaning.AWAY,
    "TimeoutError": Meaning.AWAY,
    "ClusterError": Meaning.AWAY,
    # redis-py's class for MOVED is one of this kind, too.
    "AskError": Meaning.MIGRATING,
    "TryAgainError": Meaning.MIGRATING,
    "RedisClusterException": Meaning.AWAY,
    "ValkeyClusterException": Meaning.AWAY,
    "WatchError": Meaning.CONTENDED,
    "OSError": Meaning.AWAY,
}

#: First words of the server's own errors, and what they mean, where the client has no class for them.
_OF_CODES = {
    "READONLY": Meaning.READ_ONLY,
    "OOM": Meaning.READ_ONLY,
    "MISCONF": Meaning.READ_ONLY,
    "NOREPLICAS": Meaning.READ_ONLY,
    "NOPERM": Meaning.FORBIDDEN,
    "BUSY": Meaning.AWAY,
    "LOADING": Meaning.AWAY,
    "MASTERDOWN": Meaning.AWAY,
    "CLUSTERDOWN": Meaning.AWAY,
    "ASK": Meaning.MIGRATING,
    "MOVED": Meaning.MIGRATING,
    "TRYAGAIN": Meaning.MIGRATING,
    "NOAUTH": Meaning.AWAY,
    "WRONGPASS": Meaning.AWAY,
}


#: Parts of what servers say in their own words, and what they mean: of commands in scripts, and before any password.
_OF_PHRASES = {
    "permission": Meaning.FORBIDDEN,
    "can't access": Meaning.FORBIDDEN,
    "can't run this command": Meaning.FORBIDDEN,
    "unauthenticated": Meaning.AWAY,
}

#: A code begins an error, or, inside that of a script, the error of a command.
_CODE = re.compile(r"(?:^|[-@])([A-Z]+)\b")

#: What redis-py puts before the error of a command in a pipeline, with the command, ends like this.
_IN_PIPELINE = "of pipeline caused error: "


def meaning_of(error: BaseException) -> Meaning:
    """What an error means, of whatever client library."""
    for cls in type(error).__mro__:
        if cls.__name__ in _OF_CLASSES:
            return _OF_CLASSES[cls.__name__]
    if is_a(error, "ResponseError"):
        said = str(error).rpartition(_IN_PIPELINE)[2]
        for code in _CODE.findall(said):
            if code in _OF_CODES:
                return _OF_CODES[code]
        for phrase, meaning in _OF_PHRASES.items():
            if phrase in said:
                return meaning
    return Meaning.FAULT


def is_rejected(error: BaseException) -> bool:
    """Whether a server does not accept the credentials of a connection, or misses them."""
    if is_a(error, "AuthenticationError") or is_a(error, "AuthenticationWrongNumberOfArgsError"):
        return True
    return is_a(error, "ResponseError") and any(code in str(error) for code in ("NOAUTH", "WRONGPASS"))


#: Pauses that do not grow, seconds: the server answers at once, so a caller hardly waits.
_SHORT_PAUSES = {Meaning.MIGRATING: MIGRATING_PAUSE, Meaning.FORBIDDEN: FIRST_TURN}


@dataclass(frozen=True, slots=True)
class Outage:
    """What is the matter.

    Attributes:
        since: When it began, seconds on the guard's clock.
        meaning: Of the last error.
        error: The last one: its class and what it said.
        is_timeout: Whether that was that no answer came in time.
        attempts: How often Redis was asked in vain since.
        next_at: When it will be asked again, seconds on the guard's clock.
        patience: Seconds to wait for the answer then.
    """

    since: float
    meaning: Meaning
    error: str
    is_timeout: bool
    attempts: int
    next_at: float
    patience: float


class Guard:
    """Keeps callers away from what has just failed.

    As long as it is somebody's business to ask again (`kept`), callers never do.  Else one of them at a time has to.

    Args:
        timeout: Seconds to wait for an answer at first.
        kept: See below.
        clock: Seconds, monotonic.

    Attributes:
        outage: What is the matter; ``None`` while all is well.
        kept: Whether somebody else asks again, or will as soon as something fails.
        longest_pause: Until it is asked again by somebody else, seconds.
        returned_at: When the last outage ended; long ago if there was none.
        since: When this outage began, or the last one ended, or else this guard; seconds on `clock`.
        last_error: Of this or the last outage: its class and what it said; empty if there was none.
    """

    def __init__(self, timeout: float, *, kept: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.outage: Outage | None = None
        self.kept = kept
        self.clock = clock
        self.longest_pause = LONGEST_PAUSE
        self._timeout = timeout
        self._lock = threading.RLock()
        self.since = clock()
        self.last_error = ""
        self._turns = 0
        #: Whether somebody was told to ask, and has not come back yet.
        self._asked = False
        self.returned_at = -math.inf
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock, and whoever asked again was left behind."""
        self._lock = threading.RLock()
        self.kept = self._asked = False
        if self.outage is not None:
            self.outage = replace(self.outage, next_at=self.clock())

    def hurry(self, max_staleness: float) -> None:
        """Something has to be known again so many seconds after Redis is back, or twice as many."""
        if max_staleness:
            self.longest_pause = min(self.longest_pause, max(max_staleness, SHORTEST_LONGEST_PAUSE))

    def expect(self, timeout: float) -> None:
        """Wait so many seconds for an answer at first, if that is more than before."""
        self._timeout = max(self._timeout, timeout)

    def may_ask(self) -> bool:
        """Whether all is well, or nobody else asks again and it is the caller's turn."""
        return self.outage is None or (not self.kept and self.begin())

    def is_due(self) -> bool:
        """Whether somebody may ask, or might be told to: a look that tells nobody to."""
        outage = self.outage
        return outage is None or self.clock() >= outage.next_at

    def begin(self) -> bool:
        """Whether it is time to ask again; then nobody else is to, until that has ended."""
        with self._lock:
            outage = self.outage
            if outage is None or self.clock() < outage.next_at:
                return False
            self._asked = True
            # An attempt that has not ended after so long is no reason any more not to make another.
            self.outage = replace(outage, next_at=self.clock() + LONGEST_PATIENCE + outage.patience)
            return True

    def give_back(self) -> None:
        """The caller who was told to ask has not: another one may."""
        with self._lock:
            if self._asked and not self.kept and self.outage is not None:
                self._asked = False
                self.outage = replace(self.outage, next_at=self.clock() + FIRST_PAUSE)

    def failed(self, error: BaseException) -> Outage | None:
        """There was no usable answer.

        Returns:
            What is the matter, if all had been well until now.
        """
        meaning = meaning_of(error)
        with self._lock:
            now, before = self.clock(), self.outage
            self.last_error = described(error)
            if before and not self._asked:
                # Somebody who had asked before it was known that nobody answers; that is no further attempt.
                self.outage = replace(before, meaning=meaning, error=self.last_error)
                return None
            self._asked = False
            if before is None:
                # What fails again soon after it went well has not really gone well.
                self._turns = 0 if now - self.returned_at > LONGEST_TURN else self._turns + 1
                self.since = now
            else:
                self._turns += 1
            attempts = before.attempts + 1 if before else 0
            patience = before.patience if before else self._timeout
            if before and is_a(error, "TimeoutError"):
                patience = min(patience * PATIENCE, LONGEST_PATIENCE)
            self.outage = Outage(
                since=self.since,
                meaning=meaning,
                error=self.last_error,
                is_timeout=is_a(error, "TimeoutError"),
                attempts=attempts,
                next_at=now + (_SHORT_PAUSES.get(meaning) or self._pause(attempts)),
                patience=patience,
            )
            return None if before else self.outage

    def answered(self) -> float | None:
        """All is well.  Seconds that it was not, or ``None`` if it had been."""
        with self._lock:
            outage, self.outage, self._asked = self.outage, None, False
            # Two first answers may have come together; then the other one has taken it.
            if outage is None:
                return None
            self.since = self.returned_at = self.clock()
            return self.since - outage.since

    def keep(self, kept: bool) -> Outage | None:
        """Somebody else asks again from now on, or nobody does; what is the matter, if anything is."""
        with self._lock:
            self.kept = kept
            if self.outage is not None:
                self.outage = replace(self.outage, next_at=self.clock() + self._pause(self.outage.attempts))
            return self.outage

    def _pause(self, attempts: int) -> float:
        if self.kept:
            # "Full jitter": M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
            return random.uniform(0, min(self.longest_pause, FIRST_PAUSE * 2 ** min(attempts, 30)))
        return min(LONGEST_TURN, FIRST_TURN * 2.0 ** min(self._turns, 30))
