"""The routes of the page and of the API that OpenAI's clients speak, and the events of a streamed answer."""

import base64
import contextlib
import io
import json
import time
import uuid
from urllib.parse import quote

import torch
from flask import Response, jsonify, request, send_from_directory
from PIL import Image
from werkzeug.exceptions import HTTPException, NotFound, RequestEntityTooLarge

from model.errors import BadInput
from model.score import read_questions
from model.training.logs import read_log

from .queue import Hangup
from .requests import (
    MAX_PICTURE,
    MAX_REQUEST,
    MB,
    NEUTRAL,
    OPTIONS,
    OTHER_FIELDS,
    check,
    flat,
    read_body,
    read_messages,
    read_options,
)

CLIENT_GONE = "", 499  # the client has hung up, so nobody reads this response


def tell_error(error):
    """An error in the shape of OpenAI's API."""
    status = error.code if isinstance(error, HTTPException) else 400
    message = error.description if isinstance(error, HTTPException) else str(error)
    if status == 413 and error.description == RequestEntityTooLarge.description:
        message = f"the request is over {MAX_REQUEST // MB} MB"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    response = jsonify(error={"message": message, "type": kind, "param": None, "code": None})
    response.status_code = status
    if getattr(error, "retry_after", None):
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def guard(response):
    """The pages load nothing from elsewhere, and no other page may frame them."""
    response.headers["Content-Security-Policy"] = (
        "default-src 'self'; img-src 'self' data: blob:; media-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def add_training(app, out_dir):
    """The page with the curves of the trainings in a folder, and what it draws: the last run of each log, newest first."""

    @app.get("/training")
    def training():
        return send_from_directory(app.static_folder, "training.html")

    @app.get("/training/runs")
    def runs():
        found = []
        for file in out_dir.glob("*.jsonl"):
            with contextlib.suppress(BadInput, OSError):  # a file of something else, or gone by now
                found.append({**read_log(file), "name": file.stem, "updated": file.stat().st_mtime})
        response = jsonify(sorted(found, key=lambda run: -run["updated"]))
        response.add_etag()
        return response.make_conditional(request)


def add_page(app, samples, defaults):
    """The page, its pictures, and what it needs to know."""
    chat = app.chat
    asked = [
        {
            "pictures": [f"samples/{quote(path.name)}" for path in paths],
            "question": question.replace("<image>", "").strip(),
        }
        for paths, question in read_questions(samples)
    ]

    @app.get("/")
    def page():
        return send_from_directory(app.static_folder, "index.html")

    @app.get("/samples/<name>")
    def sample(name):
        return send_from_directory(samples, name)

    @app.get("/info")
    def info():
        return {
            "model": chat.name,
            "parameters": chat.parameters,
            "device": str(chat.device),
            "layers": chat.config.n_layers,
            "settings": defaults,
            "max_pictures": chat.config.max_seq_len // chat.config.image_tokens,
            "max_picture_bytes": MAX_PICTURE,
            "samples": asked,
        }

    @app.get("/health")
    def health():
        visitors = len(app.line.tickets)
        return {"status": "ok", "model": chat.name, "waiting": max(0, visitors - 1), "generated_tokens": app.generated}


def add_api(app, defaults):
    """What OpenAI's clients call, and the attention behind an answer."""
    chat, line = app.chat, app.line
    model = {"id": chat.name, "object": "model", "created": int(time.time()), "owned_by": "minimind-v"}

    def check_model(name):
        if name != chat.name:
            raise NotFound(f"there is no model {name!r:.80}; this server has {chat.name!r}")

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/<name>")
    def one_model(name):
        check_model(name)
        return model

    @app.post("/v1/chat/completions")
    def completions():
        with line.reading():
            body = read_body(OTHER_FIELDS | OPTIONS.keys() | NEUTRAL.keys())
            check_model(body.get("model", chat.name))
            options = read_options(body, defaults)
            turns, media = read_messages(chat, body.pop("messages", None))
        hangup = Hangup(request.environ)
        answer = chat.stream(turns, flat(media), stop_event=hangup, **options)
        ticket = line.join()
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.name}
        if body.get("stream"):
            response = Response(events(answer, ticket, hangup, head, body), mimetype="text/event-stream")
            response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
            response.call_on_close(lambda: line.leave(ticket))
            return response
        try:
            if not line.reach(ticket, hangup):
                return CLIENT_GONE
            text = "".join(counted(answer))
        finally:
            line.leave(ticket)
        message = {"role": "assistant", "content": text}
        if body.get("return_token_ids"):
            message["token_ids"] = answer.token_ids
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish(answer)}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def counted(answer):
        """The answer's pieces; counts its tokens for /health."""
        seen = 0
        for piece in answer:
            app.generated += len(answer.token_ids) - seen
            seen = len(answer.token_ids)
            yield piece

    def events(answer, ticket, hangup, head, body):
        """Server-sent events: one a piece, the end, and before them, as comments, how many are waiting ahead."""

        def chunk(delta, finish_reason=None):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return event({**head, "object": "chat.completion.chunk", "choices": [choice]})

        for place in line.ahead(ticket):
            if hangup.is_set():
                return
            yield f": waiting {place}\n\n"
        if hangup.is_set():
            return
        yield chunk({"role": "assistant", "content": ""})
        sent = 0
        for piece in counted(answer):
            ids = {"token_ids": answer.token_ids[sent:]} if body.get("return_token_ids") else {}
            sent = len(answer.token_ids)
            yield chunk({"content": piece, **ids})
        yield chunk({}, finish(answer))
        if body.get("stream_options", {}).get("include_usage"):
            yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)})
        yield "data: [DONE]\n\n"

    @app.post("/attention")
    def attention():
        """{"messages": as asked, "token_ids": the answer's} -> for each layer, token and picture, a share per patch.

        `frames` has a list for each picture or clip sent: what the model saw of a clip, as JPEGs; [null] for a picture.
        """
        with line.reading():
            body = read_body({"messages", "token_ids"})
            turns, media = read_messages(chat, body.pop("messages", None))
        check(media, "there is no picture in the messages")
        ids, room = body.get("token_ids"), chat.config.max_seq_len - chat.prompt(turns).shape[1]
        good = isinstance(ids, list) and all(type(i) is int and 0 <= i < chat.config.vocab_size for i in ids)
        check(
            good and 0 < len(ids) <= room,
            f"token_ids should be 1 to {room} token ids, from 0 to {chat.config.vocab_size - 1}",
        )
        hangup = Hangup(request.environ)
        ticket = line.join()
        try:
            if not line.reach(ticket, hangup):
                return CLIENT_GONE
            shares = chat.attention(turns, flat(media), ids)[..., 1:]  # without the class token, which has no place
        finally:
            line.leave(ticket)
        return {
            "grid": round(shares.shape[-1] ** 0.5),
            "shares": torch.round(shares.float(), decimals=5).tolist(),
            "frames": [[jpeg(pixels) for pixels in frames] if len(frames) > 1 else [None] for frames in media],
        }


def jpeg(pixels):
    """Pixels (3, S, S) as a data: URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "jpeg")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def finish(answer):
    """Why the answer ended, in OpenAI's words."""
    return "stop" if answer.finish_reason == "stop" else "length"


def usage(answer):
    """OpenAI's counts, and how fast the answer came."""
    new = len(answer.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": answer.prompt_tokens + new,
        "first_token_seconds": answer.first_token_seconds,
        "tokens_per_second": answer.tokens_per_second,
    }


def event(content):
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
