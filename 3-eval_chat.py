"""Chat with a trained model about pictures, or let it answer many questions by itself.

python 3-eval_chat.py                          # in a terminal: pick pictures and ask, with out/512_vlm_sft.pth
python 3-eval_chat.py --demo                   # the same with the demo's model
python 3-eval_chat.py --demo --all             # every question of dataset/eval_images, then the score on held-out pictures
python 3-eval_chat.py --demo --all --multi     # the same for pairs of pictures and animations
python 3-eval_chat.py --score FILE --images_path FOLDER     # exact match on a labelled file (dataset/README.md)
"""

import argparse
import contextlib
import os
import random
import shlex
import sys
import tempfile
from pathlib import Path

from dataset.demo import drawing, world
from dataset.demo.sentences import LANGUAGES, read_scene
from model.arguments import add_chat_arguments, add_model_arguments, add_switch, load_chat, parse_with_demo, settings_of
from model.errors import BadInput, run_script
from model.files import in_repository
from model.generate import SETTINGS
from model.images import to_pixels
from model.score import read_questions, score
from model.stages import DEMO_ANSWERING, STAGES

# what the demo's answers are scored on, without and with --multi
DEMO_SCORES = {False: ("heldout", "unseen"), True: ("multi", "clips", "clips_shuffled")}
HELP = """\
/image FILE ...    show these pictures or videos: paths, or numbers from the list
/draw THINGS       draw a picture: /draw 红色 星形 左上角, small blue circle middle
/clear             drop the pictures and pick again
/set NAME VALUE    one of {settings}; without a name, show them
/help  /exit       this text; leave (or Ctrl-D)
Anything else is a question. Each stands alone: the model sees its pictures, not what was said before.
Ctrl-C stops an answer."""


# --- in a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """A chat in a terminal: the pictures it is about, and how answers are sampled."""

    def __init__(self, chat, folder, settings):
        self.chat = chat
        self.settings = settings
        self.available = sorted(file for file in folder.iterdir() if file.suffix != ".json")
        self.pixels = []
        self.picking = True  # the next line names pictures
        self.commands = {
            "/image": self.pick,
            "/draw": self.draw,
            "/clear": self.clear,
            "/set": self.set,
            "/help": self.help,
        }

    def run(self):
        """Reads and answers until `/exit` or the end of the input."""
        with contextlib.suppress(ImportError):  # Windows' terminal has line editing of its own
            import readline  # noqa: F401  gives input() its editing and its history
        print("/help lists the commands.")
        self.clear()
        while True:
            try:
                line = input("\npicture> " if self.picking else "\n> ").strip()
                line.encode()
                if line in ("/exit", "/quit"):
                    return
                self.handle(line)
            except BadInput as problem:
                print(problem)
            except KeyboardInterrupt:
                print("  (/exit leaves)")
            except UnicodeError:
                print("this was not UTF-8 text: set the terminal to UTF-8")
            except EOFError:
                print()
                return
            except OSError:  # there is no terminal any more
                raise
            except Exception as error:  # noqa: BLE001  one question may fail, out of memory say, and others not
                print(f"that did not work ({type(error).__name__}: {error})")

    def handle(self, line):
        """Runs a command, picks pictures, or asks a question."""
        command, _, rest = line.partition(" ")
        if command in self.commands:
            self.commands[command](rest.strip())
        elif self.picking or os.path.isfile(line):
            self.pick(line)
        elif line.startswith("/"):
            raise BadInput(f"there is no {command}; /help lists the commands")
        elif line:
            self.ask(line)

    def clear(self, _=""):
        self.pixels = []
        self.picking = True
        print("Available pictures (type a number or a file, several to compare them, nothing to ask without one):")
        for number, file in enumerate(self.available, 1):
            print(f"{number:>3}  {file}")

    def pick(self, text):
        """Reads the pictures that a line names: one file, or several files and numbers."""
        # a file whose name has spaces, or several words
        text = text.strip()
        try:
            names = [text] if os.path.isfile(text) else shlex.split(text, posix=os.name == "posix")
        except ValueError:
            raise BadInput(
                f"{text} names no picture, and has an open quotation mark: press Enter alone to ask without a picture"
            ) from None
        numbered = {str(number): file for number, file in enumerate(self.available, 1)}
        files = [numbered.get(name, Path(os.path.expanduser(name.strip("'\"")))) for name in names]

        # a picture is one list of pixels, a video several; what was shown before is replaced
        seen = [self.chat.load_frames([file]) for file in files]
        self.pixels = [pixels for frames in seen for pixels in frames]
        self.picking = False
        names = [
            f"{len(frames)} frames of {file.name}" if len(frames) > 1 else file.name
            for file, frames in zip(files, seen, strict=True)
        ]
        print(f"showing {' and '.join(names) or 'no picture'}: ask a question")

    def draw(self, text):
        """Draws what a line describes, in the demo's way, and shows it to the model."""
        scene = read_scene(text)
        picture = drawing.draw(scene, random.Random(text))
        file = Path(tempfile.gettempdir()) / "minimind-v-drawing.png"
        picture.save(file)
        self.pixels = [to_pixels(picture, self.chat.encoder.preprocess)]
        self.picking = False
        print(f"{LANGUAGES['en'].caption(scene)} Saved as {file}: ask a question")

    def set(self, text):
        name, _, value = text.partition(" ")
        if not name:
            print("\n".join(f"{name} {value}" for name, value in self.settings.items()))
        elif name not in SETTINGS:
            raise BadInput(f"there is no setting {name}: it should be one of {', '.join(SETTINGS)}")
        else:
            self.settings[name] = SETTINGS[name].read(name, value.strip())

    def help(self, _):
        print(HELP.format(settings=", ".join(SETTINGS)))

    def ask(self, question):
        """Prints the answer as it comes, then how fast it came; Ctrl-C ends it."""
        answer = self.chat.stream(question, self.pixels, **self.settings)
        try:
            show_answer(answer)
        except KeyboardInterrupt:
            print(" [stopped]", end="")

        # how long the answer is, and how fast it came
        figures = [f"{len(answer.token_ids)} tokens"]
        if answer.tokens_per_second:
            figures += [
                f"{answer.tokens_per_second:.0f} tokens/s",
                f"the first after {answer.first_token_seconds:.2f} s",
            ]
        print(f"\n[{', '.join(figures)}]")


def show_answer(answer):
    """Prints an answer as it is written, and says so if it has no words."""
    text = ""
    for piece in answer:
        text += piece
        print(piece, end="", flush=True)
    if not text.strip():
        print("(the model wrote nothing)", end="")


# --- by itself ------------------------------------------------------------------------------------------------------


def show_answers(chat, folder, settings):
    """Prints every question of the evaluation folder, and its answer as it is written."""
    for paths, question in read_questions(folder):
        print(f"\n[{' + '.join(path.name for path in paths)}]\n问: {question}\n答: ", end="", flush=True)
        show_answer(chat.stream(question, chat.load_frames(paths), **settings))
        print()


def show_score(chat, files, images_path, out_dir):
    """A table of exact matches per kind of question for each labelled file."""
    world.build_if_asked_for(files)
    for file in files:
        print(
            f"\n{file}: share of exactly right answers\n{'kind':<12}{'questions':>10}{'right image':>14}{'shuffled image':>17}"
        )
        for kind, (count, own, others) in score(chat, file, images_path, out_dir).items():
            shuffled = "-" if others is None else f"{others:.1%}"
            print(f"{kind:<12}{count:>10}{own:>14.1%}{shuffled:>17}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_chat_arguments(parser)
    add_switch(
        parser, "--multi", help="use the model trained on several pictures at a time, and sample pictures for it"
    )
    add_switch(
        parser,
        "--all",
        help="answer every question of dataset/eval_images (with --multi, of eval_multi_images) without a chat",
    )
    parser.add_argument(
        "--score", nargs="+", metavar="FILE", help="answer these labelled files and count the right answers"
    )
    parser.add_argument(
        "--images_path",
        default=STAGES["sft"].images_path,
        help="folder or archive of the pictures of --score (default %(default)s)",
    )
    args = parse_with_demo(parser, DEMO_ANSWERING)
    chat = load_chat(args)
    print(chat.summary)
    folder = Path(in_repository("dataset/eval_multi_images" if args.multi else "dataset/eval_images"))
    if not (args.all or args.score) and sys.stdin.isatty() and sys.stdout.isatty():
        Terminal(chat, folder, settings_of(args)).run()
        return
    if args.all or not args.score:
        show_answers(chat, folder, settings_of(args))
    files = args.score
    if args.demo and not files:
        files = [world.FOLDER / f"score_{name}.json" for name in DEMO_SCORES[args.multi]]
    if files:
        show_score(chat, files, args.images_path, args.out_dir)


if __name__ == "__main__":
    run_script(main)
