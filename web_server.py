"""The chat page, and the same model behind an API that OpenAI's clients speak.

python web_server.py                     # out/512_vlm_sft.pth on http://127.0.0.1:7788
python web_server.py --demo              # the demo's model
python web_server.py --weights FILE --host 0.0.0.0 --port 80
python web_server.py --watch             # only the curves of trainings, without a model

Any other WSGI server can run it in one process with many threads:
gunicorn --threads 32 'web_server:create_app("--demo")'

GET  /                      the page                       GET  /v1/models        what is served
POST /v1/chat/completions   ask, streamed or whole         GET  /health           how the server is
POST /attention             where the model looked         GET  /info             what the page needs to know
GET  /training              curves of trainings            GET  /training/runs    what they are drawn from
"""

import argparse
import base64
import contextlib
import io
import json
import logging
import selectors
import socket
import sys
import threading
import time
import uuid
import warnings
from pathlib import Path
from urllib.parse import quote

import torch
from flask import Flask, Response, jsonify, redirect, request, send_from_directory
from PIL import Image, UnidentifiedImageError
from werkzeug.exceptions import HTTPException, NotFound, RequestEntityTooLarge, ServiceUnavailable, UnsupportedMediaType
from werkzeug.serving import make_server

from model.arguments import add_chat_arguments, add_model_arguments, add_switch, load_chat, parse_with_demo, settings_of
from model.conversation import as_conversation, split_at_images
from model.errors import BadInput, run_script
from model.generate import SETTINGS
from model.images import MAX_PIXELS, picture_frames, video_frames
from model.score import read_questions
from model.stages import DEMO_MODEL
from model.training.logs import read_log

DEMO = {**DEMO_MODEL, "temperature": 0.0}  # the demo's questions have one right answer

MB = 1_000_000
MAX_PICTURE, MAX_REQUEST = 20 * MB, 28 * MB  # in bytes; in base64, a third is added
MAX_CLIP_PIXELS = 1000 * MB  # of all its frames
MAX_CHARACTERS = 10_000  # far more than fit into the model's context, which is checked by itself
VIDEO_TYPES = {"video/mp4": "mp4", "video/quicktime": "mov", "video/webm": "webm"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

OPTIONS = {name: name for name in SETTINGS} | {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
del OPTIONS["max_new_tokens"]
OTHER_FIELDS = {"model", "messages", "stream", "stream_options", "stop", "user", "return_token_ids"}
NEUTRAL = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False}  # only these values change nothing
ROLES = ("system", "user", "assistant")


# --- requests -------------------------------------------------------------------------------------------------------


def check(true, message):
    if not true:
        raise BadInput(message)


def check_fields(given, allowed, what):
    for name in given:
        check(name in allowed, f"{what} has no field {name!r:.50}; it can have {', '.join(sorted(allowed))}")


def read_body(allowed):
    """The JSON object of the request, with nothing in it but `allowed` fields; those that are null are left out."""
    if not request.is_json:
        raise UnsupportedMediaType("send JSON, with the header Content-Type: application/json")
    try:
        body = json.loads(request.get_data(cache=False))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the request is not valid JSON ({str(error)[:100]})") from None
    check(isinstance(body, dict), "the request should be a JSON object")
    check_fields(body, allowed, "the request")
    return {name: value for name, value in body.items() if value is not None}


def read_messages(chat, messages):
    """OpenAI's messages -> (turns, media): the conversation for `Chat.stream`, and its pictures and clips in reading order.

    Each of the media is a list of pixels (3, S, S): one of a picture, several of a clip.
    """
    check(isinstance(messages, list) and messages, "messages should be a list of at least one message")
    most = chat.config.max_seq_len  # each has a token at least
    check(len(messages) <= most, f"there are {len(messages)} messages, more than the {most} tokens that are read")
    said, characters = [], 0
    for message in messages:
        check(isinstance(message, dict), "each message should be an object with role and content")
        check_fields(message, {"role", "content", "name"}, "a message")
        role = message.get("role")
        check(role in ROLES, f"role should be one of {', '.join(ROLES)}, not {role!r:.50}")
        text, urls = read_content(message.get("content"))
        named = len(split_at_images(text, chat.config.image_special_token)) > 1
        check(role == "user" or not (urls or named), f"only user messages can have pictures, not those of role {role}")
        characters += len(text)
        check(characters <= MAX_CHARACTERS, f"the text has over {MAX_CHARACTERS} characters, the most that is read")
        said.append((role, text, urls))
    check(role == "user", "the last message should be the user's question")
    check(text.replace("<image>", "").strip(), "the question is empty")
    sent, most = sum(len(urls) for _, _, urls in said), chat.config.max_seq_len // chat.config.image_tokens
    check(sent <= most, f"{sent} pictures were sent, and the model's context holds {most} at most")
    turns, media = [], []
    for role, text, urls in said:
        own = [read_medium(chat, kind, url, len(media) + i) for i, (kind, url) in enumerate(urls, 1)]
        turns += as_conversation(text, len(flat(own)), chat.config) if role == "user" else [(role, text)]
        media += own
    return turns, media


def flat(media):
    """All pictures and frames in one list."""
    return [pixels for frames in media for pixels in frames]


def read_content(content):
    """A message's content, text or a list of parts -> (its text, the kinds and URLs of its pictures and clips)."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    check(isinstance(content, list), "content should be text or a list of parts")
    texts, urls = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        known = ("text", "image_url", "video_url")
        check(kind in known, f"a part of type {kind!r:.50} can't be read: only {', '.join(known)}")
        value = part.get(kind)
        if kind != "text":
            value = value.get("url") if isinstance(value, dict) else None
        check(isinstance(value, str), f"a part of type {kind} should have text under {kind}{'.url' * (kind != 'text')}")
        if kind == "text":
            texts.append(value)
        else:
            urls.append((kind, value))
    text = "\n".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the text holds half a character (a lone surrogate), which is not valid UTF-8") from None
    return text, urls


decoding = threading.Lock()  # one picture at a time is unpacked, so that many visitors don't fill the memory


def read_medium(chat, kind, url, number):
    """A picture, or with kind "video_url" a clip, in a data: URL -> a list of pixels (3, S, S)."""
    head, _, data = url.partition(",")
    check(head.startswith("data:"), f"picture {number}: only data: URLs are read, this server fetches nothing")
    if len(data) * 3 // 4 > MAX_PICTURE:
        raise RequestEntityTooLarge(f"picture {number} is over {MAX_PICTURE // MB} MB: send a smaller one")
    check(head.endswith(";base64"), f"picture {number}: its data: URL should be in base64")
    with decoding:
        try:
            file = io.BytesIO(base64.b64decode(data, validate=True))
        except ValueError:
            raise BadInput(f"picture {number}: its base64 is broken") from None
        try:
            size, clip = chat.encoder.image_size, kind == "video_url"
            most = chat.max_frames if clip else 1
            format = VIDEO_TYPES.get(head.removeprefix("data:").partition(";")[0])
            if format:
                check(clip, "a video should be sent as video_url, not as image_url")
                return video_frames(file, format, size, most, MAX_CLIP_PIXELS)
            with Image.open(file, formats=FORMATS) as image:
                pixels = image.width * image.height
                check(pixels <= MAX_PIXELS, f"it has {pixels / MB:.0f} megapixels, over {MAX_PIXELS // MB}")
                count = getattr(image, "n_frames", 1) if clip else 1
                check(count * pixels <= MAX_CLIP_PIXELS, f"it has {count} frames, too many of this size: cut it")
                return picture_frames(image, size, most)
        except BadInput as problem:
            raise BadInput(f"picture {number}: {problem}") from None
        except UnidentifiedImageError:
            raise BadInput(
                f"picture {number} can't be read: no picture or clip, or of a kind that is not read"
            ) from None
        except Exception as error:  # noqa: BLE001  Pillow's decoders raise all sorts of things on broken files
            raise BadInput(f"picture {number} can't be read: {str(error)[:100]}") from None


def read_options(body, defaults):
    """How the answer should be drawn: the arguments of `Chat.stream`."""
    options = dict(defaults)
    for field, name in OPTIONS.items():
        if field in body:
            check(isinstance(body[field], (int, float)), f"{field} should be a number, not {body[field]!r:.50}")
            options[name] = SETTINGS[name].read(field, body[field])
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    good = isinstance(stop, list) and len(stop) <= 4 and all(isinstance(text, str) and text for text in stop)
    check(good, "stop should be a text, or up to four of them")
    for field, value in NEUTRAL.items():
        check(body.get(field, value) == value, f"{field} can only be {value!r} here, not {body.get(field)!r:.50}")
    for field in ("stream", "return_token_ids"):
        check(isinstance(body.get(field, False), bool), f"{field} should be true or false, not {body.get(field)!r:.50}")
    check(isinstance(body.get("stream_options", {}), dict), "stream_options should be an object")
    return {**options, "stop": stop}


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


# --- one model, many visitors ---------------------------------------------------------------------------------------


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

    def leave(self, ticket):
        with self.changed:
            self.tickets.remove(ticket)
            self.changed.notify_all()


# --- the application ------------------------------------------------------------------------------------------------


def parse_arguments(flags):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_chat_arguments(parser)
    add_switch(
        parser, "--multi", help="the model that was trained on several pictures at a time, and sample pictures for it"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default %(default)s)")
    parser.add_argument("--port", type=int, default=7788)
    parser.add_argument(
        "--queue", type=int, default=8, help="how many may wait while one is answered (default %(default)s)"
    )
    add_switch(parser, "--watch", help="only the curves of trainings, at /training, without a model")
    return parse_with_demo(parser, DEMO, flags)


def create_app(*flags):
    """The Flask application, its model loaded and warmed up. Takes the flags of the command line."""
    args = parse_arguments(flags)
    app = Flask(__name__, static_folder="web", static_url_path="/web")
    app.json.ensure_ascii = False
    app.after_request(guard)
    app.register_error_handler(HTTPException, tell_error)
    app.register_error_handler(BadInput, tell_error)
    add_training(app, Path(args.out_dir).absolute())
    if args.watch:
        app.add_url_rule("/", view_func=lambda: redirect("training"))
        return app
    chat = load_chat(args)
    chat.warm_up()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_medium has a limit of its own
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST
    app.chat, app.line, app.generated = chat, Line(args.queue), 0
    samples = Path("dataset/eval_multi_images" if args.multi else "dataset/eval_images").absolute()
    add_page(app, samples, settings_of(args))
    add_api(app, settings_of(args))
    return app


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
            for _ in line.ahead(ticket):
                if hangup.is_set():
                    return "", 499  # nobody reads it
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
        ticket = line.join()
        try:
            for _ in line.ahead(ticket):
                pass
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


def main():
    args = parse_arguments(sys.argv[1:])
    app = create_app(*sys.argv[1:])
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for every request
    server = make_server(args.host, args.port, app, threaded=True)
    print("watching trainings" if args.watch else app.chat.loaded)
    print(f"open http://{args.host}:{server.port} (Ctrl-C stops)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    run_script(main)
