"""Which views does one listener keep true, and what has changed about them?

Knows: views, their keys and channels, weak references.  Does not know: lines, threads, what is heard.

Any thread adds and removes views, and the garbage collector does. The thread that listens takes the changes only, so a
wake-up of it costs the same with ten circuits and with ten thousand.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pybreaker_redis._replica.view import View


@dataclass(frozen=True, slots=True)
class Subscriber:
    """What is heard and polled for one view.

    Attributes:
        view: To be kept true.
        keys: Of its circuit, in the order of the scripts.
        channel: Of its circuit.
    """

    view: View
    keys: tuple[str, ...]
    channel: str


class SubscriberTable:
    """Registry of the views of one listener; keeps no view alive."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._of_view: weakref.WeakKeyDictionary[View, tuple[tuple[str, ...], str]] = weakref.WeakKeyDictionary()
        #: The tuples are replaced, never changed, so readers need no lock.
        self._of_channel: dict[str, tuple[weakref.ref[View], ...]] = {}
        #: Channels of views that were removed or collected.  The garbage collector appends at any time, without a lock.
        self._dropped: deque[str] = deque()
        #: Views that were added, and channels that lost a view, since a session looked last; and if there is one.
        self._added: weakref.WeakSet[View] = weakref.WeakSet()
        self._left: set[str] = set()
        self._is_tracked_by_session = False

    def __len__(self) -> int:
        return len(self._of_view)

    def add_subscriber(self, view: View, keys: tuple[str, ...], channel: str) -> None:
        """Keep a view true from now on."""
        dropped = self._dropped
        with self._lock:
            self.remove_subscriber(view)
            self._of_view[view] = keys, channel
            ref = weakref.ref(view, lambda _: dropped.append(channel))
            self._of_channel[channel] = (*self._of_channel.get(channel, ()), ref)
            self._added.add(view)
            self._sweep()

    def remove_subscriber(self, view: View) -> None:
        """Keep a view true no longer."""
        with self._lock:
            _, channel = self._of_view.pop(view, ((), None))
            if channel is not None:
                self._of_channel[channel] = tuple(ref for ref in self._of_channel[channel] if ref() is not view)
                self._dropped.append(channel)
                self._added.discard(view)

    def views_of(self, channel: str) -> list[View]:
        """The views of one circuit."""
        return [view for ref in self._of_channel.get(channel, ()) if (view := ref()) is not None]

    def on_channels(self, channels: Iterable[str]) -> list[Subscriber]:
        """What is heard on some channels."""
        with self._lock:
            views = [view for channel in channels for view in self.views_of(channel)]
            return [Subscriber(view, *self._of_view[view]) for view in views]

    def snapshot(self) -> list[Subscriber]:
        """All that is heard."""
        with self._lock:
            return [Subscriber(view, *of_view) for view, of_view in self._of_view.items()]

    @contextmanager
    def track_changes(self) -> Iterator[None]:
        """Note changes for `take`; at first, all views are new."""
        with self._lock:
            self._added, self._is_tracked_by_session = weakref.WeakSet(self._of_view), True
        try:
            yield
        finally:
            with self._lock:
                self._is_tracked_by_session = False
                self._left.clear()

    def take_changes(self) -> tuple[list[Subscriber], set[str]]:
        """Return what was added since the last time, and the channels that no view is left of."""
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
            if alive:
                self._of_channel[channel] = alive
            else:
                self._of_channel.pop(channel, None)
                if self._is_tracked_by_session:
                    self._left.add(channel)
