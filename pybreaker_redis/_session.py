"""What is done on one line, from its first subscription to its end?

Knows: views, the line to a server, when to poll.  Does not know: threads, what comes after.

* A record that a script publishes is a hint: unless it marks noise only, the circuit is read again at once, and what
  was read fills the view like any answer.  There is one read of this kind each `REREAD_EVERY_S` on average, at most.
* Every beat, the circuits that were used since the last one are read again in one batch.  What was read as it is known
  may be believed for another `max_staleness`.
* If the server tells of changes that were not published, those circuits are read again at once, too.
* A record that would have to be repaired, adopted or restored is left to the next caller's script; until then the view
  is doubted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from pybreaker_redis import _said
from pybreaker_redis._answers import milliseconds
from pybreaker_redis._circuit import CLOSED, Circuit
from pybreaker_redis._clock import moment, monotonic
from pybreaker_redis._hearings import Hearing, Hearings
from pybreaker_redis._line import Line, Push, refusal
from pybreaker_redis._record import MARK_FIELDS, Found, is_same_but_counters, parse, parse_push, sound, text
from pybreaker_redis._view import Ticket, View
from pybreaker_redis.errors import PushUnavailable

#: Beats in the time for which a record may be believed: so one of them may come late.
BEATS = 2

#: Longest wait until new circuits are noticed, seconds.
LONGEST_WAIT = 0.5

#: Seconds between two reads of circuits that were reported changed, on average, whatever is published.
REREAD_EVERY_S = 0.01

#: Reads of that kind that may follow one another at once after a quiet time: a move by hand publishes twice within a
#: millisecond, and so does a probe that succeeds.
REREADS_AT_ONCE = 5


class Session:
    """The life of one line.

    Args:
        connect: Returns a line that tells of pushes to whom it is given.
        hearings: All that is to be heard.  Nothing here keeps a view alive.
        unheard: Channels of which it was said that they are refused, on earlier lines, too; kept true from here.

    Attributes:
        line: The line; to be closed when the session is over.
        polled: Whether a poll was answered: the line has been of use.
    """

    def __init__(
        self,
        connect: Callable[[Callable[[Push], None]], Line],
        hearings: Hearings,
        unheard: set[str],
    ) -> None:
        self.polled = False
        self._hearings = hearings
        self._unheard = unheard
        self._refused: set[str] = set()
        #: Of each channel that is heard, and the other way round.
        self._keys: dict[str, tuple[str, ...]] = {}
        self._channels: dict[str, str] = {}
        #: Channels of circuits to be read again, and of those unless it turns out that there was only noise.
        self._changed: set[str] = set()
        self._touched: set[str] = set()
        #: When those may be read, and the next beat is due, monotonic seconds; and seconds between two beats.
        self._reread_at = 0.0
        self._beat_at = 0.0
        self._beat_every = LONGEST_WAIT
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
        with self._hearings.changes():
            while self._hearings:
                self._follow(*self._hearings.take())
                if monotonic() >= self._beat_at:
                    self._beat()
                wakes_at = min(self._beat_at, monotonic() + LONGEST_WAIT)
                if self._changed or self._touched:
                    wakes_at = min(wakes_at, self._reread_at)
                self.line.listen(max(0.0, wakes_at - monotonic()))
                if (self._changed or self._touched) and monotonic() >= self._reread_at:
                    self._read_again()

    def _follow(self, new: list[Hearing], left: set[str]) -> None:
        """Begin to hear what is new, cease to hear what is gone."""
        if gone := sorted(left & self._keys.keys()):
            self.line.unsubscribe(gone)
            for channel in gone:
                for key in self._keys.pop(channel):
                    self._channels.pop(key, None)
        if missing := {item.channel for item in new} - self._keys.keys() - self._refused:
            self._subscribe(sorted(missing))
        heard = [item for item in new if item.channel not in self._refused]
        for item in heard:
            self._keys[item.channel] = item.keys
            self._channels.update(dict.fromkeys(item.keys, item.channel))
            item.view.is_heard(True)
            # A circuit that came later may need beats that are shorter.
            self._beat_every = min(self._beat_every, item.view.max_staleness / BEATS)
        self._beat_at = min(self._beat_at, monotonic() + self._beat_every)
        if heard:
            self._poll(heard)

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
            if not self._keys and self._refused.issuperset(channels):
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
        hearings = self._hearings.all()
        self._beat_every = min((item.view.max_staleness / BEATS for item in hearings), default=LONGEST_WAIT)
        self._beat_at = monotonic() + self._beat_every
        self._poll(item for item in hearings if item.view.shortcut.taken)

    def _read_again(self) -> None:
        # What changes while these are read is for the next time.
        changed, self._changed, self._touched = self._changed | self._touched, set(), set()
        self._poll([item for item in self._hearings.at(changed) if item.view.needs_changes])
        credit = (REREADS_AT_ONCE - 1) * REREAD_EVERY_S
        self._reread_at = max(self._reread_at, monotonic() - credit) + REREAD_EVERY_S

    def _take(self, push: Push) -> None:
        kind, *rest = push
        if text(kind) == "message":
            channel, record = text(rest[0]) or "", parse_push(rest[1])
            # A noise mark ends the quiet of each view.
            differ = [view for view in self._hearings.views(channel) if view.hint(record)]
            if differ:
                self._changed.add(channel)
                if monotonic() >= self._reread_at:
                    for view in differ:
                        view.suspend()
            else:
                # The hash was written for this mark.  Any other invalidated key was not.
                self._touched.discard(channel)
        elif text(kind) == "invalidate":
            # No keys: all of them, as after FLUSHALL.
            keys = self._channels.keys()
            for key in keys if rest[0] is None else keys & {text(key) or "" for key in rest[0]}:
                channel = self._channels[key]
                (self._touched if key == self._keys[channel][4] else self._changed).add(channel)
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
        sent = moment()
        answers = self.line.ask(commands)
        came = moment()
        if not asked:
            return
        fail_counters = self._each_of(answers[1 + len(before) : counted : 1 + len(before)], len(asked))
        self.polled = self.polled or not all(isinstance(counter, Exception) for counter in fail_counters)
        server_ms, values = milliseconds(answers[0]), answers[counted:]
        for (item, ticket), failures, plain, mark in zip(asked, fail_counters, values[::2], values[1::2], strict=True):
            known = item.view.known
            if known is None or isinstance(failures, Exception) or isinstance(plain, Exception):
                item.view.doubt(ticket)
            else:
                item.view.offset.learn(server_ms, sent, came, waiting=known.state != CLOSED)
                self._judge(item, ticket, known, (failures, plain, mark), server_ms)

    def _each_of(self, answers: list[Any], number: int) -> list[Any]:
        """The counters, or what there is instead of one: of those in a cluster each may be gone to another node."""
        if self.line.one_by_one:
            return [answer if isinstance(answer, Exception) else answer[0] for answer in answers]
        (counters,) = answers
        if isinstance(counters, Exception):
            if len(self._keys) == 1:
                # Whoever may not read what he hears of goes by nothing.
                raise refusal(counters)
            # By an ACL, perhaps of one of them: from now on each is asked for by itself.
            self.line.one_by_one = True
            return [counters] * number
        return list(counters)

    def _judge(self, item: Hearing, ticket: Ticket, known: Circuit, read: tuple[Any, Any, Any], server_ms: int) -> None:
        view = item.view
        # In steady state the same is read again and again: to compare it once is enough.
        if self._agreed.get(view) != (known, read):
            circuit = sound(_found(*read), known, server_ms)
            if circuit is None:
                # A script may have run between the commands of this batch: then the circuit is read again anyway.
                if item.channel not in self._changed and item.channel not in self._touched:
                    view.doubt(ticket)
                return
            if not is_same_but_counters(circuit, known):
                view.fill(ticket, circuit, server_ms)
                return
            self._agreed[view] = known, read
        failures = int(read[0])
        view.confirm(ticket, server_ms, failures=failures, quiet=not failures and known.noisy_until_ms <= server_ms)


def _found(failures: Any, plain: Any, mark: Any) -> Found:
    is_hash = not isinstance(mark, Exception)
    # Successes count only while half-open, for the one who probes: he asks.
    values = (plain[0], failures, "0", plain[1])
    return parse(values, mark if is_hash else (None,) * len(MARK_FIELDS), mark_is_hash=is_hash)
