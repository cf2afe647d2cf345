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
import contextlib
import logging
import sys
import warnings
from pathlib import Path

from flask import Flask, redirect
from PIL import Image
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

from model.arguments import add_chat_arguments, add_model_arguments, add_switch, load_chat, parse_with_demo, settings_of
from model.errors import BadInput, run_script
from model.stages import DEMO_MODEL
from web.api import add_api, add_page, add_training, guard, tell_error
from web.queue import Line
from web.requests import MAX_REQUEST

DEMO = {**DEMO_MODEL, "temperature": 0.0}  # the demo's questions have one right answer


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
    app = Flask(__name__, static_folder="web/static", static_url_path="/web")
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
