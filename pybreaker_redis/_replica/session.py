"""Session of a listener: what happens on one push connection, from the first subscription to its end.

* A published record is a hint.  Unless it marks noise only, the session reads the circuit again at once, and the view
  stores that answer like any other.  On average there is one such read each `REREAD_INTERVAL_S` at most.
* At every beat, one batch reads all circuits that calls have used since they were last read.  A circuit that equals its
  view may be trusted for another `max_staleness`.
* If the server tracks keys, it also pushes changes that no process published.  The session reads these circuits again.
  A quiet circuit is *armed* when it was read on this connection: a change would be pushed.  Armed circuits are not read
  at the beats.  The answer to TIME shows that no push is missing, and extends the trust of all of them.
* A record that needs a repair is left to the script of the next caller.  Until then the view is not trusted.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pybreaker_redis import _log
from pybreaker_redis._model.answers import server_time_ms
from pybreaker_redis._model.circuit import CLOSED, Circuit
from pybreaker_redis._model.codec import HASH_FIELDS, StoredRecord, parse_published, parse_record, to_text
from pybreaker_redis._model.repair import intact_circuit
from pybreaker_redis._redis.classify import PushUnavailableError
from pybreaker_redis._redis.keys import CircuitKeys
from pybreaker_redis._replica.armed import ArmedViews
from pybreaker_redis._replica.connection import Push, PushConnection, refusal_of
from pybreaker_redis._replica.merge import is_same_but_counters
from pybreaker_redis._replica.subscribers import PollBatch, Subscriber, SubscriberTable
from pybreaker_redis._replica.trust import ReadTicket
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.clock import instant, monotonic
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import refusal_text

#: Beats within the time for which a record may be trusted, so that one of them may come late.
BEATS_PER_STALENESS = 2

#: Longest wait until new circuits are noticed, seconds.
LISTENER_WAIT_MAX_S = 0.5

#: Seconds between two reads of circuits that were reported changed, on average, whatever is published.
REREAD_INTERVAL_S = 0.01

#: Rereads that may follow each other at once after a time without any.  An operator's command publishes twice
#: within a millisecond, and so does a probe that succeeds.
REREAD_BURST = 5


class Session:
    """Work of a listener on one push connection.

    Args:
        connect: Makes the connection, and takes the function that receives pushes.
        subscriber_table: Views to keep current.  The session keeps no view alive.
        logged_channels: Channels of which a refusal was logged, on earlier connections, too.  The session updates it.

    Attributes:
        connection: The connection.  The owner closes it when the session ends.
        has_polled: Whether the server let this user read a circuit, so that the connection was of use.
    """

    def __init__(
        self,
        connect: Callable[[Callable[[Push], None]], PushConnection],
        subscriber_table: SubscriberTable,
        logged_channels: set[str],
    ) -> None:
        self.has_polled = False
        self._subscriber_table = subscriber_table
        self._logged_channels = logged_channels
        self._refused_channels: set[str] = set()
        #: Keys of each subscribed channel, and the other way round.
        self._keys_by_channel: dict[str, tuple[str, ...]] = {}
        self._channel_by_key: dict[str, str] = {}
        #: Channels of circuits to be read again, and of those that need no read if a noise mark follows.  The first
        #: failure after successes writes such a mark to the hash (`_model/circuit.py`).
        self._changed: set[str] = set()
        self._maybe_changed: set[str] = set()
        #: Channels of which a push has arrived since the present batch was sent.
        self._touched: set[str] = set()
        self._armed_views = ArmedViews()
        #: When the next read of changed circuits and the next beat are due, monotonic seconds.
        self._reread_at = 0.0
        self._next_beat_at = 0.0
        self._beat_interval_s = math.inf
        self._is_pong_due = False
        #: Whether the keys of each circuit are read by commands of their own, because the server refused a common one.
        self._reads_keys_singly = False
        #: Records and answers that were compared and found equal.
        self._matched_reads: weakref.WeakKeyDictionary[View, tuple[Circuit, tuple[Any, Any, Any]]]
        self._matched_reads = weakref.WeakKeyDictionary()
        self.connection = connect(self._receive)

    def load_scripts(self, scripts: Sequence[tuple[bytes, str]]) -> str:
        """Load scripts that the server does not have, so that the first call needs no source.

        Args:
            scripts: Sources and digests.

        Returns:
            The refusal of the server, empty if there was none.
        """
        (present,) = self.connection.query([("SCRIPT", "EXISTS", *(digest for _, digest in scripts))])
        if isinstance(present, Exception):
            return str(present)
        missing = [source for (source, _), is_present in zip(scripts, present, strict=True) if not is_present]
        answers = self.connection.query([("SCRIPT", "LOAD", source) for source in missing]) if missing else []
        return next((str(answer) for answer in answers if isinstance(answer, Exception)), "")

    def run_session(self) -> None:
        """Keep the views current as long as there are any.

        An error of the client library passes unchanged: the connection is lost.

        Raises:
            PushUnavailableError: The server refuses every subscription.
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

    # Subscriptions ------------------------------------------------------------------------------------------------

    def _update_subscriptions(self, new: list[Subscriber], left: set[str]) -> None:
        """Subscribe new circuits, and unsubscribe channels without a view."""
        if gone := sorted(left & self._keys_by_channel.keys()):
            self.connection.unsubscribe(gone)
            for channel in gone:
                for key in self._keys_by_channel.pop(channel):
                    self._channel_by_key.pop(key, None)
        if missing := {item.channel for item in new} - self._keys_by_channel.keys() - self._refused_channels:
            self._subscribe(sorted(missing))
        subscribed = [item for item in new if item.channel not in self._refused_channels]
        for item in subscribed:
            self._keys_by_channel[item.channel] = item.keys
            self._channel_by_key.update(dict.fromkeys(item.keys, item.channel))
            item.view.mark_subscribed()
            self._armed_views.add(item.view)
            # A new circuit may need shorter beats.
            self._beat_interval_s = min(self._beat_interval_s, item.view.max_staleness / BEATS_PER_STALENESS)
        if left:
            self._beat_interval_s = min(
                (item.view.max_staleness / BEATS_PER_STALENESS for item in self._subscriber_table.snapshot()),
                default=math.inf,
            )
        self._next_beat_at = min(self._next_beat_at, monotonic() + self._beat_interval_s)
        if subscribed:
            self._poll(subscribed)

    def _subscribe(self, channels: list[str]) -> None:
        """Subscribe the channels that the server permits.  A refused circuit concerns no other."""
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

    # Pushes -------------------------------------------------------------------------------------------------------

    def _receive(self, push: Push) -> None:
        kind, *rest = push
        if to_text(kind) == "message":
            channel, record = to_text(rest[0]) or "", parse_published(rest[1])
            self._touched.add(channel)
            # After a noise mark `compare_push` has each view report successes again.
            differ = [view for view in self._subscriber_table.views_of(channel) if view.compare_push(record)]
            if differ:
                self._changed.add(channel)
                # In a flood of pushes the reread has to wait.  Until then the views stay trusted.
                if monotonic() >= self._reread_at:
                    for view in differ:
                        view.suspend_trust()
            else:
                # The mark is why the hash was invalidated: no reread is needed.
                self._maybe_changed.discard(channel)
        elif to_text(kind) == "invalidate":
            # No keys: all of them, as after FLUSHALL.
            keys = self._channel_by_key.keys()
            for key in keys if rest[0] is None else keys & {to_text(key) or "" for key in rest[0]}:
                self._receive_invalidation(self._channel_by_key[key], key)
        elif to_text(kind) == "pong":
            self._is_pong_due = False

    def _receive_invalidation(self, channel: str, key: str) -> None:
        """Note that a key of a circuit has changed or was removed."""
        self._touched.add(channel)
        for view in self._subscriber_table.views_of(channel):
            view.disarm()
        circuit_keys = CircuitKeys(*self._keys_by_channel[channel])
        if key == circuit_keys.circuit:
            # A noise mark is written to the hash only.
            self._maybe_changed.add(channel)
        elif key != circuit_keys.fail_counter:
            # The next beat reads a counter that stock workers have changed.
            self._changed.add(channel)

    # Reads --------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        if self._is_pong_due:
            msg = "the server has not answered a PING"
            raise TimeoutError(msg)
        self._is_pong_due = self.connection.send_beat()
        now = monotonic()
        self._next_beat_at = now + self._beat_interval_s
        self._poll(self._subscriber_table.of_views(self._armed_views.take_used(now)))

    def _reread_changed(self) -> None:
        # A change that arrives during the read belongs to the next one.
        changed, self._changed, self._maybe_changed = self._changed | self._maybe_changed, set(), set()
        self._poll([item for item in self._subscriber_table.on_channels(changed) if item.view.is_in_use])
        # A token bucket, as a time: idle time earns at most a burst.
        credit = (REREAD_BURST - 1) * REREAD_INTERVAL_S
        self._reread_at = max(self._reread_at, monotonic() - credit) + REREAD_INTERVAL_S

    def _poll(self, subscribers: Iterable[Subscriber]) -> None:
        """Read circuits and the clock of the server in one batch.  Without circuits the batch is a sign of life."""
        quiet: list[Subscriber] = []
        others: list[Subscriber] = []
        single: list[Subscriber] = []
        for item in subscribers:
            is_single = item.is_one_slot or self._reads_keys_singly
            (single if is_single else quiet if self._may_arm(item) else others).append(item)
        batch = PollBatch(quiet, others, single, is_tracking=self.connection.is_tracking)
        tickets = [item.view.begin_read() for item in batch.subscribers]
        for item in batch.subscribers:
            item.view.fast_path.was_used = False
        self._touched.clear()
        sent_at = instant()
        answers = self.connection.query(batch.commands)
        arrived_at = instant()
        server_ms = server_time_ms(answers[0])
        self._armed_views.extend_trust(sent_at.monotonic_ms / 1000)
        if not tickets:
            return
        self._note_common_error(batch.common_error(answers))
        for number, (item, ticket, read) in enumerate(
            zip(batch.subscribers, tickets, batch.reads(answers), strict=True)
        ):
            known = item.view.cached
            self.has_polled = self.has_polled or not isinstance(read[0], Exception)
            if known is None or isinstance(read[0], Exception) or isinstance(read[1], Exception):
                # Only a script may store a first record, and an unreadable one confirms nothing.
                item.view.distrust_poll(ticket)
            else:
                item.view.clock_offset.note_answer_time(
                    server_ms, sent_at, arrived_at, is_waiting=known.state != CLOSED
                )
                self._apply_read(item, ticket, known, read, server_ms)
                if number < len(quiet) and item.channel not in self._touched:
                    self._armed_views.arm(item.view, ticket, monotonic())

    def _may_arm(self, item: Subscriber) -> bool:
        """Whether the server would report every change of a circuit, and the circuit is quiet as far as is known."""
        view = item.view
        is_quiet = view.is_quiet and view.cached is not None and view.cached.state == CLOSED
        return is_quiet and item.is_armable and self.connection.reports_changes_in_order

    def _note_common_error(self, error: Exception | None) -> None:
        """Note that the server has refused to read keys of several circuits in one command.  ``None``: it has not."""
        if error is None:
            return
        if len(self._keys_by_channel) == 1:
            # A user who may not read the only circuit has nothing to trust.
            raise refusal_of(error)
        # An ACL may forbid one key only.
        self._reads_keys_singly = True

    def _apply_read(
        self, item: Subscriber, ticket: ReadTicket, known: Circuit, read: tuple[Any, Any, Any], server_ms: int
    ) -> None:
        view = item.view
        # In steady state the same is read again and again.  One comparison is enough.
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


def _parse_poll(failures: Any, pair: Any, fields: Any) -> StoredRecord:
    # The server refuses to read a key of another type, or a key that is forbidden to this user.
    is_hash = not isinstance(fields, Exception)
    # Successes count only while half-open, and only the call that probes needs them: it queries the circuit itself.
    values = (pair[0], failures, "0", pair[1])
    return parse_record(values, fields if is_hash else (None,) * len(HASH_FIELDS), is_hash=is_hash)
