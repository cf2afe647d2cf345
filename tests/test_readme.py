"""What README and its pages say: their commands run in order as they stand, what they name is there, both languages agree."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import ROOT, heed_interrupts, write_parquet
from packaging.requirements import Requirement
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dataset.demo.sentences import LANGUAGES, QUESTIONS
from model.checkpoint import load_tokenizer, save_weights
from model.conversation import tokenizer_fields
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_vlm import MiniMindVLM

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from made_up import make_files

# in the order in which their commands are run
PAGES = (
    "README.md",
    "web/docs/faq.md",
    "web/docs/training.md",
    "dataset/README.md",
    "web/docs/several_machines.md",
    "web/docs/serving.md",
    "web/docs/changing_it.md",
    "web/docs/results.md",
    "tests/benchmarks/README.md",
    "web/docs/changelog.md",
)


def in_chinese(page):
    return page.replace(".md", "_zh.md")


TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for page in PAGES for name in (page, in_chinese(page))}
NOT_RUN = {
    "pip install": "made before the tests run",
    "python -m pytest tests": "this is it",
    "hf download": "a download",
    "git": "a download",
    "cd minimind-v": "into that download",
    "mv minimind-2024/": "out of a download",
    "vllm serve": "takes gigabytes; tests/engines runs it",
    "python web_server.py --backend": "needs an engine; test_backend.py and tests/engines have one",
    "cp -r ../minimind-v1": "out of a download",
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": "for several machines; test_resume.py runs two of them",
    "torchrun --nnodes 2": "needs two machines; test_resume.py runs two on one",
}
SMALL_WORLD = "python -m dataset.demo.world --pictures 100 --pairs 10 --clips 10"
# what is drawn where the README draws the whole world, which takes longer to draw, to learn and to be asked about
TINY_WORLD = "python -c 'from dataset.demo.world import FOLDER, build; build(FOLDER, pictures=24, pairs=4, animations=4, held_out=12)'"
# what people put there or programs make
MADE = (
    "MiniMind2",
    "minimind-3",
    "model/siglip2-base",
    "out/",
    "dataset/pretrain_",
    "dataset/sft_",
    "model/clip_model/clip-",
    "../minimind-v1",
    "curves.png",
    "my-onnx/",
    "LLaVA-",
    "images/1-",
    "images/2-",
    "wandb/",
    "dataset/demo_world/",
    "coco/",
    "train2017/",
)


def blocks(text):
    """The code blocks of a page, as (language, text), in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block):
    """The commands in a block of bash, without comments and without those that are not run."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [part for part in parts if part and not part.startswith(tuple(NOT_RUN))]


def prose(text):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# --- running everything ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository as Git has it, with small files of the real formats where the README puts the real ones."""
    made, place = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place / name)
    for folder in ("eval_images", "eval_multi_images"):  # untrained weights answer each question at full length
        questions = place / "dataset" / folder / "questions.json"
        questions.write_text(json.dumps(json.loads(questions.read_text(encoding="utf-8"))[:2]), encoding="utf-8")
    make_files(made, 16, clip=CLIPVisionConfig(num_hidden_layers=2))
    shutil.move(made / "clip", place / "model" / "clip_model" / "clip-vit-base-patch32")
    shutil.copytree(made / "tokenizer", place / "model" / "minimind_tokenizer", dirs_exist_ok=True)
    for stage in ("pretrain", "sft", "sft_multi"):
        shutil.copytree(made / "images", place / "dataset" / f"{stage}_images")
        shutil.copyfile(made / "data.json", place / "dataset" / f"{stage}_vlm_data.json")
    tokenizer = load_tokenizer(made / "tokenizer")
    config = LMConfig(**tokenizer_fields(tokenizer))
    save_weights(place / "out" / "512_llm.pth", MiniMindLM(config), tokenizer)
    save_weights(made / "512_vlm_sft.pth", MiniMindVLM(config), tokenizer)
    save_todays_parts(place, tokenizer)
    run(place, f"{sys.executable} -m model.export {made}/512_vlm_sft.pth minimind-v-v1-small")
    (place / "photos").mkdir()
    for number, name in enumerate(("garden", "cat", "before", "after", "car", "tree")):
        shutil.copyfile(made / "images" / f"{number}.jpg", place / "photos" / f"{name}.jpg")
    (place / "held_out.csv").write_text("image,caption\ncar.jpg,一辆车\ntree.jpg,一棵树\n", encoding="utf-8")
    run(place, TINY_WORLD)
    return place


def save_todays_parts(place, tokenizer):
    """What paths A and B download, with fewer layers: Parquet with the pictures inside, MiniMind2-Small's folder, ..."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=len(tokenizer), rms_norm_eps=1e-5)
    LlamaForCausalLM(config).save_pretrained(place / "MiniMind2-Small")
    tokenizer.save_pretrained(place / "MiniMind2-Small")
    records = json.loads((place / "dataset" / "pretrain_vlm_data.json").read_text())
    for name in ("pretrain", "sft"):
        write_parquet(place / "dataset" / f"{name}_i2t.parquet", records, place / "dataset" / "pretrain_images")

    # MiniMind-3 and a SigLIP2, with one layer each, and a VLM of both as it was published
    sizes |= {"hidden_size": 768, "num_key_value_heads": 4, "head_dim": 96, "tie_word_embeddings": True}
    config = Qwen3Config(**sizes, num_hidden_layers=1, vocab_size=len(tokenizer), rope_theta=1e6)
    llm = Qwen3ForCausalLM(config)
    llm.save_pretrained(place / "minimind-3")
    tokenizer.save_pretrained(place / "minimind-3")
    vision = SiglipVisionConfig(image_size=256, patch_size=32, num_hidden_layers=1)
    SiglipVisionModel(vision).save_pretrained(place / "model" / "siglip2-base-p32-256-ve")
    tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)
    config.vocab_size = len(tokenizer)
    llm.resize_token_embeddings(len(tokenizer))
    shapes = {"0.weight": (768,), "0.bias": (768,), "1.weight": (768, 768), "1.bias": (768,), "3.weight": (768, 768)}
    state = {f"vision_proj.mlp.{name}": torch.randn(shape) for name, shape in {**shapes, "3.bias": (768,)}.items()}
    (place / "minimind-3v").mkdir()
    torch.save({**llm.state_dict(), **state}, place / "minimind-3v" / "pytorch_model.bin")
    tokenizer.save_pretrained(place / "minimind-3v")
    published = {"model_type": "minimind-v", "image_special_token": "<|image_pad|>", "image_token_len": 64}
    (place / "minimind-3v" / "config.json").write_text(json.dumps({**config.to_dict(), **published}))


def environment(place):
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(place),
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }


def run(place, command):
    """Runs a line of a page in the clone; returns what it printed."""
    result = subprocess.run(
        ["bash", "-c", command],
        check=False,
        cwd=place,
        env=environment(place),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=600,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


PORT = "7788"  # the README's


def free_port():
    """The README's port, or another one where something else listens there."""
    for port in (int(PORT), 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as free:
            return str(free.getsockname()[1])


class Server:
    """A `python web_server.py` line of a page: it stays until the next one, or until the end."""

    process = None

    def __init__(self):
        self.port = free_port()

    def start(self, place, command):
        self.stop()
        port = "" if self.port == PORT else f" --port {self.port}"
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command}{port}"],
            cwd=place,
            env=environment(place),
            preexec_fn=heed_interrupts,  # noqa: PLW1509
        )
        limit = time.time() + 300
        while time.time() < limit:
            assert self.process.poll() is None, f"{command} ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/training/runs", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"{command}: nothing at http://127.0.0.1:{self.port}")

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.mark.slow
def test_every_command_runs_in_order(clone, server):
    printed = {}
    text = "\n".join(TEXTS[page] for page in PAGES).replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{server.port}")
    tables = iter(("names.csv", "captions.csv"))
    for language, block in blocks(text):
        if language == "python" and "QUESTIONS[" in block:  # the text says where it belongs
            source = clone / "dataset" / "demo" / "sentences.py"
            before, line, after = source.read_text(encoding="utf-8").partition(
                "def question(language, scene, rng, kind):"
            )
            assert line
            source.write_text(f"{before}{block}\n\n{line}{after}", encoding="utf-8")
        elif language == "csv":
            (clone / next(tables)).write_text(block, encoding="utf-8")
        elif language == "python":
            (clone / "block.py").write_text(block, encoding="utf-8")
            assert run(clone, "python block.py").strip()
        elif language == "bash":
            for command in commands(block):
                if command.startswith("python web_server.py"):
                    server.start(clone, command)
                else:
                    printed[command] = run(clone, TINY_WORLD if command == "python -m dataset.demo.world" else command)
    table = printed["python 3-eval_chat.py --demo --all"]
    kinds = {f"{language} {kind}" for language in LANGUAGES for kind in (*QUESTIONS, "side")}
    assert kinds | {"all"} <= set(re.findall(r"^(\w+(?: \w+)?) +\d+ +[\d.]+% +[\d.]+%$", table, re.MULTILINE))
    ready = "ready: python 3-eval_chat.py"
    for flags in ("--tokenizer_path MiniMind2-Small", "--dim 768 --tokenizer_path minimind-3"):
        assert f"{ready} {flags}" in printed["python -m model.doctor"]
    assert f"{ready} --tokenizer_path MiniMind2-Small" in printed["python -m model.doctor --parts minimind2"]
    assert ready in printed["python -m model.doctor --parts v1"]
    for made in (
        "curves.png",
        "out/512_vlm_sft_multi.pth",
        "out/back/512_vlm_sft.pth",
        "out/mine/768_vlm_sft.pth",
        "wandb",
    ):
        assert (clone / made).exists()


# --- what they say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_code_figures_and_headings(page):
    english, chinese = TEXTS[page], TEXTS[in_chinese(page)]
    assert [language for language, _ in blocks(english)] == [language for language, _ in blocks(chinese)]
    for (language, ours), (_, theirs) in zip(blocks(english), blocks(chinese), strict=True):
        ours, theirs = (re.sub(r"\s*#(?!SBATCH|!).*", "", block) for block in (ours, theirs))  # comments are translated
        ours, theirs = (re.sub(r'""".*?"""', "", block) for block in (ours, theirs))
        assert ours == theirs, language
    ours, theirs = (re.findall(r'(?:\]\(|src=")([^)"]*\.(?:svg|png))', text) for text in (english, chinese))
    assert [name.replace("_zh.", ".") for name in theirs] == ours
    assert all("_zh." in name for name in theirs if "/eval_images/" not in name)
    ours, theirs = (re.findall(r"^#+", prose(text), re.MULTILINE) for text in (english, chinese))
    assert ours == theirs
    assert english.count("\n|") == chinese.count("\n|")  # rows of tables


def anchors(file):
    """What GitHub calls the headings of a Markdown file in links."""
    headings = re.findall(r"^#+ (.*)$", prose(file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    links = re.findall(r'(?:\]\(|src=")([^)"]+)', prose(TEXTS[name]))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists() and (not anchor or anchor in anchors(file)), link
        # a page links to pages in its own language, but for its own translation
        other = name.replace("_zh.md", ".md") if name.endswith("_zh.md") else in_chinese(name)
        if path.endswith(".md") and file.resolve() != ROOT / other:
            translation = file.with_name(in_chinese(file.name.replace("_zh.md", ".md")))
            assert path.endswith("_zh.md") == (name.endswith("_zh.md") and translation.exists()), link


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_named_is_there(name):
    text = prose(TEXTS[name])
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|txt))`", text):
        if path.startswith(MADE) or "huggingface" in path or path.count("/") == 1 and path in REPOSITORIES:
            continue
        assert (ROOT / path).exists() or (ROOT / name).parent.joinpath(path).exists(), path
    for names, path in re.findall(r"((?:`[\w.]+`[^`\[\]]{0,12})+)\[(?:[\w/.-]+)\]\((?:\.\./)*([\w/.-]+\.py)\)", text):
        for one in re.findall(r"`([\w.]+)`", names):
            if not (ROOT / one).exists():
                assert re.search(rf"(def|class) {one.split('.')[-1]}\b", (ROOT / path).read_text(encoding="utf-8")), one


@pytest.mark.parametrize("name", [name for name in TEXTS if "| lines |" in TEXTS[name] or "| 行数 |" in TEXTS[name]])
def test_lines_of_code_are_told_within_a_tenth(name):
    rows = re.findall(r"^\|[^|]*\|([^|]*\]\([^|]*)\| ([\d,]+) \|$", TEXTS[name], re.MULTILINE)
    assert len(rows) >= 8
    for cell, told in rows:
        places = [(ROOT / name).parent / link for link in re.findall(r"\]\(([^)]+)\)", cell)]
        files = {file.resolve() for place in places for file in (place.iterdir() if place.is_dir() else [place])}
        files = [file for file in files if file.suffix in (".py", ".js", ".css", ".html")]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert lines * 0.9 <= int(told.replace(",", "")) <= lines * 1.1, f"{cell}: {lines} lines"


@pytest.mark.parametrize("file", ["requirements.txt", "tests/requirements.txt"])
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_each_python_gets_one_version_of_each_package(version, file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    packages = [Requirement(line) for line in lines if not line.startswith("#")]
    names = [one.name for one in packages if not one.marker or one.marker.evaluate({"python_version": version})]
    assert sorted(names) == sorted({package.name for package in packages})


def test_the_readme_stays_short():
    assert len(prose(TEXTS["README.md"]).split()) <= 2500


REPOSITORIES = (  # on Hugging Face
    "openai/clip-vit-base-patch32",
    "jingyaogong/minimind-v_dataset",
    "jingyaogong/MiniMind2-Small",
    "jingyaogong/MiniMind2",
    "jingyaogong/minimind-3",
    "jingyaogong/minimind-3v",
    "jingyaogong/siglip2-base-p32-256-ve",
    "openai/clip-vit-base-patch16",
    "gongjy/minimind-v_dataset",
    "jingyaogong/minimind-v-v1-small",
    "xinyanghuang/minimind-v_multi_image",
    "BUAADreamer/llava-en-zh-300k",
    "LinkSoul/Chinese-LLaVA-Vision-Instructions",
    "liuhaotian/LLaVA-CC3M-Pretrain-595K",
)
FOREIGN = {
    "--help",
    "--revision",
    "--index-url",
    "--threads",
    "--max-restarts",
    "--max-model-len",
    "--dataset",
    "--local_dir",
}  # argparse's, hf's, pip's, gunicorn's, torchrun's, vLLM's, ModelScope's


@pytest.mark.parametrize("name", TEXTS)
def test_flags_are_known(name):
    sources = [
        *ROOT.glob("*.py"),
        *(file for name in ("model", "dataset", "web", "tests") for file in ROOT.glob(f"{name}/**/*.py")),
    ]
    code = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    known = set(re.findall(r'"(--\w+)"', code)) | {
        f"--{name}" for name in re.findall(r'^    "(\w+)": Setting', code, re.MULTILINE)
    }
    for text in re.findall(r"`([^`\n]*--[^`\n]*)`", prose(TEXTS[name])):
        if not text.startswith("ruff"):
            assert set(re.findall(r"(?<!\S)--[\w-]+", text)) <= known | FOREIGN, text


def test_what_is_not_run_is_there_to_be_left_out():
    lines = [line for page in PAGES for _, block in blocks(TEXTS[page]) for line in re.split(r"\n| && ", block)]
    assert all(any(line.startswith(begin) for line in lines) for begin in NOT_RUN)
    assert SMALL_WORLD in lines
