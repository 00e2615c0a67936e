"""Views of one listener, with their keys and channels, and the changes of that set.

Any thread adds and removes views, and the garbage collector drops them.  The listener thread takes only what changed.
A wake-up therefore costs the same with ten circuits and with ten thousand.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pybreaker_redis._model.codec import HASH_FIELDS
from pybreaker_redis._redis.keys import CircuitKeys
from pybreaker_redis._replica.view import View


@dataclass(frozen=True, slots=True)
class Subscriber:
    """One view, with what a listener needs to keep it current.

    Attributes:
        view: The view.
        keys: Keys of its circuit, in the order of the scripts.
        channel: Channel of its circuit.
        is_one_slot: Whether no command may name keys of other circuits, too: the server is a cluster.
        is_armable: Whether a server that tracks keys reports every change of the circuit, see `trust.ArmedTrust`.
    """

    view: View
    keys: tuple[str, ...]
    channel: str
    is_one_slot: bool = False
    is_armable: bool = False


class SubscriberTable:
    """Views of one listener.  The table keeps no view alive.

    Attributes:
        shared_channels: Channels of circuits that have several views.  Readers need no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.shared_channels: set[str] = set()
        self._of_view: weakref.WeakKeyDictionary[View, tuple[tuple[str, ...], str, bool, bool]]
        self._of_view = weakref.WeakKeyDictionary()
        #: The tuples are replaced, never changed, so readers need no lock.
        self._of_channel: dict[str, tuple[weakref.ref[View], ...]] = {}
        #: Channels of views that were removed or collected.  The garbage collector appends at any time, without a lock.
        self._dropped: deque[str] = deque()
        #: Views that were added, and channels that lost a view, since a session took the changes.
        self._added: weakref.WeakSet[View] = weakref.WeakSet()
        self._left: set[str] = set()
        self._is_tracked_by_session = False

    def __len__(self) -> int:
        return len(self._of_view)

    def add_subscriber(
        self, view: View, keys: tuple[str, ...], channel: str, *, is_one_slot: bool = False, is_armable: bool = False
    ) -> None:
        """Add a view with the attributes of its `Subscriber`."""
        dropped = self._dropped
        with self._lock:
            self.remove_subscriber(view)
            self._of_view[view] = keys, channel, is_one_slot, is_armable
            ref = weakref.ref(view, lambda _: dropped.append(channel))
            self._of_channel[channel] = (*self._of_channel.get(channel, ()), ref)
            if len(self._of_channel[channel]) > 1:
                self.shared_channels.add(channel)
            self._added.add(view)
            self._sweep()

    def remove_subscriber(self, view: View) -> None:
        """Remove a view, if it is there."""
        with self._lock:
            if (entry := self._of_view.pop(view, None)) is not None:
                channel = entry[1]
                self._of_channel[channel] = tuple(ref for ref in self._of_channel[channel] if ref() is not view)
                self._dropped.append(channel)
                self._added.discard(view)

    def views_of(self, channel: str) -> list[View]:
        """Return the views of one circuit."""
        return [view for ref in self._of_channel.get(channel, ()) if (view := ref()) is not None]

    def on_channels(self, channels: Iterable[str]) -> list[Subscriber]:
        """Return the subscribers of some channels."""
        with self._lock:
            views = [view for channel in channels for view in self.views_of(channel)]
            return [Subscriber(view, *self._of_view[view]) for view in views]

    def of_views(self, views: Iterable[View]) -> list[Subscriber]:
        """Return the subscribers of those views that are still here."""
        with self._lock:
            return [Subscriber(view, *entry) for view in views if (entry := self._of_view.get(view)) is not None]

    def snapshot(self) -> list[Subscriber]:
        """Return all subscribers."""
        with self._lock:
            return [Subscriber(view, *of_view) for view, of_view in self._of_view.items()]

    @contextmanager
    def track_changes(self) -> Iterator[None]:
        """Collect changes for `take_changes`.  All views count as added at first."""
        with self._lock:
            self._added, self._is_tracked_by_session = weakref.WeakSet(self._of_view), True
        try:
            yield
        finally:
            with self._lock:
                self._is_tracked_by_session = False
                self._left.clear()

    def take_changes(self) -> tuple[list[Subscriber], set[str]]:
        """Return the subscribers that were added since the last call, and the channels that lost their last view."""
        with self._lock:
            self._sweep()
            if not (self._added or self._left):
                return [], set()
            new, self._added = list(self._added), weakref.WeakSet()
            left, self._left = self._left - self._of_channel.keys(), set()
            return [Subscriber(view, *self._of_view[view]) for view in new], left

    def _sweep(self) -> None:
        while self._dropped:
            channel = self._dropped.popleft()
            alive = tuple(ref for ref in self._of_channel.get(channel, ()) if ref() is not None)
            if len(alive) <= 1:
                self.shared_channels.discard(channel)
            if alive:
                self._of_channel[channel] = alive
            else:
                self._of_channel.pop(channel, None)
                if self._is_tracked_by_session:
                    self._left.add(channel)


class PollBatch:
    """Commands that read the clock of a server and some circuits, in one round trip.

    Outside of a cluster one command reads the counters of many circuits.  Every failed call changes its counter.  If
    counters were tracked, each failure would push to every process.  A counter that is zero may be tracked: after its
    next change it is not any more.  So one command reads all plain keys of the quiet circuits.

    Args:
        quiet: Circuits that the poll may arm.
        others: Other circuits that may share commands.
        single: Circuits that share no command.
        is_tracking: Whether the server tracks what the connection reads.

    Attributes:
        subscribers: All circuits, in the order of `reads`.
        commands: The commands.  The first one reads the clock.
    """

    def __init__(
        self, quiet: list[Subscriber], others: list[Subscriber], single: list[Subscriber], *, is_tracking: bool
    ) -> None:
        self.subscribers = [*quiet, *others, *single]
        self.commands: list[tuple[Any, ...]] = [("TIME",)]
        self._quiet_count = len(quiet)
        #: Positions of the commands that read plain keys, with the number of their circuits, and whether they may have
        #: several circuits.
        self._plain: list[tuple[int, int, bool]] = []
        for group in (quiet, others, *([item] for item in single)):
            if group:
                if is_tracking and group is not quiet:
                    self.commands.append(("CLIENT", "CACHING", "NO"))
                self.commands.append(("MGET", *_plain_keys(group, is_quiet=group is quiet)))
                self._plain.append((len(self.commands) - 1, len(group), group is quiet or group is others))
        for item in (*others, *single):
            keys = CircuitKeys(*item.keys)
            self.commands.append(("MGET", keys.state, keys.opened_at))
        for item in self.subscribers:
            self.commands.append(("HMGET", CircuitKeys(*item.keys).circuit, *HASH_FIELDS))

    def common_error(self, answers: Sequence[Any]) -> Exception | None:
        """Return the first error of a command that may have read several circuits."""
        common = (answers[position] for position, _, is_common in self._plain if is_common)
        return next((answer for answer in common if isinstance(answer, Exception)), None)

    def reads(self, answers: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
        """Return counter, state with opening time, and fields of the hash for each circuit, or errors in their place.

        Args:
            answers: Answers to `commands`.
        """
        plain: list[Any] = []
        for position, size, _ in self._plain:
            answer = answers[position]
            if isinstance(answer, Exception):
                plain += [answer] * size
            else:
                width = len(answer) // size
                plain += [answer[first : first + width] for first in range(0, len(answer), width)]
        first_fields = len(answers) - len(self.subscribers)
        first_pair = first_fields - len(self.subscribers) + self._quiet_count
        pairs = [*plain[: self._quiet_count], *answers[first_pair:first_fields]]
        reads = []
        for number, (values, pair, fields) in enumerate(zip(plain, pairs, answers[first_fields:], strict=True)):
            if isinstance(values, Exception):
                reads.append((values, values, fields))
            else:
                reads.append((values[0], values[1:] if number < self._quiet_count else pair, fields))
        return reads


def _plain_keys(group: Iterable[Subscriber], *, is_quiet: bool) -> Iterator[str]:
    for item in group:
        keys = CircuitKeys(*item.keys)
        yield keys.fail_counter
        if is_quiet:
            yield keys.state
            yield keys.opened_at
