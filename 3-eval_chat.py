"""Chat with a trained model about pictures, or let it answer many questions by itself.

python 3-eval_chat.py                          # in a terminal: pick pictures and ask, with out/512_vlm_sft.pth
python 3-eval_chat.py --demo                   # the same with the demo's model
python 3-eval_chat.py --demo --all             # every question of dataset/eval_images, then the score on held-out pictures
python 3-eval_chat.py --demo --all --multi     # the same for pairs of pictures and animations
python 3-eval_chat.py --score FILE --images_path FOLDER     # exact match on a labelled file (dataset/README.md)
"""

import argparse
import contextlib
import locale
import os
import random
import re
import shlex
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__" and sys.stdin.isatty() and sys.stdout.isatty():  # PyTorch alone takes seconds
    print("loading / 正在加载 ...", flush=True)

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
SUFFIXES = "png|jpe?g|webp|gif|bmp|tiff?|avif|heic|mp4|m4v|mov|webm|mkv"  # of lines that mean a file
NUMBERS = r"\d+(?:(?:[\s,，、]|and|和)+\d+)*"  # 3, 1 2, 1,2, 1 and 2
# what the talk in a terminal says; errors are English
TEXTS = {
    "en": {
        "greeting": "/help lists the commands, exit leaves.",
        "pick": "Pictures in {folder}: type a number or a path,\nseveral to compare them, or just Enter for no picture.",
        "picture": "picture",
        "showing": "showing {names}: ask a question",
        "no picture": "showing no picture: ask a question",
        "and": " and ",
        "frames": "{count} frames of {name}",
        "examples": "Type a question, or a letter for one of these:",
        "describe": "Describe the picture.",
        "several": "(this model learned about single pictures only: 2-sft_vlm.py --multi trains one for several,\n"
        "--multi here starts it)",
        "drawn": "{caption} Saved as {file}: ask a question",
        "set": "{name} is {value} now",
        "stop": "  (exit leaves)",
        "stopped": "stopped",
        "comma": ", ",
        "question": "Q: ",
        "answer": "A: ",
        "nothing": "(the model wrote nothing)",
        "length": "{count} tokens",
        "speed": "{rate:.0f} tokens/s, the first after {seconds:.2f} s",
        "help": """\
/image FILE ...    show these pictures or videos: paths, or numbers from the list
/draw THINGS       draw a picture: /draw 红色 星形 左上角, small blue circle middle
/clear             drop the pictures and pick again
/set NAME VALUE    change how answers are drawn: /set temperature 0.8; /set alone shows all
/help  /exit       this text; leave (or help, exit, quit, Ctrl-D)
A path or numbers from the list show other pictures; anything else is a question.
Each stands alone: the model sees its pictures, not what was said before.
Ctrl-C stops an answer.""",
    },
    "zh": {
        "greeting": "/help 列出命令，exit 退出。",
        "pick": "{folder} 里的图片：输入编号或路径，几张一起可以比较，直接回车则不看图片。",
        "picture": "图片",
        "showing": "正在看 {names}：请提问",
        "no picture": "没有选图片：请提问",
        "and": " 和 ",
        "frames": "{name} 的 {count} 帧",
        "examples": "输入问题，或者用字母选一个：",
        "describe": "请描述这张图片。",
        "several": "（这个模型只学过单张图片：用 2-sft_vlm.py --multi 训练看多张图片的模型，\n再在这里加 --multi 启动）",
        "drawn": "{caption}已保存为 {file}：请提问",
        "set": "{name} 现在是 {value}",
        "stop": "  （exit 退出）",
        "stopped": "已停止",
        "comma": "，",
        "question": "问：",
        "answer": "答：",
        "nothing": "（模型什么也没写）",
        "length": "{count} 个 token",
        "speed": "每秒 {rate:.0f} 个，第一个用了 {seconds:.2f} 秒",
        "help": """\
/image 文件 ...    看这些图片或视频：路径，或列表里的编号
/draw 图形         画一张图：/draw 红色 星形 左上角, small blue circle middle
/clear             清除图片，重新选
/set 名称 数值     改变生成设置：/set temperature 0.8；只写 /set 则全部列出
/help  /exit       显示这段文字；退出（也可以输入 help、exit、quit 或按 Ctrl-D）
输入路径或列表里的编号会换图片，其余的都当作问题。
每个问题单独回答：模型看得到图片，看不到前面说过的话。
Ctrl-C 停止回答。""",
    },
}


# --- in a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """A chat in a terminal: the pictures it is about, and how answers are sampled."""

    def __init__(self, chat, folder, settings, lang, single):
        """single: whether the model learned about single pictures only."""
        self.chat = chat
        self.folder = folder
        self.settings = settings
        self.lang = lang
        self.texts = TEXTS[lang]
        self.single = single
        self.available = sorted(file for file in folder.iterdir() if file.suffix != ".json")
        self.pixels = []
        self.examples = {}  # letter -> question about the pictures
        self.picking = True  # the next line names pictures
        self.commands = {
            "/image": self.pick,
            "/draw": self.draw,
            "/set": self.set,
            "/help": self.help,
            "help": self.help,
            "帮助": self.help,
        }

    def run(self):
        """Reads and answers until `exit` or the end of the input."""
        with contextlib.suppress(ImportError):  # Windows' terminal has line editing of its own
            import readline  # noqa: F401  gives input() its editing and its history
        print(self.texts["greeting"])
        self.clear()
        while True:
            try:
                line = input(f"\n{self.texts['picture'] if self.picking else ''}> ").strip()
                line.encode()
                if line.lower() in ("exit", "quit", "/exit", "/quit", "退出"):
                    return
                self.handle(line)
            except BadInput as problem:
                print(problem)
            except KeyboardInterrupt:
                print(self.texts["stop"])
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
        if line in ("/clear", "/image"):
            self.clear()
        elif command.lower() in self.commands and (rest == "" or command.startswith("/")):
            self.commands[command.lower()](rest.strip())
        elif self.picking or os.path.isfile(line) or os.path.isfile(line.strip("'\"")) or re.fullmatch(NUMBERS, line):
            self.pick(line)
        elif re.fullmatch(rf".+\.({SUFFIXES})[\"']?", line.lower()):
            raise BadInput(f"there is no file {line}; /clear lists the pictures")
        elif line.startswith("/"):
            raise BadInput(f"there is no {command}; /help lists the commands")
        elif line.lower() in self.examples:
            question = self.examples[line.lower()]
            print(question)
            self.ask(question)
        elif re.fullmatch(r"[a-z]", line.lower()):
            raise BadInput(f"there is no question {line}: type one")
        elif line:
            self.ask(line)

    def clear(self):
        self.pixels = []
        self.picking = True
        print(self.texts["pick"].format(folder=self.folder))
        for number, file in enumerate(self.available, 1):
            print(f"{number:>3}  {file.name}")

    def pick(self, text):
        """Reads the pictures that a line names: one file, or several files and numbers."""
        files = self.files_in(text)

        # a picture is one list of pixels, a video several; what was shown before is replaced
        seen = [self.chat.load_frames([file]) for file in files]
        self.pixels = [pixels for frames in seen for pixels in frames]
        names = [
            self.texts["frames"].format(count=len(frames), name=file.name) if len(frames) > 1 else file.name
            for file, frames in zip(files, seen, strict=True)
        ]
        showing = self.texts["showing"] if names else self.texts["no picture"]
        print(showing.format(names=self.texts["and"].join(names)))
        self.show_examples(files)

    def files_in(self, text):
        """The files that a line names, by number or path."""
        numbered = {str(number): file for number, file in enumerate(self.available, 1)}
        if os.path.isfile(text):  # its name may have spaces
            names = [text]
        elif re.fullmatch(NUMBERS, text):
            names = [str(int(digits)) for digits in re.findall(r"\d+", text)]  # full-width ones, too
        else:
            try:
                names = shlex.split(text, posix=os.name == "posix")
            except ValueError:  # an open quotation mark
                names = text.split()
        files = [numbered.get(name, Path(os.path.expanduser(name.strip("'\"")))) for name in names]

        # what can't be meant as a file, such as a question
        for name in names:
            if name.isdecimal() and name not in numbered and not os.path.isfile(name):
                raise BadInput(f"there is no picture {name}: the list has 1 to {len(numbered)}")
        if names and not any(file.suffix or os.path.exists(file) for file in files):
            raise BadInput(f"{text} names no picture: pick one first, or press Enter alone to ask without a picture")
        return files

    def show_examples(self, files):
        """Questions in the chosen language about these pictures, to pick by a letter; the next line asks."""
        self.picking = False
        asked = [(paths, text.replace("<image>", "").strip()) for paths, text in read_questions(self.folder)]
        chinese = self.lang == "zh"
        own = [text for paths, text in asked if files and paths == files]
        own = [text for text in own if is_chinese(text) == chinese] or own
        if len(self.pixels) == 1:
            own.append(self.texts["describe"])
        self.examples = dict(zip("abcdefgh", dict.fromkeys(own), strict=False))
        if len(self.pixels) > 1 and self.single:
            print(self.texts["several"])
        if self.examples:
            print(self.texts["examples"])
        for letter, question in self.examples.items():
            print(f"{letter:>3}  {question}")

    def draw(self, text):
        """Draws what a line describes, in the demo's way, and shows it to the model."""
        scene = read_scene(text)
        picture = drawing.draw(scene, random.Random(text))
        file = Path(tempfile.gettempdir()) / "minimind-v-drawing.png"
        picture.save(file)
        self.pixels = [to_pixels(picture, self.chat.encoder.preprocess)]
        print(self.texts["drawn"].format(caption=LANGUAGES[self.lang].caption(scene), file=file))
        self.show_examples([file])

    def set(self, text):
        name, _, value = text.partition(" ")
        if not name:
            print("\n".join(f"{name} {value}" for name, value in self.settings.items()))
        elif name not in SETTINGS:
            raise BadInput(f"there is no setting {name}: it should be one of {', '.join(SETTINGS)}")
        else:
            self.settings[name] = SETTINGS[name].read(name, value.strip())
            print(self.texts["set"].format(name=name, value=self.settings[name]))

    def help(self, _):
        print(self.texts["help"])

    def ask(self, question):
        """Prints the answer as it comes, then how fast it came; Ctrl-C ends it."""
        answer = self.chat.stream(question, self.pixels, **self.settings)
        try:
            show_answer(answer, self.texts)
        except KeyboardInterrupt:
            print(f" [{self.texts['stopped']}]", end="")

        # how long the answer is, and how fast it came
        figures = [self.texts["length"].format(count=len(answer.token_ids))]
        if answer.tokens_per_second:
            rate, seconds = answer.tokens_per_second, answer.first_token_seconds
            figures.append(self.texts["speed"].format(rate=rate, seconds=seconds))
        print(f"\n[{self.texts['comma'].join(figures)}]")


def is_chinese(text):
    return bool(re.search("[\u4e00-\u9fff]", text))


def show_answer(answer, texts):
    """Prints an answer as it is written, and says so if it has no words."""
    text = ""
    for piece in answer:
        text += piece
        print(piece, end="", flush=True)
    if not text.strip():
        print(texts["nothing"], end="")


# --- by itself ------------------------------------------------------------------------------------------------------


def show_answers(chat, folder, settings, texts):
    """Prints every question of the evaluation folder, and its answer as it is written."""
    for paths, question in read_questions(folder):
        question = question.replace("<image>", "").strip()
        print(f"\n[{' + '.join(path.name for path in paths)}]\n{texts['question']}{question}")
        print(texts["answer"], end="", flush=True)
        show_answer(chat.stream(question, chat.load_frames(paths), **settings), texts)
        print()


def show_score(chat, files, images_path, out_dir):
    """Some answers, wrong ones first, and a table of exact matches per kind of question, for each labelled file."""
    world.build_if_asked_for(files)
    for file in files:
        table, asked = score(chat, file, images_path, out_dir)
        print(f"\n{file}: some answers, wrong ones first")
        for question, label, answer in sorted(asked, key=lambda one: one[1] == one[2])[:3]:
            question, label, answer = (" ".join(text.split()) for text in (question, label, answer))
            print(f"  {question:.60} expected: {label:.60} given: {answer:.60}")
        print("share of exactly right answers; shuffled image: asked about another picture, where guessing gets as far")
        print(f"{'kind':<12}{'questions':>10}{'right image':>14}{'shuffled image':>17}")
        for kind, (count, own, others) in table.items():
            shuffled = "-" if others is None else f"{others:.1%}"
            print(f"{kind:<12}{count:>10}{own:>14.1%}{shuffled:>17}")


def default_lang():
    """zh where the locale is Chinese, otherwise en."""
    name = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), None)
    if name is None:  # as on Windows
        with contextlib.suppress(ValueError):  # a name that Python doesn't know
            name = locale.getlocale()[0]
    return "zh" if (name or "").startswith(("zh", "Chinese")) else "en"


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
    parser.add_argument(
        "--lang",
        choices=TEXTS,
        default=default_lang(),
        help="language of the talk in a terminal (default: the locale's)",
    )
    args = parse_with_demo(parser, DEMO_ANSWERING)
    chat = load_chat(args)
    print(chat.summary)
    folder = Path(in_repository("dataset/eval_multi_images" if args.multi else "dataset/eval_images"))
    if not (args.all or args.score) and sys.stdin.isatty() and sys.stdout.isatty():
        single = not (args.multi or args.weights)
        Terminal(chat, folder, settings_of(args), args.lang, single).run()
        return
    if args.all or not args.score:
        show_answers(chat, folder, settings_of(args), TEXTS[args.lang])
    files = args.score
    if args.demo and not files:
        files = [world.FOLDER / f"score_{name}.json" for name in DEMO_SCORES[args.multi]]
    if files:
        show_score(chat, files, args.images_path, args.out_dir)


if __name__ == "__main__":
    run_script(main)
