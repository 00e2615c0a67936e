"""What is done on one line, from its first subscription to its end?

Knows: views, the line to a server, when to poll.  Does not know: threads, what comes after.

* What scripts publish is handed to the circuit's views.
* Every beat, the circuits that were used since the last one are read again in one batch.  What was read as it is known
  may be believed for another `max_staleness`; anything else is forgotten, and the next caller asks.
* If the server tells of changes that nobody published, those circuits are read again at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pybreaker_redis import _said
from pybreaker_redis._circuit import CLOSED, Circuit
from pybreaker_redis._clock import monotonic, now_ms
from pybreaker_redis._line import Line, Push, refusal
from pybreaker_redis._record import MARK_FIELDS, Found, agrees, parse, parse_push, text
from pybreaker_redis._view import Ticket, View
from pybreaker_redis.errors import PushUnavailable

#: Beats in the time for which a record may be believed: so one of them may come late.
BEATS = 2

#: Longest wait until new circuits are noticed, seconds.
LONGEST_WAIT = 0.5

#: Shortest time between two looks at circuits that foreign writers change, seconds.
SHORTEST_WAIT = 0.01


@dataclass(frozen=True, slots=True)
class Hearing:
    """What is heard and polled for one view.

    Attributes:
        view: To be kept true.
        keys: Of its circuit, in the order of the scripts.
        channel: Of its circuit.
    """

    view: View
    keys: tuple[str, ...]
    channel: str


class Session:
    """The life of one line.

    Args:
        connect: Returns a line that tells of pushes to whom it is given.
        wanted: Returns all that is to be heard; asked again and again.  Nothing here keeps a view alive.
        unheard: Channels of which it was said that they are refused, on earlier lines, too; kept true from here.

    Attributes:
        line: The line; to be closed when the session is over.
        polled: Whether a poll was answered: the line has been of use.
    """

    def __init__(
        self,
        connect: Callable[[Callable[[Push], None]], Line],
        wanted: Callable[[], list[Hearing]],
        unheard: set[str],
    ) -> None:
        self.polled = False
        self._wanted = wanted
        self._unheard = unheard
        self._refused: set[str] = set()
        self._views: dict[str, weakref.WeakSet[View]] = {}
        self._channels: dict[str, str] = {}
        self._changed: set[str] = set()
        self._polled_at = 0.0
        self._awaits_pong = False
        self._agreed: weakref.WeakKeyDictionary[View, tuple[Circuit, tuple[Any, Any, Any]]]
        self._agreed = weakref.WeakKeyDictionary()
        self.line = connect(self._take)

    def serve(self) -> None:
        """Keep the views true as long as there are any.

        Raises:
            PushUnavailable: The server does not let this process hear.
            Exception: The line is dead.
        """
        next_beat = 0.0
        while (beat := self._admit_new()) is not None:
            # A circuit that came later may need beats that are shorter.
            next_beat = min(next_beat, monotonic() + beat)
            if monotonic() >= next_beat:
                next_beat = monotonic() + beat
                self._beat()
            wait = SHORTEST_WAIT if self._changed else LONGEST_WAIT
            self.line.listen(max(0.0, min(wait, next_beat - monotonic())))
            if self._changed and monotonic() >= self._polled_at + SHORTEST_WAIT:
                # What changes while these are read is for the next time.
                changed, self._changed = self._changed, set()
                self._poll(item for item in self._wanted() if item.channel in changed and item.view.is_believed)

    def _admit_new(self) -> float | None:
        """Begin to hear what is new, cease to hear what is gone.

        Returns:
            Seconds between two beats; ``None`` if nothing is left to be heard.
        """
        wanted = self._wanted()
        if not wanted:
            return None
        channels = {item.channel for item in wanted}
        if missing := channels - self._views.keys() - self._refused:
            self._subscribe(sorted(missing))
        if gone := self._views.keys() - channels:
            self.line.unsubscribe(sorted(gone))
            self._views = {channel: views for channel, views in self._views.items() if channel in channels}
            self._channels = {key: channel for key, channel in self._channels.items() if channel in channels}
        # One that left and has come back is known already, and was told that it is not heard.
        new = [
            item
            for item in wanted
            if item.channel not in self._refused
            and (item.view not in self._views.setdefault(item.channel, weakref.WeakSet()) or not item.view.is_heard_of)
        ]
        for item in new:
            self._views[item.channel].add(item.view)
            self._channels.update(dict.fromkeys(item.keys, item.channel))
            item.view.is_heard(True)
        if new:
            self._poll(new)
        return min(item.view.max_staleness for item in wanted) / BEATS

    def _subscribe(self, channels: list[str]) -> None:
        """Hear what may be heard: one circuit that this user may not hear of concerns no other."""
        try:
            self.line.subscribe(channels)
        except PushUnavailable as error:
            for channel in channels:
                try:
                    self.line.subscribe([channel])
                except PushUnavailable:
                    self._refused.add(channel)
            if not self._views and self._refused.issuperset(channels):
                raise
            for channel in sorted(self._refused - self._unheard):
                _said.unheard(f"channel {channel!r}", error)
            self._unheard |= self._refused
        self._unheard -= set(channels) - self._refused

    def _beat(self) -> None:
        if self._awaits_pong:
            msg = "the server has not answered a PING"
            raise TimeoutError(msg)
        self._awaits_pong = self.line.beat()
        self._poll(item for item in self._wanted() if item.view.shortcut.taken)

    def _take(self, push: Push) -> None:
        kind, *rest = push
        if text(kind) == "message":
            channel, payload = text(rest[0]) or "", parse_push(rest[1])
            for view in self._views.get(channel, ()):
                if payload is not None:
                    view.hear(*payload)
            # It was told with the record, so it need not be read.
            self._changed.discard(channel)
        elif text(kind) == "invalidate":
            # No keys: all of them, as after FLUSHALL.
            keys = self._channels if rest[0] is None else [text(key) or "" for key in rest[0]]
            self._changed.update(self._channels[key] for key in keys if key in self._channels)
        elif text(kind) == "pong":
            self._awaits_pong = False

    def _poll(self, hearings: Iterable[Hearing]) -> None:
        """Read circuits again, and the server's clock; with no circuits it is a sign of life."""
        asked = [(item, item.view.ticket()) for item in hearings]
        keys = [item.keys[1] for item, _ in asked]
        # The counters of all circuits in one command, but for those in a cluster.
        batches = [[key] for key in keys] if self.line.one_by_one else [keys] * bool(keys)
        # Whoever counts a failure shall not have to tell everybody.
        before = [("CLIENT", "CACHING", "NO")] if self.line.tracks else []
        commands: list[tuple[Any, ...]] = [("TIME",)]
        for batch in batches:
            commands += [*before, ("MGET", *batch)]
        counted = len(commands)
        for item, _ in asked:
            item.view.shortcut.taken = False
            commands.append(("MGET", item.keys[0], item.keys[3]))
            commands.append(("HMGET", item.keys[4], *MARK_FIELDS))
        before_ms = now_ms()
        answers = self.line.ask(commands)
        after_ms = now_ms()
        self._polled_at = monotonic()
        if not asked:
            return
        fail_counters = self._each_of(answers[1 + len(before) : counted : 1 + len(before)], len(asked))
        self.polled = self.polled or not all(isinstance(counter, Exception) for counter in fail_counters)
        server_ms, values = _milliseconds(answers[0]), answers[counted:]
        for (item, ticket), failures, plain, mark in zip(asked, fail_counters, values[::2], values[1::2], strict=True):
            known = item.view.known
            if known is None or isinstance(failures, Exception) or isinstance(plain, Exception):
                item.view.doubt(ticket)
            else:
                item.view.offset.learn(server_ms, before_ms, after_ms, waiting=known.state != CLOSED)
                self._judge(item.view, ticket, known, (failures, plain, mark), server_ms)

    def _each_of(self, answers: list[Any], number: int) -> list[Any]:
        """The counters, or what there is instead of one: of those in a cluster each may be gone to another node."""
        if self.line.one_by_one:
            return [answer if isinstance(answer, Exception) else answer[0] for answer in answers]
        (counters,) = answers
        if isinstance(counters, Exception):
            if len(self._views) == 1:
                # Whoever may not read what he hears of goes by nothing.
                raise refusal(counters)
            # By an ACL, perhaps of one of them: from now on each is asked for by itself.
            self.line.one_by_one = True
            return [counters] * number
        return list(counters)

    def _judge(self, view: View, ticket: Ticket, known: Circuit, read: tuple[Any, Any, Any], server_ms: int) -> None:
        # In steady state the same is read again and again: to think of it once is enough.
        if self._agreed.get(view) != (known, read):
            found = _found(*read)
            if not agrees(found, known, server_ms):
                view.doubt(ticket)
                return
            self._agreed[view] = known, read
        failures = int(read[0])
        view.confirm(ticket, server_ms, failures=failures, quiet=not failures and known.noisy_until_ms <= server_ms)


def _found(failures: Any, plain: Any, mark: Any) -> Found:
    is_hash = not isinstance(mark, Exception)
    # Successes count only while half-open, for the one who probes: he asks.
    values = (plain[0], failures, "0", plain[1])
    return parse(values, mark if is_hash else (None,) * len(MARK_FIELDS), mark_is_hash=is_hash)


def _milliseconds(answer: Any) -> int:
    seconds, microseconds = (int(part) for part in answer)
    return seconds * 1000 + microseconds // 1000
