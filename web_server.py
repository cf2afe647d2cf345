"""The chat page, and an API for the same model that OpenAI's clients speak.

python web_server.py                     # out/512_vlm_sft.pth on http://127.0.0.1:7788
python web_server.py --demo              # the demo's model
python web_server.py --weights FILE --host 0.0.0.0 --port 80
python web_server.py --watch             # only the training curves, without a model
python web_server.py --backend http://127.0.0.1:8000/v1    # the page before an engine, such as vLLM

Any other WSGI server can run it, in one process with many threads:
gunicorn --threads 32 'web_server:create_app("--demo")'

GET  /                      the chat page                  GET  /v1/models        the model that is served
POST /v1/chat/completions   an answer, streamed or whole   GET  /health           status of the server
POST /attention             where the model looked         GET  /info             what the chat page needs to know
POST /check                 whether a picture can be read  GET  /training         the page of training curves
                                                           GET  /training/runs    the data of its curves
"""

import argparse
import contextlib
import logging
import sys
import warnings
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, redirect
from PIL import Image
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

from model.arguments import (
    add_chat_arguments,
    add_model_arguments,
    add_switch,
    load_chat,
    number,
    parse_with_defaults,
    settings_of,
)
from model.errors import BadInput, run_script
from model.files import in_repository
from model.stages import DEMO_ANSWERING
from web.api import (
    ChatAPI,
    add_access_rules,
    add_chat_page,
    add_security_headers,
    add_training_page,
    error_response,
)
from web.backend import Backend
from web.queue import RequestQueue
from web.requests import MAX_REQUEST


def parse_arguments(flags):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_chat_arguments(parser)
    add_switch(
        parser, "--multi", help="use the model trained on several pictures at a time, and sample pictures for it"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default %(default)s)")
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=7788, help="0 takes any free one (default %(default)s)"
    )
    parser.add_argument(
        "--queue",
        type=number(int, 0, 1000),
        default=8,
        help="requests that may wait while one is answered (default %(default)s)",
    )
    parser.add_argument(
        "--cors",
        nargs="+",
        type=read_origin,
        default=[],
        metavar="ORIGIN",
        help="let pages of these sites use the server, e.g. https://example.com; * for all (default: its own pages only)",
    )
    add_switch(parser, "--watch", help="show only the training curves, at /training, without a model")
    parser.add_argument(
        "--backend",
        type=read_url,
        metavar="URL",
        help="load no model, and let an engine with OpenAI's API answer, e.g. http://127.0.0.1:8000/v1 of `vllm serve "
        "FOLDER`: it gets the key in the environment's OPENAI_API_KEY, if there is one, limits answers itself unless "
        "--max_new_tokens is given, and can't show what the model looked at",
    )
    args = parse_with_defaults(parser, defaults_of, flags)

    # flags of a model of our own, and of no model at all
    for name in ("weights", "quantize", "watch"):
        if args.backend and getattr(args, name):
            raise BadInput(f"--backend lets an engine answer with its own model: leave out --backend or --{name}")
    return args


def defaults_of(args):
    """The defaults that --demo changes, and --backend: engines refuse a question if the longest answer to it may not fit."""
    demo = DEMO_ANSWERING if args.demo else {}
    return {**demo, "max_new_tokens": None} if args.backend else demo


def read_origin(text):
    """A site as browsers name it in the header Origin."""
    text = text.lower()
    parts = urlsplit(text)
    if text not in ("*", "null") and not (parts.netloc and text == f"{parts.scheme}://{parts.netloc}"):
        raise argparse.ArgumentTypeError(f"{text!r} should be a site without a path, like https://example.com")
    return text


def read_url(text):
    """The address of an engine's API, without a slash at the end."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} should be an address like http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def create_app(*flags):
    """The Flask application, its model loaded and warmed up or its engine asked. Takes the flags of the command line."""
    # what every response needs, with a model or without
    args = parse_arguments(flags)
    app = Flask(__name__, static_folder="web/static", static_url_path="/web")
    app.json.ensure_ascii = False
    app.after_request(add_security_headers)
    add_access_rules(app, args.cors)
    app.register_error_handler(HTTPException, error_response)
    app.register_error_handler(BadInput, error_response)

    # training curves need no model
    add_training_page(app, Path(args.out_dir).absolute())
    if args.watch:
        app.summary = "showing training curves only"
        app.add_url_rule("/", view_func=lambda: redirect("training"))
        return app

    # limits of uploads; Pillow's own warning about large pictures would be one more, on the terminal
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    # the API, of an engine or of a model that is loaded here
    settings = settings_of(args)
    if args.backend:
        app.api = Backend(args.backend, settings)
        app.summary = f"relaying to {app.api.info['model']} at {args.backend}"
    else:
        app.chat = load_chat(args)
        app.chat.warm_up()
        app.api = ChatAPI(app.chat, RequestQueue(args.queue), settings)
        app.summary = app.chat.summary
    app.api.add_routes(app)

    # the chat page
    single = not (args.multi or args.weights or args.backend)  # the model learned about single pictures only
    samples = Path(in_repository("dataset/eval_multi_images" if args.multi else "dataset/eval_images")).absolute()
    add_chat_page(app, samples, {**app.api.info, "demo": args.demo and not args.backend, "single": single})
    return app


def main():
    args = parse_arguments(sys.argv[1:])
    app = create_app(*sys.argv[1:])
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # don't print a line for every request
    server = make_server(args.host, args.port, app, threaded=True)
    print(app.summary)
    print(f"open http://{args.host}:{server.port} (Ctrl-C stops)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    run_script(main)
