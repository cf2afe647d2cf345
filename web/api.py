"""The routes: the pages, the API that OpenAI's clients speak, and the events of a streamed answer."""

import base64
import contextlib
import io
import ipaddress
import json
import time
import uuid
from urllib.parse import quote, urlsplit

import torch
from flask import Response, jsonify, request, send_from_directory
from PIL import Image
from werkzeug.exceptions import Forbidden, HTTPException, NotFound, RequestEntityTooLarge

from model.errors import BadInput
from model.score import read_questions
from model.training.logs import read_log

from .queue import DisconnectEvent
from .requests import (
    COMPLETION_FIELDS,
    MARKS,
    MAX_PICTURE,
    MAX_REQUEST,
    MB,
    NEUTRAL,
    all_frames,
    read_body,
    read_medium,
    read_messages,
    read_options,
    read_token_ids,
    require,
)

CLIENT_GONE = "", 499  # an empty response, which nobody reads


# --- the pages ------------------------------------------------------------------------------------------------------


def add_training_page(app, out_dir):
    """The page of training curves, and what it draws: the last run of each log in a folder, the newest first."""

    @app.get("/training")
    def training():
        return send_from_directory(app.static_folder, "training.html")

    @app.get("/training/runs")
    def runs():
        found = []
        for file in out_dir.glob("*.jsonl"):
            with contextlib.suppress(BadInput, OSError):  # not the log of a training, or deleted meanwhile
                found.append({**read_log(file), "name": file.stem, "updated": file.stat().st_mtime})
        response = jsonify(sorted(found, key=lambda run: -run["updated"]))

        # the page asks every two seconds; without news it gets an empty 304
        response.add_etag()
        return response.make_conditional(request)


def add_chat_page(app, samples, facts):
    """The chat page, the sample pictures in the folder `samples`, and what the page needs to know, such as the model's name.

    facts: `info` of the API that answers, a ChatAPI or a Backend.
    """
    sample_questions = []
    for paths, question in read_questions(samples):
        pictures = [f"samples/{quote(path.name)}" for path in paths]
        sample_questions.append({"pictures": pictures, "question": question.replace("<image>", "").strip()})

    @app.get("/")
    def page():
        return send_from_directory(app.static_folder, "index.html")

    @app.get("/samples/<name>")
    def sample(name):
        return send_from_directory(samples, name)

    @app.get("/info")
    def info():
        return {**facts, "max_picture_bytes": MAX_PICTURE, "samples": sample_questions}


# --- the API --------------------------------------------------------------------------------------------------------


class ChatAPI:
    """What OpenAI's clients call, and the attention behind an answer: one model, with a queue before it."""

    def __init__(self, chat, queue, defaults):
        """defaults: the options of `Chat.stream` for requests that don't set them."""
        self.chat = chat
        self.queue = queue
        self.defaults = defaults
        self.generated_tokens = 0  # since the start
        self.model = {"id": chat.name, "object": "model", "created": int(time.time()), "owned_by": "minimind-v"}
        self.info = {
            "model": chat.name,
            "parameters": chat.parameters,
            "device": str(chat.device),
            "layers": chat.config.n_layers,
            "settings": defaults,
            "max_pictures": chat.max_pictures,
        }

    def add_routes(self, app):
        app.add_url_rule("/health", view_func=self.health)
        app.add_url_rule("/v1/models", view_func=self.list_models)
        app.add_url_rule("/v1/models/<name>", view_func=self.get_model)
        app.add_url_rule("/v1/chat/completions", view_func=self.completions, methods=["POST"])
        app.add_url_rule("/attention", view_func=self.attention, methods=["POST"])
        app.add_url_rule("/check", view_func=self.check_medium, methods=["POST"])

    def health(self):
        return {
            "status": "ok",
            "model": self.chat.name,
            "waiting": max(0, len(self.queue.tickets) - 1),
            "generated_tokens": self.generated_tokens,
        }

    def list_models(self):
        return {"object": "list", "data": [self.model]}

    def get_model(self, name):
        self.check_model(name)
        return self.model

    def check_model(self, name):
        if name != self.chat.name:
            raise NotFound(f"there is no model {name!r:.80}; this server has {self.chat.name!r}")

    def check_medium(self):
        """{"type": "image_url" or "video_url", "url"} -> {"frames": how many the model sees}, or {"problem": why none}."""
        with self.queue.reading():
            body = read_body({"type", "url"})
            kind, url = body.get("type"), body.get("url")
            require(kind in ("image_url", "video_url"), "type should be image_url or video_url")
            require(isinstance(url, str), "url should be a string")
            try:
                return {"frames": len(read_medium(self.chat, kind, url, 1))}
            except BadInput as problem:
                return {"problem": str(problem)}

    def completions(self):
        """Answers a conversation, as one JSON object or, with "stream", as server-sent events."""
        # read and check the whole request before it queues, so that a bad one is refused at once
        with self.queue.reading():
            body = read_body(COMPLETION_FIELDS, NEUTRAL, MARKS)
            self.check_model(body.get("model", self.chat.name))
            options = read_options(body, self.defaults)
            turns, media = read_messages(self.chat, body.pop("messages", None))  # pop: base64 text is large

        # this encodes the prompt and checks its length; CLIP and the model run only once the answer is iterated
        disconnected = DisconnectEvent(request.environ)
        answer = self.chat.stream(turns, all_frames(media), stop_event=disconnected, **options)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.chat.name}
        ticket = self.queue.join()

        # streamed: the events are made after this function has returned, so leave when the response is closed
        if body.get("stream"):
            events = self.stream_events(answer, ticket, disconnected, head, body)
            response = Response(events, mimetype="text/event-stream")
            response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
            response.call_on_close(lambda: self.queue.leave(ticket))
            return response

        # whole: wait for the model and answer before returning
        try:
            if not self.queue.wait_until_first(ticket, disconnected):
                return CLIENT_GONE
            text = "".join(self.count_tokens(answer))
        finally:
            self.queue.leave(ticket)
        message = {"role": "assistant", "content": text}
        if body.get("return_token_ids"):
            message["token_ids"] = answer.token_ids
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def stream_events(self, answer, ticket, disconnected, head, body):
        """The server-sent events of an answer: its position in the queue, its pieces of text, its end."""
        # report how many are ahead, in comments, which OpenAI's clients ignore
        for ahead in self.queue.wait(ticket):
            if disconnected.is_set():
                return
            yield f": waiting {ahead}\n\n"
        if disconnected.is_set():
            return

        # one event for each piece of text, with the ids of its tokens if the client asked for them
        yield chunk(head, {"role": "assistant", "content": ""})
        sent = 0
        for piece in self.count_tokens(answer):
            delta = {"content": piece}
            if body.get("return_token_ids"):
                delta["token_ids"] = answer.token_ids[sent:]
            sent = len(answer.token_ids)
            yield chunk(head, delta)

        # why it ended and, if asked for, how long it is; OpenAI's last event is always [DONE]
        yield chunk(head, {}, finish_reason(answer))
        if body.get("stream_options", {}).get("include_usage"):
            yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)})
        yield "data: [DONE]\n\n"

    def count_tokens(self, answer):
        """The pieces of the answer; adds its tokens to `generated_tokens` as they come."""
        counted = 0
        for piece in answer:
            self.generated_tokens += len(answer.token_ids) - counted
            counted = len(answer.token_ids)
            yield piece

    def attention(self):
        """{"messages": as in a completion, "token_ids": of the answer} -> where the model looked, token by token.

        shares: for each layer, token and picture, the share of attention that each patch got. grid: a picture has
        `grid` x `grid` patches. frames: for each video, JPEGs of the frames that the model saw; for a picture, [null].
        """
        # refuse bad requests before they wait, as `completions` does
        with self.queue.reading():
            body = read_body({"messages", "token_ids"})
            turns, media = read_messages(self.chat, body.pop("messages", None))
        require(media, "there is no picture in the messages")
        room = self.chat.config.max_seq_len - self.chat.encode_prompt(turns).shape[1]
        token_ids = read_token_ids(body.get("token_ids"), self.chat.config.vocab_size, room)

        # one forward for all tokens: it can't be interrupted, but isn't begun for a client that has gone
        disconnected = DisconnectEvent(request.environ)
        ticket = self.queue.join()
        try:
            if not self.queue.wait_until_first(ticket, disconnected):
                return CLIENT_GONE
            shares = self.chat.attention(turns, all_frames(media), token_ids)
        finally:
            self.queue.leave(ticket)

        # CLIP's first vector is its class token, which belongs to no patch
        grid = int(shares.shape[-1] ** 0.5)
        shares = shares[..., -grid * grid :].float()
        return {
            "grid": grid,
            "shares": torch.round(shares, decimals=5).tolist(),
            "frames": [[jpeg_url(pixels) for pixels in frames] if len(frames) > 1 else [None] for frames in media],
        }


def chunk(head, delta, finish_reason=None):
    """The event of a streamed answer that adds `delta` to its message."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return event({**head, "object": "chat.completion.chunk", "choices": [choice]})


def event(content):
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def finish_reason(answer):
    """Why the answer ended, in OpenAI's words."""
    return "stop" if answer.finish_reason == "stop" else "length"


def usage(answer):
    """OpenAI's token counts, and how fast the answer came."""
    completion_tokens = len(answer.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": answer.prompt_tokens + completion_tokens,
        "first_token_seconds": answer.first_token_seconds,
        "tokens_per_second": answer.tokens_per_second,
    }


def jpeg_url(pixels):
    """Pixels (3, S, S) as a JPEG in a data: URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "jpeg")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- every response -------------------------------------------------------------------------------------------------


def error_response(error):
    """An HTTP error or a BadInput, in the form of OpenAI's API."""
    status = error.code if isinstance(error, HTTPException) else 400
    message = error.description if isinstance(error, HTTPException) else str(error)
    if status == 413 and error.description == RequestEntityTooLarge.description:  # Flask's own limit, not a picture's
        message = f"the request is over {MAX_REQUEST // MB} MB"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    response = jsonify(error={"message": message, "type": kind, "param": None, "code": None})
    response.status_code = status
    if getattr(error, "retry_after", None):
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def add_access_rules(app, origins):
    """Pages of other sites may use the API only if they are among `origins`, as browsers write them; "*" allows all.

    A server for this computer alone refuses their requests, and names that lead here from elsewhere (DNS rebinding): a
    page that anyone visits could otherwise send its forms here. Programs other than browsers send no Origin.
    """

    def allowed(origin):
        return origin in origins or "*" in origins

    @app.before_request
    def refuse_other_sites():
        if not is_loopback(request.environ["SERVER_NAME"]):
            return
        host = request.headers.get("Host") or "localhost"
        if not is_loopback(host) and not any(allowed(f"{scheme}://{host}") for scheme in ("http", "https")):
            raise Forbidden(
                f"this server is for its own computer, not for requests to {host!r:.80}: "
                f"to allow them, start it with --cors http://{host:.80}"
            )
        origin = request.headers.get("Origin")
        if origin and origin.partition("://")[2] != host and not allowed(origin):
            raise Forbidden(
                f"this server is for its own pages, not for those of {origin!r:.80}: "
                f"to allow them, start it with --cors {origin:.80}"
            )

    @app.after_request
    def allow_other_sites(response):
        origin = request.headers.get("Origin")
        if origin and allowed(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Methods"] = "GET, POST"
            response.headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "")
        if origins:
            response.vary.add("Origin")
        return response


def is_loopback(host):
    """Whether a name or address, with or without a port, means the computer itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:  # neither
        return False


def add_security_headers(response):
    """The pages load nothing from elsewhere, and no other site may put them in a frame."""
    response.headers["Content-Security-Policy"] = (
        "default-src 'self'; img-src 'self' data: blob:; media-src data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
