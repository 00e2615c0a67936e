"""What is done on one line, from its first subscription to its end?

Knows: views, the line to a server, when to poll.  Does not know: threads, what comes after.

* A record that a script publishes is a hint: unless it marks noise only, the circuit is read again at once, and what
  was read fills the view like any answer.  There is one read of this kind each `REREAD_INTERVAL_S` on average, at most.
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

from pybreaker_redis import _log
from pybreaker_redis._model.answers import server_time_ms
from pybreaker_redis._model.circuit import CLOSED, Circuit
from pybreaker_redis._model.codec import HASH_FIELDS, StoredRecord, parse_published, parse_record, to_text
from pybreaker_redis._model.repair import intact_circuit, is_same_but_counters
from pybreaker_redis._redis.classify import PushUnavailableError
from pybreaker_redis._replica.connection import Push, PushConnection, refusal_of
from pybreaker_redis._replica.subscribers import Subscriber, SubscriberTable
from pybreaker_redis._replica.view import ReadTicket, View
from pybreaker_redis._runtime.clock import instant, monotonic
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import refusal_text

#: Beats in the time for which a record may be believed: so one of them may come late.
BEATS_PER_STALENESS = 2

#: Longest wait until new circuits are noticed, seconds.
LISTENER_WAIT_MAX_S = 0.5

#: Seconds between two reads of circuits that were reported changed, on average, whatever is published.
REREAD_INTERVAL_S = 0.01

#: Reads of that kind that may follow one another at once after a quiet time: a move by hand publishes twice within a
#: millisecond, and so does a probe that succeeds.
REREAD_BURST = 5


class Session:
    """The life of one line.

    Args:
        connect: Returns a line that tells of pushes to whom it is given.
        subscriber_table: All that is to be heard.  Nothing here keeps a view alive.
        unheard: Channels of which it was said that they are refused, on earlier lines, too; kept true from here.

    Attributes:
        connection: The line; to be closed when the session is over.
        has_polled: Whether a poll was answered: the line has been of use.
    """

    def __init__(
        self,
        connect: Callable[[Callable[[Push], None]], PushConnection],
        subscriber_table: SubscriberTable,
        unheard: set[str],
    ) -> None:
        self.has_polled = False
        self._subscriber_table = subscriber_table
        self._logged_channels = unheard
        self._refused_channels: set[str] = set()
        #: Of each channel that is heard, and the other way round.
        self._keys_by_channel: dict[str, tuple[str, ...]] = {}
        self._channel_by_key: dict[str, str] = {}
        #: Channels of circuits to be read again, and of those unless it turns out that there was only noise.
        self._changed: set[str] = set()
        self._maybe_changed: set[str] = set()
        #: When those may be read, and the next beat is due, monotonic seconds; and seconds between two beats.
        self._reread_at = 0.0
        self._next_beat_at = 0.0
        self._beat_interval_s = LISTENER_WAIT_MAX_S
        self._is_pong_due = False
        self._matched_reads: weakref.WeakKeyDictionary[View, tuple[Circuit, tuple[Any, Any, Any]]]
        self._matched_reads = weakref.WeakKeyDictionary()
        self.connection = connect(self._receive)

    def run_session(self) -> None:
        """Keep the views true as long as there are any.

        Raises:
            PushUnavailableError: The server does not let this process hear.
            Exception: The line is dead.
        """
        with self._subscriber_table.track_changes():
            while self._subscriber_table:
                self._update_subscriptions(*self._subscriber_table.take_changes())
                if monotonic() >= self._next_beat_at:
                    self._beat()
                wakes_at = min(self._next_beat_at, monotonic() + LISTENER_WAIT_MAX_S)
                if self._changed or self._maybe_changed:
                    wakes_at = min(wakes_at, self._reread_at)
                self.connection.receive(max(0.0, wakes_at - monotonic()))
                if (self._changed or self._maybe_changed) and monotonic() >= self._reread_at:
                    self._reread_changed()

    def _update_subscriptions(self, new: list[Subscriber], left: set[str]) -> None:
        """Begin to hear what is new, cease to hear what is gone."""
        if gone := sorted(left & self._keys_by_channel.keys()):
            self.connection.unsubscribe(gone)
            for channel in gone:
                for key in self._keys_by_channel.pop(channel):
                    self._channel_by_key.pop(key, None)
        if missing := {item.channel for item in new} - self._keys_by_channel.keys() - self._refused_channels:
            self._subscribe(sorted(missing))
        heard = [item for item in new if item.channel not in self._refused_channels]
        for item in heard:
            self._keys_by_channel[item.channel] = item.keys
            self._channel_by_key.update(dict.fromkeys(item.keys, item.channel))
            item.view.is_heard(True)
            # A circuit that came later may need beats that are shorter.
            self._beat_interval_s = min(self._beat_interval_s, item.view.max_staleness / BEATS_PER_STALENESS)
        self._next_beat_at = min(self._next_beat_at, monotonic() + self._beat_interval_s)
        if heard:
            self._poll(heard)

    def _subscribe(self, channels: list[str]) -> None:
        """Hear what may be heard: one circuit that this user may not hear of concerns no other."""
        try:
            self.connection.subscribe(channels)
        except PushUnavailableError as error:
            for channel in channels:
                try:
                    self.connection.subscribe([channel])
                except PushUnavailableError:
                    self._refused_channels.add(channel)
            if not self._keys_by_channel and self._refused_channels.issuperset(channels):
                raise
            for channel in sorted(self._refused_channels - self._logged_channels):
                emit(_log.push_refused(f"channel {channel!r}", error=refusal_text(error)))
            self._logged_channels |= self._refused_channels
        self._logged_channels -= set(channels) - self._refused_channels

    def _beat(self) -> None:
        if self._is_pong_due:
            msg = "the server has not answered a PING"
            raise TimeoutError(msg)
        self._is_pong_due = self.connection.send_beat()
        subscriber_table = self._subscriber_table.snapshot()
        self._beat_interval_s = min(
            (item.view.max_staleness / BEATS_PER_STALENESS for item in subscriber_table), default=LISTENER_WAIT_MAX_S
        )
        self._next_beat_at = monotonic() + self._beat_interval_s
        self._poll(item for item in subscriber_table if item.view.fast_path.was_used)

    def _reread_changed(self) -> None:
        # What changes while these are read is for the next time.
        changed, self._changed, self._maybe_changed = self._changed | self._maybe_changed, set(), set()
        self._poll([item for item in self._subscriber_table.on_channels(changed) if item.view.is_in_use])
        credit = (REREAD_BURST - 1) * REREAD_INTERVAL_S
        self._reread_at = max(self._reread_at, monotonic() - credit) + REREAD_INTERVAL_S

    def _receive(self, push: Push) -> None:
        kind, *rest = push
        if to_text(kind) == "message":
            channel, record = to_text(rest[0]) or "", parse_published(rest[1])
            # A noise mark ends the quiet of each view.
            differ = [view for view in self._subscriber_table.views_of(channel) if view.compare_push(record)]
            if differ:
                self._changed.add(channel)
                if monotonic() >= self._reread_at:
                    for view in differ:
                        view.suspend_trust()
            else:
                # The hash was written for this mark.  Any other invalidated key was not.
                self._maybe_changed.discard(channel)
        elif to_text(kind) == "invalidate":
            # No keys: all of them, as after FLUSHALL.
            keys = self._channel_by_key.keys()
            for key in keys if rest[0] is None else keys & {to_text(key) or "" for key in rest[0]}:
                channel = self._channel_by_key[key]
                (self._maybe_changed if key == self._keys_by_channel[channel][4] else self._changed).add(channel)
        elif to_text(kind) == "pong":
            self._is_pong_due = False

    def _poll(self, subscriber_table: Iterable[Subscriber]) -> None:
        """Read circuits again, and the server's clock; with no circuits it is a sign of life."""
        asked = [(item, item.view.begin_read()) for item in subscriber_table]
        keys = [item.keys[1] for item, _ in asked]
        # The counters of all circuits in one command, but for those in a cluster.
        batches = [[key] for key in keys] if self.connection.is_one_slot else [keys] * bool(keys)
        # Whoever counts a failure shall not have to tell everybody.
        before = [("CLIENT", "CACHING", "NO")] if self.connection.is_tracking else []
        commands: list[tuple[Any, ...]] = [("TIME",)]
        for batch in batches:
            commands += [*before, ("MGET", *batch)]
        counted = len(commands)
        for item, _ in asked:
            item.view.fast_path.was_used = False
            commands.append(("MGET", item.keys[0], item.keys[3]))
            commands.append(("HMGET", item.keys[4], *HASH_FIELDS))
        sent = instant()
        answers = self.connection.query(commands)
        came = instant()
        if not asked:
            return
        fail_counters = self._counters_of(answers[1 + len(before) : counted : 1 + len(before)], len(asked))
        self.has_polled = self.has_polled or not all(isinstance(counter, Exception) for counter in fail_counters)
        server_ms, values = server_time_ms(answers[0]), answers[counted:]
        for (item, ticket), failures, plain, mark in zip(asked, fail_counters, values[::2], values[1::2], strict=True):
            known = item.view.cached
            if known is None or isinstance(failures, Exception) or isinstance(plain, Exception):
                item.view.distrust_poll(ticket)
            else:
                item.view.clock_offset.note_answer_time(server_ms, sent, came, is_waiting=known.state != CLOSED)
                self._compare(item, ticket, known, (failures, plain, mark), server_ms)

    def _counters_of(self, answers: list[Any], number: int) -> list[Any]:
        """The counters, or what there is instead of one: of those in a cluster each may be gone to another node."""
        if self.connection.is_one_slot:
            return [answer if isinstance(answer, Exception) else answer[0] for answer in answers]
        (counters,) = answers
        if isinstance(counters, Exception):
            if len(self._keys_by_channel) == 1:
                # Whoever may not read what he hears of goes by nothing.
                raise refusal_of(counters)
            # By an ACL, perhaps of one of them: from now on each is asked for by itself.
            self.connection.is_one_slot = True
            return [counters] * number
        return list(counters)

    def _compare(
        self, item: Subscriber, ticket: ReadTicket, known: Circuit, read: tuple[Any, Any, Any], server_ms: int
    ) -> None:
        view = item.view
        # In steady state the same is read again and again: to compare it once is enough.
        if self._matched_reads.get(view) != (known, read):
            circuit = intact_circuit(_parse_poll(*read), known, server_ms)
            if circuit is None:
                # A script may have run between the commands of this batch: then the circuit is read again anyway.
                if item.channel not in self._changed and item.channel not in self._maybe_changed:
                    view.distrust_poll(ticket)
                return
            if not is_same_but_counters(circuit, known):
                view.store_answer(ticket, circuit, server_ms)
                return
            self._matched_reads[view] = known, read
        failures = int(read[0])
        view.confirm_poll(
            ticket, server_ms, failures=failures, quiet=not failures and known.noisy_until_ms <= server_ms
        )


def _parse_poll(failures: Any, plain: Any, mark: Any) -> StoredRecord:
    is_hash = not isinstance(mark, Exception)
    # Successes count only while half-open, for the one who probes: he asks.
    values = (plain[0], failures, "0", plain[1])
    return parse_record(values, mark if is_hash else (None,) * len(HASH_FIELDS), is_hash=is_hash)
