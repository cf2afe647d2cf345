"""Relays requests to an inference engine with OpenAI's API, such as vLLM, in place of a model of our own."""

import contextlib
import http.client
import json
import os
import socket
import threading
from urllib.parse import quote, urlsplit

from flask import Response, request
from werkzeug.exceptions import BadGateway, HTTPException, ServiceUnavailable

from model.errors import BadInput

from .api import event
from .queue import DisconnectEvent
from .requests import read_json

TIMEOUT = 10  # seconds to connect, and for the list of models; an answer may take as long as it needs


class Backend:
    """The routes of OpenAI's API, relayed to an engine."""

    def __init__(self, url, settings):
        """url: of the engine's API, e.g. http://127.0.0.1:8000/v1. OPENAI_API_KEY in the environment is sent along.

        settings: sampling settings for requests that don't set them; None leaves one to the engine.
        BadInput if no engine answers there.
        """
        # where the engine is, and what each request to it carries
        self.url = url
        parts = urlsplit(url)
        self.address, self.path = parts.netloc, parts.path
        self.connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.headers = {"Content-Type": "application/json"}
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise BadInput("OPENAI_API_KEY has characters that no key has: correct it, or unset it")
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

        # defaults of the fields that a request leaves out
        self.info = {"backend": True, "model": self.find_model(), "settings": settings}
        defaults = {"model": self.info["model"], **settings}
        defaults["max_tokens"] = defaults.pop("max_new_tokens")
        self.defaults = {name: value for name, value in defaults.items() if value is not None}

    def find_model(self):
        """The name of the model that the engine serves, the first one if it has several."""
        try:
            return json.loads(self.get("/models").data)["data"][0]["id"]
        except BadGateway as problem:
            way_out = "start one, for example with `vllm serve FOLDER`, or correct --backend"
            raise BadInput(f"{problem.description}: {way_out}") from None
        except HTTPException as problem:
            way_out = (
                "correct the key in OPENAI_API_KEY" if problem.code in (401, 403) else "does --backend end in /v1?"
            )
            raise BadInput(
                f"{self.url}/models answers {problem.code} ({problem.description:.200}): {way_out}"
            ) from None
        except (ValueError, LookupError, TypeError):
            raise BadInput(f"{self.url}/models lists no model, as OpenAI's API does: correct --backend") from None

    def add_routes(self, app):
        app.add_url_rule("/health", view_func=self.health)
        app.add_url_rule("/v1/models", view_func=self.list_models)
        app.add_url_rule("/v1/models/<path:name>", view_func=self.get_model)
        app.add_url_rule("/v1/chat/completions", view_func=self.completions, methods=["POST"])

    def health(self):
        try:
            self.get("/models")
        except HTTPException as problem:
            raise ServiceUnavailable(problem.description) from None
        return {"status": "ok", "model": self.info["model"]}

    def list_models(self):
        return self.get("/models")

    def get_model(self, name):
        return self.get(f"/models/{quote(name, safe='')}")

    def get(self, path):
        """The engine's reply to a GET, as a response."""
        with self.connection() as connection:
            connection.request("GET", self.path + path, headers=self.headers)
            with connection.getresponse() as reply:
                return whole_response(reply)

    def completions(self):
        """Relays a conversation to the engine, and its answer to the client, piece by piece if it is streamed."""
        # null is as good as left out
        given = {name: value for name, value in read_json().items() if value is not None}
        body = json.dumps({**self.defaults, **given}).encode()

        # the engine's reply, waited for as long as the client does
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(self.connection())
            connection.sock.settimeout(None)
            stack.enter_context(hanging_up(connection.sock, DisconnectEvent(request.environ)))
            connection.request("POST", f"{self.path}/chat/completions", body, self.headers)
            reply = stack.enter_context(connection.getresponse())
            if reply.headers.get_content_type() != "text/event-stream":
                return whole_response(reply)

            # streamed: the pieces are read after this function has returned, so hang up when the response is closed
            response = Response(pieces(reply), reply.status, content_type=reply.headers["Content-Type"])
            response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
            response.call_on_close(stack.pop_all().close)
            return response

    @contextlib.contextmanager
    def connection(self):
        """A connection to the engine, for one request; BadGateway if the engine doesn't answer on it."""
        try:
            with contextlib.closing(self.connection_type(self.address, timeout=TIMEOUT)) as connection:
                connection.connect()
                yield connection
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise BadGateway(f"no engine answers at {self.url} ({error})") from None


@contextlib.contextmanager
def hanging_up(sock, disconnected):
    """While the block runs, closes the engine's socket once the client has gone: the engine then stops generating."""
    finished = threading.Event()

    def watch():
        while not finished.wait(0.5):
            if disconnected.is_set():
                with contextlib.suppress(OSError):  # it has ended already
                    sock.shutdown(socket.SHUT_RDWR)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def pieces(reply):
    """The bytes of a streamed reply as they come; if they end too soon, a last event says so."""
    try:
        while piece := reply.read1():
            yield piece
    except (OSError, http.client.HTTPException, ValueError):  # ValueError: a TLS connection was closed
        yield event({"error": {"message": "the engine stopped in the middle of its answer", "type": "server_error"}})


def whole_response(reply):
    """A reply, read to its end, as a response. An engine's error is raised as an HTTPException of its status."""
    data = reply.read()
    if reply.status == 200:
        return Response(data, content_type=reply.headers["Content-Type"])
    # a refusal of the key may repeat it, and visitors should not read it
    says = "" if reply.status in (401, 403) else error_message(data)
    error = HTTPException(says or reply.reason)
    error.code = reply.status if reply.status >= 400 else BadGateway.code
    raise error


def error_message(data):
    """What an engine's error says, "" if it isn't JSON. {"error": {"message": ...}} is OpenAI's form; others leave parts out."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message", "detail"):
        if isinstance(message, dict) and name in message:
            message = message[name]
    return str(message)[:1000]
