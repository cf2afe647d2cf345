"""One model, many clients: requests are answered one at a time, and a client that disconnects gives up its place."""

import contextlib
import selectors
import socket
import threading

from werkzeug.exceptions import ServiceUnavailable


class RequestQueue:
    """First come, first served: one request is answered at a time, up to `max_waiting` others wait.

    A request calls these methods in their order: `reading`, `join`, `wait` or `wait_until_first`, `leave`.
    """

    def __init__(self, max_waiting):
        self.max_waiting = max_waiting
        self.read_slots = threading.BoundedSemaphore(max_waiting + 1)
        self.tickets = []  # in order of arrival; the request of the first one is being answered
        self.changed = threading.Condition()  # guards `tickets`

    @contextlib.contextmanager
    def reading(self):
        """Holds a slot while a request is read and decoded; ServiceUnavailable if none is free.

        A request can take 100 MB once it is decoded, so the number that are read at once must be bounded too.
        """
        if not self.read_slots.acquire(blocking=False):
            raise self.busy()
        try:
            yield
        finally:
            self.read_slots.release()

    def join(self):
        """A ticket at the end of the queue; ServiceUnavailable if the queue is full."""
        with self.changed:
            if len(self.tickets) > self.max_waiting:
                raise self.busy()
            ticket = object()
            self.tickets.append(ticket)
        return ticket

    def busy(self):
        return ServiceUnavailable(f"{self.max_waiting} others are waiting already: try again soon", retry_after=5)

    def wait(self, ticket):
        """Yields how many requests are ahead of the ticket, whenever that changes and every second, until none is."""
        ahead = None
        while ahead != 0:
            # without a change, wake up after a second anyway: the caller has to look whether its client is still there
            with self.changed:
                self.changed.wait_for(lambda known=ahead: self.tickets.index(ticket) != known, timeout=1.0)
                ahead = self.tickets.index(ticket)

            # outside the lock: the caller may be sending this to a slow client
            if ahead:
                yield ahead

    def wait_until_first(self, ticket, disconnected):
        """Waits until no request is ahead of the ticket. False if the client has disconnected, and needs no answer."""
        for _ in self.wait(ticket):
            if disconnected.is_set():
                return False
        return not disconnected.is_set()

    def leave(self, ticket):
        with self.changed:
            self.tickets.remove(ticket)
            self.changed.notify_all()


class DisconnectEvent:
    """An event, as `stop_event` expects one, that is set once the client has closed the connection.

    Werkzeug's server and gunicorn hand out the socket. Under another server a disconnect shows when the next piece of
    a streamed answer can't be sent.
    """

    def __init__(self, environ):
        self.socket = environ.get("werkzeug.socket") or environ.get("gunicorn.socket")

    def is_set(self):
        if self.socket is None:
            return False
        try:
            # a closed connection is readable, and there is nothing to read
            with selectors.DefaultSelector() as selector:
                selector.register(self.socket, selectors.EVENT_READ)
                readable = bool(selector.select(0))
            return readable and not self.socket.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True
