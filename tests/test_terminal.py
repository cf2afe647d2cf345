"""3-eval_chat.py as a person in a terminal meets it: through a pseudo-terminal."""

import argparse
import codecs
import json
import os
import re
import runpy
import select
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, animated, heed_interrupts, run_python, save_random_vlm
from PIL import Image

from model.training.logs import Log

pty = pytest.importorskip("pty", reason="pseudo-terminals are a thing of Unix")


class Screen:
    """A program in a pseudo-terminal: type lines and keys, and read what it prints."""

    def __init__(self, *command, locale="C.UTF-8"):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": "", "LC_ALL": locale}
        command = [str(part) for part in command]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509  no thread of the test runs while this does
        )
        os.close(slave)
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.unread = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, pattern, seconds=60):
        """What was printed up to and with a match of the pattern."""
        limit = time.time() + seconds
        while not (found := re.search(pattern, self.unread)):
            assert time.time() < limit, f"{pattern!r} did not come, but: {self.unread[-2000:]}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.unread += self.decode(os.read(self.master, 65536)).replace("\r", "")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.unread), self.unread[-2000:]
        seen, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return seen

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def take_terminal():
    """Makes the pseudo-terminal the one whose Ctrl-C reaches this process, which heeds it wherever the tests run."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    heed_interrupts()


@pytest.fixture
def flags(tmp_path, tiny_clip, tokenizer):
    weights = save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer, max_seq_len=50_000)
    return ["--weights", weights, "--vision_path", tiny_clip, "--tokenizer_path", "model/demo", "--device", "cpu"]


@pytest.fixture
def screen(flags):
    screen = Screen(sys.executable, "3-eval_chat.py", *flags, "--max_new_tokens", 20, "--temperature", 0)
    yield screen
    screen.close()


def test_a_talk(screen, pictures, tmp_path):
    screen.until("^loading")  # while PyTorch is read
    greeting = screen.until("\npicture> ")
    assert "64_vlm_sft" in greeting and "Pictures in dataset/eval_images" in greeting
    assert re.search(r"\n  2  green-ring_blue-star_purple-triangle.png\n", greeting)

    screen.type("nowhere.png\n")
    assert "nowhere.png could not be read as a picture (No such file or directory)" in screen.until("\npicture> ")

    screen.type("1\n")
    assert "showing" in screen.until("\n> ")
    answers = []
    for question in ("左上角什么颜色？", "有几个图形？", "左上角什么颜色？"):
        screen.type(question + "\n")
        answers.append(
            screen.until(r"\n\[\d+ tokens, \d+ tokens/s, the first after \d+\.\d\d s\]\n\n> ").split("\n")[1]
        )
    assert answers[0] == answers[2] != answers[1]

    screen.type(f"/image {pictures[0]} {pictures[1]}\n")
    assert f"showing {pictures[0].name} and {pictures[1].name}" in screen.until("\n> ")
    screen.type("两张图有什么不同？\n")
    screen.until(r"\[20 tokens.*\]\n\n> ")

    screen.type("/draw small blue star top left, 红色 方形\n")
    file = re.search(
        r"There is a small blue star at the top left and a big red square in the middle. Saved as (\S+): ask",
        screen.until("\n> "),
    ).group(1)
    drawn = np.asarray(Image.open(file), dtype=int)
    for part, channel in ((drawn[:75, :75], 2), (drawn[75:150, 75:150], 0)):  # blue, red
        others = np.delete(part, channel, axis=2).max(axis=2)
        assert (part[..., channel] - others > 60).any()
    screen.type("/draw\n")
    assert "name what to draw, for example: 红色 星形 左上角, small blue circle middle" in screen.until("\n> ")

    clip = animated(tmp_path / "clip.webp", [Image.open(path) for path in pictures[:12]])
    screen.type(f"/image {clip} {pictures[1]}\n")
    assert f"showing 8 frames of clip.webp and {pictures[1].name}" in screen.until("\n> ")
    screen.type("先后有什么不同？\n")
    screen.until(r"\[20 tokens.*\]\n\n> ")

    screen.type("/set temperature hot\n")
    assert "temperature should be a number from 0 to 2, not 'hot'" in screen.until("\n> ")
    screen.type("/set colour 1\n")
    assert "there is no setting colour" in screen.until("\n> ")
    screen.type("/set max_new_tokens 40000\n")
    assert "max_new_tokens is 40000 now" in screen.until("\n> ")
    screen.type("/set\n")
    assert "max_new_tokens 40000" in screen.until("\n> ")

    screen.type("说得长一点\n")
    screen.until("说得长一点\n.{10}")
    screen.type("\x03")  # Ctrl-C
    assert int(re.search(r"\[stopped\]\n\[(\d+) tokens", screen.until("\n> ")).group(1)) < 40_000
    time.sleep(0.5)  # readline shows its prompt a moment before it heeds Ctrl-C
    screen.type("\x03")
    assert "exit leaves" in screen.until("\n> ")
    screen.type("\x1b[A\x1b[A\n")  # two lines up in the history, and again
    assert "max_new_tokens 40000" in screen.until("\n> ")

    screen.type("/nonsense\n")
    assert "there is no /nonsense; /help lists the commands" in screen.until("\n> ")
    screen.type("/help\n")
    assert "/set NAME VALUE" in screen.until("\n> ")
    screen.type("/clear\n")
    screen.until("\npicture> ")
    screen.type("/exit\n")
    assert screen.process.wait(20) == 0


def test_nothing_that_is_typed_ends_the_talk(screen):
    screen.until("\npicture> ")
    screen.type("What's this\n")
    assert "What's this names no picture: pick one first, or press Enter" in screen.until("\npicture> ")
    screen.type("99\n")
    assert "there is no picture 99: the list has 1 to 7" in screen.until("\npicture> ")
    screen.type("~no_such_user/a.png\n")
    assert "~no_such_user/a.png could not be read as a picture" in screen.until("\npicture> ")
    screen.type(f"{'x' * 300}.png\n")
    assert "could not be read as a picture (File name too long)" in screen.until("\npicture> ")
    screen.type("\n")
    screen.until("\n> ")
    screen.type("/set max_new_tokens 3\n")
    screen.until("\n> ")
    for question in ("这是什么？" * 20, "What's this?"):
        screen.type(f"{question}\n")
        screen.until(r"\[3 tokens.*\n\n> ")
    os.write(screen.master, b"\xff\xfe?\n")
    assert "this was not UTF-8 text" in screen.until("\n> ")
    screen.type("quit\n")
    assert screen.process.wait(20) == 0


def test_numbers_and_paths_are_pictures_letters_are_examples_and_anything_else_is_a_question(screen, pictures):
    greeting = screen.until("\npicture> ")
    names = dict(re.findall(r"\n +(\d)  (\S+)", greeting))
    for typed in ("1,3", "1 and 3", "1 3", "1、3", "/image 1 3"):
        screen.type(f"{typed}\n")
        said = screen.until("\n> ")
        assert f"showing {names['1']} and {names['3']}: ask a question" in said
        assert "this model learned about single pictures" not in said  # nobody knows, of weights that were named
    screen.type("2\n")
    said = screen.until("\n> ")
    assert f"showing {names['2']}: ask" in said
    assert re.findall(r"\n  ([a-z])  (.+)", said) == [
        ("a", "How many rings can you see?"),
        ("b", "Describe the picture."),
    ]
    screen.type("a\n")
    assert "a\nHow many rings can you see?\n" in screen.until(r"\[\d+ tokens.*\]\n\n> ")
    screen.type(f"{pictures[0]}\n")
    said = screen.until("\n> ")
    assert f"showing {pictures[0].name}: ask" in said and re.findall(r"\n  (\w)  ", said) == ["a"]
    screen.type("3 circles?\n")
    screen.until(r"\[\d+ tokens.*\]\n\n> ")
    screen.type("help\n")
    assert "/set NAME VALUE" in screen.until("\n> ")
    screen.type("/image\n")
    screen.until("\npicture> ")
    screen.type("exit\n")
    assert screen.process.wait(20) == 0


@pytest.mark.parametrize("locale, more", [("zh_CN.UTF-8", []), ("C.UTF-8", ["--lang", "zh"])])
def test_a_talk_in_chinese(flags, locale, more):
    screen = Screen(sys.executable, "3-eval_chat.py", *flags, *more, "--max_new_tokens", 3, locale=locale)
    try:
        assert "/help 列出命令，exit 退出。" in screen.until("\n图片> ")
        screen.type("2\n")
        said = screen.until("\n> ")
        assert "正在看 green-ring_blue-star_purple-triangle.png：请提问" in said
        assert re.findall(r"\n  ([a-z])  (.+)", said) == [
            ("a", "左下角的图形的颜色是什么？"),
            ("b", "请描述这张图片。"),
        ]
        screen.type("/set temperature 0\n")
        assert "temperature 现在是 0.0" in screen.until("\n> ")
        screen.type("A\n")
        screen.until(r"\n\[3 个 token，.*\]\n\n> ")
        screen.type("/draw 红色 星形\n")
        assert "中间有一个红色的大星形。已保存为" in screen.until("\n> ")
        screen.type("/nonsense\n")
        assert "there is no /nonsense; /help lists the commands" in screen.until("\n> ")  # errors are English
        screen.type("/help\n")
        assert "每个问题单独回答" in screen.until("\n> ")
        screen.type("quit\n")
        assert screen.process.wait(20) == 0
    finally:
        screen.close()


def test_a_score_shows_a_few_answers_wrong_ones_first(flags, pictures, tmp_path):
    records = [
        {"image": path.name, "conversations": [{"role": "user", "content": "<image>\n?"}, {"role": "assistant", "content": label}]}
        for path, label in zip(pictures, ["红\n色", "蓝色", "大", "小"], strict=False)
    ]  # fmt: skip
    (tmp_path / "score.json").write_text(json.dumps(records), encoding="utf-8")
    code, out, err = run_python(
        "3-eval_chat.py", *flags, "--score", tmp_path / "score.json", "--images_path", pictures[0].parent
    )
    assert code == 0, err
    assert re.findall(r"\n  \? expected: (.+) given: .+", out) == ["红 色", "蓝色", "大"]


def test_the_bar_of_a_training_fits_80_columns(tmp_path, monkeypatch):
    termios = pytest.importorskip("termios")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        args = argparse.Namespace(out_dir=str(tmp_path), use_wandb=False, log_interval=1)
        log = Log(args, "192_vlm_sft_multi", step=0, steps=12_000)
        log.started -= 1000
        log.bar.start_t -= 1000
        log.write(6000, {"loss": 1.99612, "lr": 0.0009, "grad_norm": 1.2, "samples_per_s": 41.3})
        log.close({})
        text = ""
        while not text.endswith("\n"):  # which comes when the bar is closed; a terminal may deliver it in parts
            text += os.read(master, 65536).decode()
        shown = text.replace("\r", "\n").strip().split("\n")[-1]
    os.close(master)
    assert re.fullmatch(r"192_vlm_sft_multi:  50%\|█+[^|]{10,}\| 6000/12000 \[16:4\d<16:4\d, loss=1.996\]", shown), (
        shown
    )
    assert len(shown) < 80


def test_an_error_of_any_kind_does_not_end_the_talk(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["3-eval_chat.py"])
    terminal = runpy.run_path(str(ROOT / "3-eval_chat.py"))["Terminal"]
    terminal = terminal(None, ROOT / "dataset/eval_images", {}, "en", True)
    lines = iter(["", "?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    terminal.run()  # there is no model to ask
    assert "that did not work (AttributeError: " in capsys.readouterr().out


def test_a_question_that_does_not_fit_is_said_and_forgotten(screen):
    screen.until("\npicture> ")
    screen.type("\n")
    assert "showing no picture" in screen.until("\n> ")
    screen.type("z\n")
    assert "there is no question z: type one" in screen.until("\n> ")
    for name in ("nope.PNG", "/tmp/my nope.mov"):
        screen.type(f"{name}\n")
        assert f"there is no file {name}; /clear lists the pictures" in screen.until("\n> ")
    screen.type("/set max_new_tokens 3\n")
    screen.type("<image>是什么？\n")
    assert "0 images were given, but the question has 1 <image>" in screen.until(r"<image>\n\n> ")
    screen.type("你好\n")
    screen.until(r"\[3 tokens.*\n\n> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.process.wait(20) == 0


def test_without_a_terminal_it_answers_everything(flags):
    code, out, err = run_python("3-eval_chat.py", *flags, "--max_new_tokens", 3, "--lang", "en")
    assert code == 0, err
    assert out.count("Q: ") == 14 and "[green-ring_blue-star_purple-triangle.png]" in out
    code, out, err = run_python("3-eval_chat.py", *flags, "--max_new_tokens", 3, "--lang", "zh")
    assert code == 0, err
    assert out.count("问：") == out.count("答：") == 14


def test_an_empty_answer_says_so(capsys):
    script = runpy.run_path(str(ROOT / "3-eval_chat.py"))
    for lang, says in (("en", "(the model wrote nothing)"), ("zh", "（模型什么也没写）")):
        for pieces, shown in (([], True), ([" ", "\n"], True), (["红", "色"], False)):
            script["show_answer"](iter(pieces), script["TEXTS"][lang])
            assert (says in capsys.readouterr().out) == shown


def test_settings_are_checked_on_the_command_line():
    for flag, value in (("--temperature", "hot"), ("--seed", "-1")):
        code, _, err = run_python("3-eval_chat.py", "--demo", flag, value)
        assert code == 2 and f"argument {flag}: {flag[2:]} should be" in err and "Traceback" not in err
