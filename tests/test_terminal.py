"""3-eval_chat.py as a person in a terminal meets it: through a pseudo-terminal."""

import codecs
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

pty = pytest.importorskip("pty", reason="pseudo-terminals are a thing of Unix")


class Screen:
    """A program in a pseudo-terminal: type lines and keys, and read what it prints."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""}
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
    greeting = screen.until("\npicture> ")
    assert "64_vlm_sft" in greeting and "dataset/eval_images/green-ring_blue-star_purple-triangle.png" in greeting

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
    screen.until("\n> ")
    screen.type("/set\n")
    assert "max_new_tokens 40000" in screen.until("\n> ")

    screen.type("说得长一点\n")
    screen.until("说得长一点\n.{10}")
    screen.type("\x03")  # Ctrl-C
    assert int(re.search(r"\[stopped\]\n\[(\d+) tokens", screen.until("\n> ")).group(1)) < 40_000
    time.sleep(0.5)  # readline shows its prompt a moment before it heeds Ctrl-C
    screen.type("\x03")
    assert "/exit leaves" in screen.until("\n> ")
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
    assert "What's this names no picture, and has an open quotation mark: press Enter" in screen.until("\npicture> ")
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
    screen.type("/exit\n")
    assert screen.process.wait(20) == 0


def test_an_error_of_any_kind_does_not_end_the_talk(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["3-eval_chat.py"])
    terminal = runpy.run_path(str(ROOT / "3-eval_chat.py"))["Terminal"](None, ROOT / "dataset/eval_images", {})
    lines = iter(["", "?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    terminal.run()  # there is no model to ask
    assert "that did not work (AttributeError: " in capsys.readouterr().out


def test_a_question_that_does_not_fit_is_said_and_forgotten(screen):
    screen.until("\npicture> ")
    screen.type("\n")
    assert "showing no picture" in screen.until("\n> ")
    screen.type("/set max_new_tokens 3\n")
    screen.type("<image>是什么？\n")
    assert "0 images were given, but the question has 1 <image>" in screen.until(r"<image>\n\n> ")
    screen.type("你好\n")
    screen.until(r"\[3 tokens.*\n\n> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.process.wait(20) == 0


def test_without_a_terminal_it_answers_everything(flags):
    code, out, err = run_python("3-eval_chat.py", *flags, "--max_new_tokens", 3)
    assert code == 0, err
    assert out.count("问: ") == 14 and "[green-ring_blue-star_purple-triangle.png]" in out


def test_an_empty_answer_says_so(capsys):
    show_answer = runpy.run_path(str(ROOT / "3-eval_chat.py"))["show_answer"]
    for pieces, shown in (([], True), ([" ", "\n"], True), (["红", "色"], False)):
        show_answer(iter(pieces))
        assert ("(the model wrote nothing)" in capsys.readouterr().out) == shown


def test_settings_are_checked_on_the_command_line():
    for flag, value in (("--temperature", "hot"), ("--seed", "-1")):
        code, _, err = run_python("3-eval_chat.py", "--demo", flag, value)
        assert code == 2 and f"argument {flag}: {flag[2:]} should be" in err and "Traceback" not in err
