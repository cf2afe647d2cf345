"""One model, many visitors: they are served one at a time, and those who hang up wait for nothing."""

import contextlib
import selectors
import socket
import threading

from werkzeug.exceptions import ServiceUnavailable


class Line:
    """Visitors are served one at a time, in the order they came; only so many may wait, or send what they ask at once."""

    def __init__(self, waiting):
        self.waiting = waiting
        self.tickets = []
        self.changed = threading.Condition()
        self.readers = threading.BoundedSemaphore(waiting + 1)

    def full(self):
        return ServiceUnavailable(f"{self.waiting} others are waiting already: try again soon", retry_after=5)

    @contextlib.contextmanager
    def reading(self):
        """Meanwhile a request is read and unpacked, in up to 100 MB; ServiceUnavailable if too many others are."""
        if not self.readers.acquire(blocking=False):
            raise self.full()
        try:
            yield
        finally:
            self.readers.release()

    def join(self):
        """A ticket for the end of the line; ServiceUnavailable if it is full."""
        with self.changed:
            if len(self.tickets) > self.waiting:
                raise self.full()
            self.tickets.append(ticket := object())
        return ticket

    def ahead(self, ticket):
        """Yields how many are before this ticket, whenever that changes and every second, until nobody is."""
        place = None
        while place != 0:
            with self.changed:
                self.changed.wait_for(lambda known=place: self.tickets.index(ticket) != known, timeout=1.0)
                place = self.tickets.index(ticket)
            if place:
                yield place

    def reach(self, ticket, hangup):
        """Waits until nobody is before this ticket; False if its client has hung up by then, and needs no answer."""
        for _ in self.ahead(ticket):
            if hangup.is_set():
                return False
        return not hangup.is_set()

    def leave(self, ticket):
        with self.changed:
            self.tickets.remove(ticket)
            self.changed.notify_all()


class Hangup:
    """A `stop_event` that is set once the one who asked has closed the connection.

    Werkzeug's server hands out the socket; under another server a hang-up shows only when the next piece can't be sent.
    """

    def __init__(self, environ):
        self.socket = environ.get("werkzeug.socket")

    def is_set(self):
        if self.socket is None:
            return False
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.socket, selectors.EVENT_READ)
                return bool(selector.select(0)) and not self.socket.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True
