"""Runs that are cut off, stopped, starved or fed bad numbers, and what is left of them."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    SETTINGS,
    TORCHRUN,
    attempt,
    begin,
    digest,
    finish,
    log_lines,
    losses,
    make_place,
    run_python,
    run_whole,
    until,
)

from model.checkpoint import read_metadata, read_weights
from model.errors import BadInput
from model.training.distributed import Stop
from model.training.logs import tell
from model.training.resume import read_state
from model.training.trainer import oom_details


def clear(place):
    for file in place.out.glob("64_vlm_pretrain*"):
        file.unlink()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world, tokenizer):
    """The losses and the final weights of a run that nothing happens to."""
    place = make_place(tmp_path_factory.mktemp("undisturbed"), world, tokenizer)
    run_whole(place)
    assert sorted(losses(place)) == list(range(1, 19))
    return losses(place), digest(place)


def test_killed_and_resumed_is_as_if_nothing_had_happened(place, undisturbed):
    process = begin(place)
    until(process, 8)  # in the middle of an epoch, two steps after a save
    process.kill()
    process.wait()
    text = run_whole(place, "--resume")
    assert "resuming after step 6 of 18" in text or "resuming after step 9" in text
    assert (losses(place), digest(place)) == undisturbed
    assert "resuming after step 18 of 18" in run_whole(place, "--resume") and digest(place) == undisturbed[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_after_the_step_and_saves(place, undisturbed, number):
    process = begin(place, "--save_interval", 100)
    until(process, 4)
    process.send_signal(number)
    code, text = finish(process)
    assert (
        code == 128 + number
        and "stopping after this step" in text
        and "add --resume to the same command to continue" in text
    )
    stopped = max(losses(place))
    assert 4 <= stopped < 18 and f"64_vlm_pretrain.pth after step {stopped}" in text
    assert f"resuming after step {stopped} of 18" in run_whole(place, "--resume")
    assert (losses(place), digest(place)) == undisturbed


def test_a_closed_pipe_stops_and_saves(place):
    """As after `... | head -4`."""
    process = begin(place, "--epochs", 300, "--save_interval", 0)
    until(process, 4)
    process.stdout.close()
    assert process.wait(100) == 128 + signal.SIGTERM
    stopped = max(losses(place))
    assert 4 <= stopped < 1000 and read_metadata(place.out / "64_vlm_pretrain.pth")["step"] == stopped
    assert read_state(place.out / "64_vlm_pretrain_resume.pth")["step"] == stopped


def test_a_full_disk_for_what_it_prints_ends_no_training(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w"))  # noqa: SIM115
    stop = Stop(quiet=False)
    print("x" * 10_000, flush=True)
    tell("x" * 10_000)
    stop.restore()
    assert stop.signal is None


def test_after_nohup_a_closed_terminal_does_not_matter(monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop(quiet=True)
    os.kill(os.getpid(), signal.SIGHUP)
    stop.restore()
    signal.signal(signal.SIGHUP, previous)
    assert stop.signal is None


def test_an_interval_of_0_is_never(place):
    never = ["--log_interval", 0, "--save_interval", 0, "--eval_interval", 0, "--val_fraction", 0.2]
    text = run_whole(place, *never)
    assert "step " not in text and "saved " in text and (place.out / "64_vlm_pretrain_resume.pth").exists()
    assert [line for line in log_lines(place) if "step" in line and "run" not in line] == []


def test_a_clipping_of_0_is_none(place):
    run_whole(place, "--grad_clip", 1e9, "--epochs", 1)
    unclipped = digest(place)
    run_whole(place, "--grad_clip", 0, "--epochs", 1)
    assert digest(place) == unclipped
    run_whole(place, "--grad_clip", 0.01, "--epochs", 1)
    assert digest(place) != unclipped


def test_a_second_interrupt_ends_at_once():
    code, _, err = run_python(
        "-c",
        "import os, signal, time; from model.training.distributed import Stop; Stop(quiet=False)\n"
        "for _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(1.2)\n"
        "print('still here')",
        fresh=True,
    )
    assert code == 130 and "stopping after this step (Ctrl-C again: at once)" in err


def test_kill_9_at_any_moment(place, undisturbed):
    """Also while it loads or saves; the benchmark does thirty rounds of this."""
    rng = random.Random(0)
    for _ in range(6):
        with contextlib.suppress(subprocess.TimeoutExpired):  # by which it was killed
            place.pretrain(*SETTINGS, "--resume", "--save_interval", 1, timeout=rng.uniform(0.2, 1.5))
    run_whole(place, "--resume", "--save_interval", 1)
    assert (losses(place), digest(place)) == undisturbed


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory, world, tokenizer):
    """What a run leaves that was stopped in the middle."""
    place = make_place(tmp_path_factory.mktemp("stopped"), world, tokenizer)
    process = begin(place)
    until(process, 4)
    process.send_signal(signal.SIGTERM)
    finish(process)
    return place.out


@pytest.fixture
def stopped(place, left_behind):
    """A place in which that run can be resumed."""
    shutil.copytree(left_behind, place.out, dirs_exist_ok=True)
    return place


def test_another_number_of_processes_goes_on_at_the_same_sample(stopped, undisturbed):
    place, before = stopped, max(losses(stopped))
    run_whole(place, "--resume", launcher=[*TORCHRUN, "--nproc_per_node", 2])
    assert sorted(losses(place)) == list(range(1, 19)) and before < 18
    assert losses(place) == pytest.approx(undisturbed[0], abs=1e-5)


def test_what_contradicts_is_listed(stopped):
    place = stopped
    before = digest(place)
    code, text = attempt(place, "--resume", "--learning_rate", 1e-4, "--seed", 7, "--batch_size", 4)
    assert code == 1 and "Traceback" not in text
    assert "_resume.pth belongs to a different run (" in text and "use its settings, or start over without" in text
    for odd in ("--learning_rate is 0.0001, was 0.001", "--seed is 7, was 1337", "global batch size is 4, was 8"):
        assert odd in text
    assert digest(place) == before
    file = place.out / "64_vlm_pretrain_resume.pth"
    state = torch.load(file)
    first = {name: value for name, value in state.items() if name != "format"}  # states had no format at first
    second = {**state, "format": 2, "same": state["invariants"], "divided": [8, 1], "since": state["running_stats"]}
    for other in (first, second, {**state, "format": 99}, [1]):
        torch.save(other, file)
        with pytest.raises(BadInput, match=f"{file} was written by another version of MiniMind-V: resume with that"):
            read_state(file)
    code, text = attempt(place, "--resume")
    assert code == 1 and "was written by another version" in text and "Traceback" not in text
    file.write_bytes(b"x" * 100)
    code, text = attempt(place, "--resume")
    assert code == 1 and "is truncated or corrupt: start over without --resume" in text


def test_torchrun_restarts_a_run_whose_process_died(place, undisturbed):
    launcher = [*TORCHRUN, "--nproc_per_node", 2, "--max-restarts", 1]
    process = begin(place, "--batch_size", 4, launcher=launcher)
    until(process, 5)
    os.kill(children(process)[1], signal.SIGKILL)
    code, text = finish(process)
    assert code == 0 and "resuming after step" in text, text
    assert losses(place) == pytest.approx(undisturbed[0], abs=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_torchrun_told_to_end_saves(place, undisturbed, workers):
    launcher = [*TORCHRUN, "--nproc_per_node", 2]
    flags = ["--batch_size", 4, "--save_interval", 100, "--num_workers", workers]
    process = begin(place, *flags, launcher=launcher)
    until(process, 4)
    process.terminate()
    code, text = finish(process)
    assert code != 0 and "add --resume to the same command to continue" in text, text
    stopped = max(losses(place))
    text = run_whole(place, "--resume")
    assert f"resuming after step {stopped} of 18" in text and losses(place) == pytest.approx(undisturbed[0], abs=1e-5)


def test_two_machines_of_which_one_dies_and_comes_back(place, undisturbed):
    """Two torchrun agents that meet on the loopback, as two machines would, started as web/docs/several_machines.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = [*TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 3]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "test"]

    alone = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def machine():
        return begin(place, "--batch_size", 4, "--save_interval", 1, launcher=launcher, env=alone)

    first = machine()
    wait_for_port(endpoint)  # so that it is this one that holds the meeting point
    second = machine()
    until(first, 5)
    for number in (*children(second), second.pid):
        os.kill(number, signal.SIGKILL)
    second.wait()
    second = machine()
    for process in (first, second):
        code, text = finish(process)
        assert code == 0, text
    assert sorted(losses(place)) == list(range(1, 19))  # every step once, each of 8 samples
    assert losses(place) == pytest.approx(undisturbed[0], abs=1e-5)
    assert read_metadata(place.out / "64_vlm_pretrain.pth")["training"][-1]["processes"] == 2


def wait_for_port(endpoint):
    host, port = endpoint.split(":")
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at {endpoint}")


def children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, encoding="utf-8", check=True)
    return [int(number) for number in found.stdout.split()]


def test_a_process_that_dies_ends_the_job_with_its_own_error(place):
    flags = ["--batch_size", 4, "--data_path", place.out / "nowhere.json"]
    code, text = attempt(place, *flags, launcher=[*TORCHRUN, "--nproc_per_node", 2])
    assert code == 1 and "nowhere.json not found" in text


def test_a_step_with_bad_numbers_is_left_out(place):
    run_whole(place, "--cache_features", "--epochs", 1)
    array = next((place.out / "features").glob("*.npy"))
    features = np.load(array, mmap_mode="r+")
    features[5] = np.nan
    features.flush()
    clear(place)
    run_whole(place, "--cache_features")
    lines = place.log("64_vlm_pretrain")
    assert lines[-1]["skipped"] == 3 and len(lines) == 18  # the picture was seen once in each of three epochs
    assert sum(np.isnan(line["loss"]) for line in lines) == 3
    assert all(tensor.isfinite().all() for tensor in read_weights(place.out / "64_vlm_pretrain.pth").values())


def test_a_feature_cache_that_was_cut_off_goes_on_where_it_was(place, tmp_path):
    """Killed while CLIP looks at 960 pictures: the next run opens only those that are left, with the same features."""
    place.world = shutil.copytree(place.world, tmp_path / "world")
    images, file = place.world / "images", place.world / "pretrain.json"
    records = json.loads(file.read_text(encoding="utf-8"))
    for record in list(records):
        for copy in range(19):
            name = f"{copy}_{record['image']}"
            shutil.copy(images / record["image"], images / name)
            records.append({**record, "image": name})
    (images / records[3]["image"]).write_bytes(b"no picture")
    file.write_text(json.dumps(records), encoding="utf-8")
    flags = ["--cache_features", "--epochs", 1, "--batch_size", 240]

    run_whole(place, *flags)
    note, array = (next((place.out / "features").glob(f"*{end}")) for end in (".json", ".npy"))
    whole, wrong = array.read_bytes(), json.loads(note.read_text(encoding="utf-8"))["bad"]
    assert [*wrong] == ["3"]
    shutil.rmtree(place.out / "features")

    process, done = begin(place, *flags), 0
    limit = time.time() + 300
    while done < 256:
        assert process.poll() is None and time.time() < limit, f"stood still or ended at {done} pictures"
        time.sleep(0.001)
        with contextlib.suppress(FileNotFoundError):
            done = json.loads(note.read_text(encoding="utf-8"))["done"]
    process.kill()
    process.wait()
    done = json.loads(note.read_text(encoding="utf-8"))["done"]
    assert 256 <= done < 960 and not array.exists()
    for record in records[:done]:  # same name, size and time, but no picture any more
        picture = images / record["image"]
        stamp, size = picture.stat().st_mtime_ns, picture.stat().st_size
        picture.write_bytes(b"x" * size)
        os.utime(picture, ns=(stamp, stamp))
    assert f"running CLIP over {960 - done} pictures" in run_whole(place, *flags)
    assert array.read_bytes() == whole and json.loads(note.read_text(encoding="utf-8"))["bad"] == wrong
    assert not list((place.out / "features").glob("*.tmp")) and "running CLIP" not in run_whole(place, *flags)


def test_bad_numbers_without_end_stop_the_run(place):
    run_whole(place)
    before = digest(place)
    code, text = attempt(place, "--learning_rate", 1e30, "--epochs", 10, "--save_interval", 100)
    assert code == 1 and "20 steps in a row had NaN or inf gradients" in text and "Traceback" not in text
    assert digest(place) == before


def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(place):
    run_whole(place)
    before = {file.name: file.read_bytes() for file in place.out.glob("64_vlm*.pth")}
    code, text = attempt(place, "--epochs", 1, limit=200_000)
    assert code == 1 and "Traceback" not in text
    assert "could not save to" in text and "the last good files are kept" in text
    assert "the last weights could not be saved: make room in" in text
    assert {file.name: file.read_bytes() for file in place.out.glob("64_vlm*.pth")} == before
    assert not list(place.out.glob("*.tmp"))
    code, text = attempt(place, "--cache_features", limit=20_000)
    assert code == 1 and "Traceback" not in text
    assert "could not be written (File too large): it takes 0.0 GB; make room, name another --out_dir, or" in text


@pytest.mark.parametrize("out", ["/proc/minimind", "/sys/kernel"])
def test_where_nothing_can_be_written_it_is_said_before_any_work(place, out):
    code, text = attempt(place, "--from_weights", place.out / "64_llm.pth", "--out_dir", out)
    assert code == 1 and "Traceback" not in text and "step 1/" not in text
    assert out in text and "could not be" in text and "name another --out_dir" in text


def test_held_out_samples_are_measured_and_not_trained_on(place):
    run_whole(place, "--val_fraction", 0.25, "--eval_interval", 2, "--epochs", 2)
    measured = [line["val_loss"] for line in log_lines(place) if "val_loss" in line]
    assert len(measured) == 5 and measured[-1] < measured[0]  # 36 samples to train on: 2 x 5 steps
    clear(place)
    run_whole(place, "--val_path", place.world / "pretrain.json", "--eval_interval", 3, "--epochs", 1)
    assert len([line for line in log_lines(place) if "val_loss" in line]) == 2
    clear(place)  # one batch is held out, and one of two processes has none of it
    flags = ["--val_fraction", 0.1, "--eval_interval", 3, "--epochs", 1]
    run_whole(place, *flags, launcher=[*TORCHRUN, "--nproc_per_node", 2])
    assert len([line for line in log_lines(place) if "val_loss" in line]) == 1


def test_a_run_without_a_step_is_refused(place):
    for flags, why in (
        (["--val_fraction", 1], "3 epochs of 0 samples, and a step takes 8 samples"),
        (["--batch_tokens", 1024, "--accumulation_steps", 99], "3 epochs of 48 samples, and a step takes 99 batches"),
    ):
        code, text = attempt(place, *flags)
        assert code == 1 and f"there is nothing to do: {why}" in text
        assert "Traceback" not in text and not (place.out / "64_vlm_pretrain.pth").exists()


def test_out_of_memory_is_told_with_what_to_turn_down():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 6.58 GiB memory in use."
    )
    assert oom_details(error) == (
        "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.20 GiB is free"
    )
