"""The numbered scripts, each as a process of its own, on small files of the real formats."""

import argparse
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import CHAT, PRETRAIN, ROOT, SFT, TORCHRUN, Place, run_python, save_llm
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.demo import drawing
from dataset.demo import world as demo_world
from dataset.demo.scenes import random_scene
from model.arguments import add_training_arguments, default_device, pick_dtype
from model.chat import Chat
from model.checkpoint import read_metadata, read_weights
from model.errors import run_script
from model.stages import STAGES
from model.training.trainer import learning_rate_at


@pytest.fixture
def place(tmp_path, world, tiny_clip):
    return Place(tmp_path, world, tiny_clip)


def test_stage_after_stage_to_an_answer(place, tokenizer):
    save_llm(place, tokenizer)
    code, out, err = place.pretrain("--epochs", 2)
    assert code == 0, err
    assert "step 12/12: loss" in out and "64_vlm_pretrain.pth" in out
    losses = [line["loss"] for line in place.log("64_vlm_pretrain")]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert read_metadata(place.out / "64_vlm_pretrain.pth")["step"] == 12

    code, out, err = place.sft("sft.json", "--learning_rate", 1e-3)
    assert code == 0, err
    before = read_weights(place.out / "64_vlm_pretrain.pth")
    after = read_weights(place.out / "64_vlm_sft.pth")
    assert before.keys() == after.keys()
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(changed) == len(after)  # projector and language model learn, all of them

    code, out, err = place.sft("sft.json", "--multi", "False")
    assert code == 0 and not (place.out / "64_vlm_sft_multi.pth").exists()
    for spelling in (["--multi"], ["--multi", "True"]):
        code, out, err = place.sft("sft_multi.json", *spelling)
        assert code == 0 and (place.out / "64_vlm_sft_multi.pth").exists(), err
        (place.out / "64_vlm_sft_multi.pth").unlink()

    code, out, err = run_python(
        CHAT, *place.model, "--score", world_file(place), "--images_path", place.world / "images"
    )
    assert code == 0, err
    assert "shuffled image" in out and "colour" in out and "all" in out


def world_file(place):
    return place.world / "score_heldout.json"


def test_a_frozen_language_model_stays_as_it_is(place, tokenizer):
    save_llm(place, tokenizer)
    code, _, err = place.pretrain("--freeze_llm", "--epochs", 2, "--learning_rate", 1e-2)
    assert code == 0, err
    before, after = read_weights(place.out / "64_llm.pth"), read_weights(place.out / "64_vlm_pretrain.pth")
    assert all(torch.equal(before[name], after[name]) for name in before) and len(after) == len(before) + 1
    losses = [line["loss"] for line in place.log("64_vlm_pretrain")]
    assert losses[-1] < losses[0]
    assert read_metadata(place.out / "64_vlm_pretrain.pth")["training"][0]["freeze_llm"] is True

    code, out, err = place.sft("sft.json", "--from_weights", place.out / "64_vlm_pretrain.pth", "--epochs", 2)
    assert code == 0 and f"loaded {place.out / '64_vlm_pretrain.pth'}" in out, err
    stages = read_metadata(place.out / "64_vlm_sft.pth")["training"]
    assert [(stage["stage"], stage["epochs"], stage["steps"]) for stage in stages] == [
        ("pretrain", 2, 12),
        ("sft", 2, 16),  # it has pictures of things without a name, too
    ]


def test_half_precision_with_scaled_losses(place, tokenizer):
    """The way of GPUs without bfloat16, as far as a CPU can go it: float16 products, and a GradScaler."""
    save_llm(place, tokenizer)
    code, _, err = place.pretrain("--dtype", "float16", "--epochs", 3)
    assert code == 0, err
    losses = [line["loss"] for line in place.log("64_vlm_pretrain")]
    norms = [line["grad_norm"] for line in place.log("64_vlm_pretrain")]
    assert losses[-1] < losses[0] - 0.1 and sum(math.isfinite(norm) for norm in norms) > len(norms) / 2
    before, after = read_weights(place.out / "64_llm.pth"), read_weights(place.out / "64_vlm_pretrain.pth")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(before["layers.0.attention.wq.weight"], after["layers.0.attention.wq.weight"])


def test_apple_s_gpu_is_chosen_where_there_is_one(monkeypatch):
    for cuda, mps, device in ((False, False, "cpu"), (False, True, "mps"), (True, False, "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=cuda: there)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda there=mps: there)
        assert default_device() == device
    assert pick_dtype(None, "mps") == torch.float32


def test_a_clip_of_the_size_of_vit_l_14(place, tokenizer, tmp_path):
    """257 vectors of 1,024 a picture (fewer layers than the real one): a stage, an answer, and a refusal of another CLIP."""
    clip = tmp_path / "clip-vit-large-patch14"
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=224, patch_size=14)
    CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=2)).save_pretrained(clip)
    place.training[place.training.index("--vision_path") + 1] = clip
    save_llm(place, tokenizer)
    few = json.loads((place.world / "pretrain.json").read_text(encoding="utf-8"))[:8]
    (tmp_path / "few.json").write_text(json.dumps(few), encoding="utf-8")
    code, out, err = place.pretrain("--data_path", tmp_path / "few.json")
    assert code == 0 and "step 1/1: loss" in out, err
    weights = place.out / "64_vlm_pretrain.pth"
    assert read_weights(weights)["vision_proj.vision_proj.0.weight"].shape == (64, 1024)

    chat = Chat(weights, clip, ROOT / "model" / "demo")
    answer = chat.stream(
        "颜色？", [ROOT / "dataset/eval_images/green-ring_blue-star_purple-triangle.png"], max_new_tokens=3
    )
    list(answer)
    assert answer.finish_reason in ("length", "stop")
    asked = answer.ids[0].tolist()
    assert (asked.count(tokenizer.convert_tokens_to_ids("<")), asked.count(tokenizer.convert_tokens_to_ids(">"))) == (
        128,
        129,
    )
    assert chat.max_frames == 1  # more pictures of 257 tokens than one don't fit into 512
    code, _, err = run_python(CHAT, *place.model, "--weights", weights)
    assert code == 1 and f"{weights} has vision_width 1024, expected 48: it was trained with another CLIP" in err, err


def test_experts_train_in_both_precisions(place, tokenizer):
    save_llm(place, tokenizer, use_moe=True)
    for dtype in ("float32", "bfloat16"):
        code, _, err = place.pretrain("--use_moe", "--dtype", dtype, "--epochs", 2)
        assert code == 0, err
        losses = [line["loss"] for line in place.log("64_moe_vlm_pretrain")]
        assert losses[-1] < losses[0]


def test_losses_do_not_depend_on_how_a_batch_is_divided(place, tokenizer):
    """The same global batches of 8 samples: one process, two processes of 4, four accumulation steps of 2; by tokens, too."""
    save_llm(place, tokenizer)
    torchrun = [*TORCHRUN, "--nproc_per_node", 2]
    losses = {}
    for name, launcher, flags in (
        ("one process", [], []),
        ("two processes", torchrun, ["--batch_size", 4]),
        ("accumulation", [], ["--batch_size", 2, "--accumulation_steps", 4]),
        ("tokens", [], ["--batch_tokens", 512, "--accumulation_steps", 2]),
        ("tokens, two processes", torchrun, ["--batch_tokens", 512]),
    ):
        (place.out / "64_vlm_pretrain.jsonl").unlink(missing_ok=True)
        flags += ["--epochs", 4, "--learning_rate", 1e-3, *place.data("pretrain.json")]
        code, _, err = run_python(*launcher, PRETRAIN, *place.training, *flags, fresh=bool(launcher))
        assert code == 0, err
        losses[name] = [line["loss"] for line in place.log("64_vlm_pretrain")]
    assert len(losses["one process"]) == 24
    assert losses["two processes"] == pytest.approx(losses["one process"], abs=1e-5)
    assert losses["accumulation"] == pytest.approx(losses["one process"], abs=1e-5)
    assert 8 <= len(losses["tokens"]) < 24
    assert losses["tokens, two processes"] == pytest.approx(losses["tokens"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_compiled_model_has_the_same_losses(place, tokenizer, tmp_path, use_moe):
    save_llm(place, tokenizer, use_moe=use_moe)
    losses, name = [], "64_moe_vlm_pretrain" if use_moe else "64_vlm_pretrain"
    for flags in (["--use_moe", use_moe], ["--use_moe", use_moe, "--compile"]):
        (place.out / f"{name}.jsonl").unlink(missing_ok=True)
        code, _, err = place.pretrain(*flags, "--epochs", 2)
        if flags and not shutil.which("g++"):
            assert code == 1 and "--compile needs a C++ compiler" in err
            return
        assert code == 0 and "recompile_limit" not in err, err
        losses.append([line["loss"] for line in place.log(name)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    code, _, err = place.pretrain("--use_moe", use_moe, "--compile", CXX=str(tmp_path / "c++"))
    assert code == 1 and "c++ was not found: install one, or leave it out" in err


def test_learning_rate_is_a_cosine_to_a_tenth():
    assert learning_rate_at(0, 10, 1.0, 0) == 1.0 and learning_rate_at(9, 10, 1.0, 0) == pytest.approx(0.1)
    assert learning_rate_at(0, 10, 1.0, 4) < learning_rate_at(3, 10, 1.0, 4) < learning_rate_at(4, 10, 1.0, 4) == 1.0


def test_cached_features_train_alike_and_open_no_picture_again(place, tokenizer, tmp_path):
    save_llm(place, tokenizer)
    place.world = shutil.copytree(place.world, tmp_path / "world")
    place.pretrain()
    plain = [line["loss"] for line in place.log("64_vlm_pretrain")]
    code, _, err = place.pretrain("--cache_features", "--epochs", 2)
    assert code == 0 and "running CLIP over 48 pictures" in err
    cached = [line["loss"] for line in place.log("64_vlm_pretrain")][len(plain) :]
    assert cached[0] == pytest.approx(plain[0], abs=2e-3)

    for picture in (place.world / "images").glob("train_*"):  # same name, size and time, but no picture any more
        stamp, size = picture.stat().st_mtime_ns, picture.stat().st_size
        picture.write_bytes(b"x" * size)
        os.utime(picture, ns=(stamp, stamp))
    code, _, err = place.sft("pretrain.json", "--cache_features")  # another stage over the same pictures
    assert code == 0 and "running CLIP" not in err, err


def test_from_scratch_needs_no_language_model(place):
    code, _, err = place.pretrain("--from_scratch")
    assert code == 0, err
    assert (place.out / "64_vlm_pretrain.pth").exists()

    # nor does it look at one that is named, as the demo's defaults do
    code, _, err = place.pretrain("--from_scratch", "--from_weights", place.out / "64_llm.pth")
    assert code == 0, err


@pytest.mark.parametrize(
    "script, flags, names",
    [
        (PRETRAIN, ["--tokenizer_path", "nowhere"], ["no tokenizer in nowhere", "--tokenizer_path"]),
        (PRETRAIN, ["--from_scratch", "--vision_path", "nowhere"], ["no CLIP in nowhere", "--vision_path"]),
        (PRETRAIN, ["--from_scratch", "--freeze_llm"], ["random language model", "leave out --freeze_llm"]),
        (PRETRAIN, ["--from_scratch", "--demo"], ["random language model", "with --demo, add --freeze_llm False"]),
        (PRETRAIN, [], ["64_llm.pth not found"]),
        (PRETRAIN, ["--from_scratch", "--data_path", "nowhere.json"], ["nowhere.json not found", "--data_path"]),
        (PRETRAIN, ["--from_scratch", "--images_path", "nowhere"], ["nowhere is not a folder", "--images_path"]),
        (SFT, [], ["64_vlm_pretrain.pth not found: run python 1-pretrain_vlm.py first"]),
        (SFT, ["--multi"], ["64_vlm_sft.pth not found: run python 2-sft_vlm.py first"]),
        (SFT, ["--multi", "maybe"], ["'maybe' should be True or False"]),
        (CHAT, [], ["64_vlm_sft.pth not found"]),
    ],
)
def test_what_is_missing_is_said_in_one_line(place, script, flags, names):
    data = [] if script == CHAT else place.data("pretrain.json")
    code, _, err = run_python(script, *(place.model if script == CHAT else place.training), *data, *flags)
    assert code not in (0, None)
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith(("usage", " "))]
    assert len(lines) == 1 and all(name in lines[0] for name in names), err
    assert not list(place.out.glob("*vlm*"))


def test_weights_that_do_not_fit_are_refused(place, tokenizer):
    save_llm(place, tokenizer)
    code, _, err = place.pretrain("--n_layers", 3)
    assert code == 1 and "has n_layers 2, expected 3: use --n_layers 2" in err and "Traceback" not in err
    code, _, err = place.sft("sft.json", "--from_weights", place.out / "64_llm.pth")
    assert code == 1 and "without a vision projector" in err
    (place.out / "64_llm.pth").write_bytes((place.out / "64_llm.pth").read_bytes()[:5000])
    code, _, err = place.pretrain()
    assert code == 1 and "is truncated, or not a file of weights" in err and "Traceback" not in err


def test_evaluation_pictures_are_there_and_small():
    for folder, images in (("eval_images", [1]), ("eval_multi_images", [2, 1])):  # an animation is one file
        asked = json.loads((ROOT / "dataset" / folder / "questions.json").read_text(encoding="utf-8"))
        assert len(asked) >= 4
        for names, question in asked:
            assert len(names) in images and question
            for name in names:
                with Image.open(ROOT / "dataset" / folder / name) as picture:
                    assert picture.size == (drawing.PICTURE, drawing.PICTURE)


def test_world_is_the_same_from_the_same_seed(tmp_path):
    for name in ("a", "b"):
        demo_world.build(tmp_path / name, pictures=3, pairs=2, animations=2, held_out=2, turns=2, seed=7)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    scene = random_scene(random.Random(1))
    assert drawing.draw(scene, random.Random(2)).tobytes() == drawing.draw(scene, random.Random(2)).tobytes()


def test_a_world_that_other_code_drew_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_world, "FOLDER", tmp_path)
    demo_world.build(tmp_path, pictures=1, pairs=1, animations=1, held_out=1, turns=1)
    demo_world.build_if_asked_for([tmp_path / "sft.json"])
    assert "another version" not in capsys.readouterr().err
    done = tmp_path / "world.json"
    done.write_text(json.dumps({**json.loads(done.read_text()), "drawn_by": "0"}))
    demo_world.build_if_asked_for([tmp_path / "elsewhere" / "sft.json"])
    assert capsys.readouterr().err == ""
    demo_world.build_if_asked_for([tmp_path / "sft.json"])
    assert f"{tmp_path} was drawn by another version of dataset/demo, so results may differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("--save_interval", "-1", "a whole number from 0 to 1000000000"),
        ("--log_interval", "ten", "a whole number from 0 to 1000000000"),
        ("--epochs", "0", "a whole number from 1 to 1000000000"),
        ("--epochs", "1.5", "a whole number from 1 to 1000000000"),
        ("--batch_size", "0", "a whole number from 1 to 1000000000"),
        ("--dim", "-512", "a whole number from 1 to 1000000"),
        ("--max_seq_len", "0", "a whole number from 2 to 1000000"),
        ("--num_workers", "-1", "a whole number from 0 to 1000"),
        ("--seed", "-1", "a whole number from 0 to 9223372036854775807"),
        ("--learning_rate", "nan", "a number from 1e-12 to 1e+30"),
        ("--learning_rate", "0", "a number from 1e-12 to 1e+30"),
        ("--learning_rate", "inf", "a number from 1e-12 to 1e+30"),
        ("--grad_clip", "-1", "a number from 0 to 1e+30"),
        ("--val_fraction", "-0.5", "a number from 0 to 1"),
        ("--max_bad_fraction", "5", "a number from 0 to 1"),
        ("--device", "gpu", "cuda, cuda:0, mps or cpu"),
    ],
)
def test_a_number_out_of_range_is_told_by_its_flag(capsys, flag, value, expected):
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([flag, value])
    assert f"error: argument {flag}: should be {expected}, not '{value}'\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["web_server.py", "--port", "99999"],
        ["-m", "dataset.demo.world", "--pictures", "0"],
        [CHAT, "--max_frames", "0"],
    ],
)
def test_numbers_of_other_scripts_have_a_range_too(command):
    code, _, err = run_python(*command)
    assert code == 2 and f"argument {command[-2]}: should be a whole number from " in err


def test_every_number_has_a_range():
    """`int` and `float` as the type of a flag would let any number in."""
    for file in [
        *ROOT.glob("*.py"),
        *(file for name in ("model", "dataset", "web") for file in ROOT.glob(f"{name}/**/*.py")),
    ]:
        assert not re.search(r"type=(int|float)\b", file.read_text(encoding="utf-8")), file


def test_a_device_that_is_not_there_is_said(place, tokenizer):
    save_llm(place, tokenizer)
    for device in ("cuda", "mps"):
        code, _, err = place.pretrain("--device", device)
        assert code == 1 and f"error: {device} can't be used here (" in err and "name another --device" in err
        assert "Traceback" not in err and len(err.splitlines()) == 1
    code, _, err = run_python(CHAT, *place.model, "--device", "cuda")
    assert code == 1 and "error: cuda can't be used here (" in err and "Traceback" not in err


def test_a_closed_pipe_ends_answers_quietly(flags):
    process = subprocess.Popen(
        [sys.executable, CHAT, *flags, "--all"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(100) == 128 + 13 and process.stderr.read() == b""


@pytest.mark.parametrize(
    "encoding, written",
    [("cp1252", "问 \\ud83d é".encode()), ("ascii", "问 \\ud83d é".encode()), ("gbk", b"\xce\xca \\ud83d \xa8\xa6")],
)
def test_any_text_can_be_printed(monkeypatch, encoding, written):
    """Files and pipes of a Western Windows, those of a Chinese one, and half a character."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(sys, "stderr", None)
    run_script(lambda: print("问 \ud83d é", end=""))
    assert sys.stdout.buffer.getvalue() == written


def test_scripts_can_be_started_from_elsewhere(tmp_path, weights, tiny_clip):
    """What a person types is relative to where she is, defaults are in the repository."""
    (tmp_path / "here").mkdir()
    places = [
        "--weights",
        f"../{weights.name}",
        "--vision_path",
        "../tiny_clip",
        "--tokenizer_path",
        ROOT / "model/demo",
    ]
    code, out, err = run_python(
        ROOT / CHAT, *places, "--device", "cpu", "--max_new_tokens", 2, cwd=tmp_path / "here", LANG="C", LC_ALL="C"
    )
    assert code == 0 and out.count("Q: ") == 14 and f"loaded ../{weights.name}" in out, err

    _, out, _ = run_python(ROOT / PRETRAIN, "--help", cwd=tmp_path / "here")
    helped = "".join(out.split())
    _, out, _ = run_python("-m", "model.doctor", "--demo", cwd=tmp_path / "here", PYTHONPATH=str(ROOT))
    for path in ("model/demo/192_llm.pth", "dataset/demo_world/sft_multi.json", "out/192_vlm_sft.pth"):
        assert f" {ROOT / path}" in out
    for path in (*STAGES["pretrain"].defaults.values(), "out", "model/minimind_tokenizer", "model/clip_model/clip-vit"):
        assert isinstance(path, float) or f"(default{ROOT / path}" in helped
    assert not [*(tmp_path / "here").iterdir()]


@pytest.mark.parametrize("script", ["1-pretrain_vlm.py", "2-sft_vlm.py", "3-eval_chat.py", "web_server.py"])
def test_help_names_every_flag(script):
    code, out, _ = run_python(script, "--help")
    assert code == 0 and "--demo [True|False]" in out
    assert ("--multi [True|False]" in out) == (script != "1-pretrain_vlm.py")


@pytest.mark.parametrize("page", ["training.md", "training_zh.md"])
def test_the_pages_table_of_stages_is_the_codes(page):
    text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
    table = {
        re.search("`(.+?)`", row)[1]: re.findall(r"`out/512_(\w+)\.pth`", row)
        for row in re.findall(r"^\| `[12]-\w+\.py.*$", text, flags=re.MULTILINE)
    }
    assert table == {stage.command: [stage.starts_from, stage.writes] for stage in STAGES.values()}
