"""Ways to watch a training: Weights & Biases, plotted curves, and the page /training."""

import argparse
import json
import re
import signal

import pytest
from helpers import begin, finish, run_python, run_whole, serving, until
from PIL import Image
from playwright.sync_api import expect
from wandb.proto import wandb_internal_pb2

from model.training.logs import Log, read_log
from web_server import create_app

# --- Weights & Biases -----------------------------------------------------------------------------------------------


def pieces(data):
    """The records in a .wandb file: LevelDB's log format, in blocks of 32 kB, after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def records(folder):
    """The contents of wandb's files of offline runs: [(name, id, config, rows of metrics)], the earliest first."""
    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        name, number, config, rows = None, None, {}, []
        for data in pieces(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                name, number = record.run.display_name, record.run.run_id
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        runs.append((name, number, config, rows))
    return runs


def test_wandb_gets_the_metrics_and_a_resumed_run_continues_in_it(place, tmp_path):
    flags = ["--use_wandb", "--val_fraction", 0.25, "--eval_interval", 2, "--save_interval", 2]
    offline = {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}
    process = begin(place, *flags, env=offline)
    until(process, 4)
    process.send_signal(signal.SIGTERM)
    finish(process)
    run_whole(place, *flags, "--resume", env=offline)
    (name, number, config, rows), (again, same, _, more) = records(tmp_path)
    assert name == again == "MiniMind-V Pretrain-Epoch-3-BatchSize-8-LearningRate-0.001" and number == same
    assert config["learning_rate"] == 0.001 and config["batch_size"] == 8
    figures = [row for row in rows + more if "loss" in row]
    assert [row["_step"] for row in figures] == list(range(1, 16))  # 36 samples: 3 epochs of 5 steps, each logged once
    for figure in ("lr", "epoch_Time", "grad_norm", "samples_per_s"):
        assert all(figure in row for row in figures)
    assert sum("val_loss" in row for row in rows + more) == 8


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"WANDB_API_KEY": ""}, "No API key configured"),
        (
            {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"},
            "no Weights & Biases (",
        ),
    ],
)
def test_without_wandb_a_training_continues_and_explains_how_to_log_offline(place, tmp_path, environment, reason):
    environment = {"WANDB_MODE": "online", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), **environment}
    text = run_whole(place, "--epochs", 1, "--use_wandb", env=environment)
    assert reason in text and "set WANDB_MODE=offline to log here and sync later" in text
    assert (place.out / "64_vlm_pretrain.pth").exists() and "Traceback" not in text


# --- curves ---------------------------------------------------------------------------------------------------------


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def figures(step, loss):
    return {"step": step, "loss": loss, "lr": 1e-3, "samples_per_s": 50.0, "epoch_Time": 2.5}


BEFORE = [{"run": "a", "step": 0, "steps": 9}, figures(1, 7.0)]
RUN = [{"run": "a", "step": 0, "steps": 9}, figures(1, 6.0), figures(2, float("nan"))]
RESUMED = [{"run": "a", "step": 2, "steps": 9}, figures(3, 5.0), {"step": 3, "val_loss": 5.5, "epoch_Time": 2.0}]


def test_a_log_is_read_from_its_last_beginning(tmp_path):
    log = tmp_path / "a.jsonl"
    log.write_text(lines(*BEFORE, *RUN, *RESUMED) + '{"step": 4, "lo')
    run = read_log(log)
    assert (run["name"], run["step"], run["steps"], run["minutes_left"]) == ("a", 3, 9, 2.0)
    assert run["curves"]["loss"] == [[1, 6.0], [2, None], [3, 5.0]] and run["curves"]["val_loss"] == [[3, 5.5]]
    log.write_text(lines(*RUN, {"left_out": {}}))
    assert read_log(log)["minutes_left"] is None
    log.write_text(lines(*RUN, {"step": 3, "loss": "?"}))
    assert read_log(log)["curves"]["loss"][-1] == [3, None]


def test_curves_of_real_runs_are_drawn(place, tmp_path):
    run_whole(place, "--epochs", 1, "--val_fraction", 0.25, "--eval_interval", 2)
    (tmp_path / "other.jsonl").write_text(lines(*RUN))
    picture = tmp_path / "curves.png"
    code, out, err = run_python(
        "-m", "model.training.plot", place.out / "*.jsonl", tmp_path / "other.jsonl", "--save", picture
    )
    assert code == 0 and "2 runs" in out, err
    with Image.open(picture) as image:
        colours = {colour[:3] for _, colour in image.convert("RGBA").getcolors(10**6)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two colours: both runs were drawn


def test_what_cannot_be_drawn_is_reported(tmp_path):
    (tmp_path / "bad.jsonl").write_text("x\n[]\n")
    for log, says in (("bad.jsonl", "is not a training log"), ("none.jsonl", "could not be read")):
        code, _, err = run_python("-m", "model.training.plot", tmp_path / log, "--save", tmp_path / "a.png")
        assert code == 1 and says in err and "Traceback" not in err
    (tmp_path / "a.jsonl").write_text(lines(*RUN))
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    code, _, err = run_python("-m", "model.training.plot", tmp_path / "a.jsonl", fresh=True, PYTHONPATH=str(tmp_path))
    assert code == 1 and "pip install matplotlib" in err


@pytest.fixture
def watched(tmp_path):
    """A server started with --watch, and the folder it watches."""
    (tmp_path / "logs").mkdir()
    return create_app("--watch", "--out_dir", str(tmp_path / "logs")), tmp_path / "logs"


def test_the_data_of_the_page(watched):
    app, folder = watched
    client = app.test_client()
    assert client.get("/").location == "training" and client.get("/training/runs").json == []
    (folder / "a.jsonl").write_text(lines(*RUN))
    (folder / "notes.jsonl").write_text("not a log")
    answer = client.get("/training/runs")
    (run,) = answer.json
    assert run["curves"]["loss"] == [[1, 6.0], [2, None]] and "NaN" not in answer.text
    assert client.get("/training/runs", headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304


def test_the_page_follows_a_training(watched, browser):
    app, folder = watched
    problems = []
    with serving(app) as address:
        page = browser.new_page(locale="en-US", viewport={"width": 1000, "height": 900})
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/training")
        expect(page.locator("#empty")).to_contain_text("No training log yet")
        expect(page.locator("header a")).to_be_hidden()  # there is no chat here
        (folder / "a.jsonl").write_text(lines(*RUN))
        expect(page.locator("#runs button")).to_contain_text("step 2 of 9")
        expect(page.locator("#charts path")).to_have_count(4)
        before = page.locator("#charts path").first.get_attribute("d")
        with open(folder / "a.jsonl", "a") as log:
            log.write(lines(*RESUMED))
        expect(page.locator("#runs button")).to_contain_text("step 3 of 9 · loss 5 · 2.0 min left")
        assert page.locator("#charts path").first.get_attribute("d") != before
        expect(page.locator("#charts circle")).to_have_count(1)
        page.locator("#charts svg").first.hover(position={"x": 900, "y": 60})
        expect(page.locator(".readout").first).to_contain_text("a · step 3: 5")
        (folder / "b.jsonl").write_text(lines(*BEFORE).replace('"a"', '"b"'))
        page.mouse.move(5, 5)
        expect(page.locator("#runs button")).to_have_count(2)
        page.locator("#runs button").first.click()
        expect(page.locator("#runs button").first).to_have_attribute("aria-pressed", "false")
        with open(folder / "a.jsonl", "a") as log:  # now the newest run, listed first
            log.write(lines(figures(4, 4.0)))
        expect(page.locator("#runs button").first).to_contain_text("step 4 of 9")
        expect(page.locator("#runs button").nth(1)).to_be_focused()
        page.locator("#language").click()
        expect(page.locator("figcaption").nth(1)).to_have_text("学习率")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#notice")).to_contain_text("和服务器的连接断了", timeout=10_000)
    assert page.locator("#notice").bounding_box()["y"] >= 0
    page.close()
    assert [problem for problem in problems if "ERR_CONNECTION_REFUSED" not in problem] == []


def test_the_page_reads_the_step_under_the_pointer_logarithmically_and_smoothed_if_asked(watched, browser):
    app, folder = watched
    for name, steps in (("a", 30), ("b", 100)):
        run = [{"run": name, "step": 0, "steps": 100, "time": 0, "args": {}}]
        run += [figures(step, 2.0**-step if step < 40 else 2.0**-40) for step in range(1, steps + 1)]
        (folder / f"{name}.jsonl").write_text(lines(*run))
    with serving(app) as address:
        page = browser.new_page(locale="en-US", viewport={"width": 1000, "height": 900})
        page.goto(f"{address}/training")
        expect(page.locator("#runs button")).to_have_count(2)
        chart = page.locator("#charts svg").first
        width = chart.bounding_box()["width"]

        # where one run has ended, the other's step is read, and only that
        chart.hover(position={"x": width * 0.8, "y": 60})
        readout = page.locator(".readout").first
        expect(readout).to_contain_text("b · step")
        expect(readout).not_to_contain_text("a · step")
        step = int(re.search(r"step (\d+)", readout.inner_text()).group(1))
        assert 70 < step < 90
        assert abs(float(chart.locator(".cursor").get_attribute("x1")) - width * 0.8) < 10

        labels = chart.locator("text.end")
        assert "1.0e-10" not in labels.all_inner_texts()
        page.get_by_label("Logarithmic loss").check()
        assert "1.0e-10" in chart.locator("text.end").evaluate_all("all => all.map((one) => one.textContent)")
        page.get_by_label("Smooth").check()
        expect(chart.locator("path.raw")).to_have_count(2)
        page.close()


def test_what_a_log_keeps_is_never_off_the_disk(tmp_path):
    """A kill between opening a log and its first line must lose nothing: only the end is cut off."""
    path = tmp_path / "run.jsonl"
    lines = ['{"run": "a", "step": 0}', '{"step": 1, "loss": 2}', '{"run": "a", "step": 1}']
    lines += [f'{{"step": {step}, "loss": 1}}' for step in (2, 3, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    args = argparse.Namespace(out_dir=str(tmp_path), use_wandb=False, log_interval=1)
    log = Log(args, "run", step=3, steps=9)
    assert path.read_text() == "\n".join(lines[:-1]) + "\n"  # before anything new is flushed
    log.bar.close()
    log.file.close()
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 3
