"""What test modules share: scripts run as a person runs them, small models and files, trainings, and visitors of the server."""

import base64
import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput
from warm import THERE, run_warm
from werkzeug.serving import make_server

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model.checkpoint import save_weights
from model.conversation import tokenizer_fields
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_vlm import MiniMindVLM

GOLDEN = Path(__file__).parent / "golden"


def formula(name, shape):
    """The golden files' weights, from their names."""
    values = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
    values *= np.float32(0.05 if len(shape) > 1 else 0.1)
    return torch.from_numpy(values + 1 if name.endswith("norm.weight") else values)


def formula_state(shapes):
    """A whole state dict of formula weights, the tied tensor under both names."""
    state = {name: formula(name, shape) for name, shape in shapes.items()}
    state["tok_embeddings.weight"] = state["output.weight"]
    return state


def golden(name):
    """A golden file's JSON."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


QUIET = {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}


def run(*command, cwd=ROOT, timeout=600, **environment):
    """Runs a program in a process of its own, as a person would: (exit code, stdout, stderr)."""
    result = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        env={**os.environ, **QUIET, **environment},
    )
    return result.returncode, result.stdout, result.stderr


def run_python(script, *arguments, fresh=False, cwd=ROOT, timeout=600, **environment):
    """Runs a script of the repository; if `fresh`, in a Python that starts from nothing, which takes 4 s more."""
    if fresh or not THERE:
        return run(sys.executable, script, *arguments, cwd=cwd, timeout=timeout, **environment)
    return run_warm([str(part) for part in (script, *arguments)], cwd, {**QUIET, **environment}, timeout)


def heed_interrupts():
    """For a new process: Ctrl-C ends it, even if the tests run in the background, where it would be ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def save_clip(folder):
    """A folder with a random CLIP vision model, always the same: 64 pixels, patch 32, so 5 tokens an image, width 48."""
    torch.manual_seed(1)  # others answer alike about different pictures
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=32
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def save_random_vlm(path, tokenizer, **sizes):
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128, "image_tokens": 5, **sizes}
    model = MiniMindVLM(LMConfig(**sizes, vision_width=48, **tokenizer_fields(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # so that answers depend on the question and the picture
    save_weights(path, model, tokenizer, stage="sft")
    return path


def say(chat, text, seconds=0.0):
    """Makes the model write these tokens and then `</s>`, whatever it is asked, each token in so many seconds."""
    script = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat.config.eos_token_id]

    def forward(input_ids, past_key_values=None, **options):
        time.sleep(seconds)
        past_key_values.written = getattr(past_key_values, "written", -1) + 1
        token = script[min(past_key_values.written, len(script) - 1)]
        return CausalLMOutput(logits=F.one_hot(torch.tensor([[token]]), chat.config.vocab_size) * 100.0)

    chat.model.forward, chat.sessions = forward, None
    return script


def golden_model(name):
    """The golden file, its model, tokens (B, T) and image features (N, 50, 768)."""
    facts, arrays = golden(name), np.load(GOLDEN / f"{name}.npz")
    model = MiniMindVLM(
        LMConfig(**facts["config"], vision_bias="vision_proj.vision_proj.0.bias" in facts["keys"])
    ).eval()
    model.load_state_dict(formula_state(facts["keys"]))
    tokens = torch.from_numpy(arrays["tokens"]).long()
    images = 2 if name == "tiny_two_images" else 1
    features = torch.stack([feature(f"img{b}.{i}") for b in range(len(tokens)) for i in range(images)])
    return facts, arrays, model, tokens, features, 4 + 53 * images


def feature(name):
    return formula(name, (50, 768)) / 0.05


def formula_file(path, bias=True, projector=True, dtype=torch.float32, prefix="", extras=False, **sizes):
    """A checkpoint of formula weights at `path`, as the published code would have written it."""
    with torch.device("meta"):
        model = MiniMindVLM(LMConfig(vision_bias=bias, **sizes))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if projector or "vision" not in name}
    state = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in formula_state(shapes).items()}
    if extras:
        state |= {f"{prefix}pos_cis": torch.zeros(8, 8), f"{prefix}layers.0.attention.mask": torch.zeros(1, 1, 8, 8)}
    torch.save(state, path)
    return path


CHATML = """{%- if messages[0].role != "system" %}{{ "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n" }}{% endif %}
{%- for m in messages %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
THINKING = """{%- for m in messages %}
{%- if m.role == "assistant" %}{{ "<|im_start|>assistant\n<think>\n\n</think>\n\n" + m.content + "<|im_end|>\n" }}
{%- else %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n<think>\n\n</think>\n\n" }}{% endif %}"""
OLD_DEFAULT = """{%- if messages[0].role != "system" %}{{ "<s>system\n你是 MiniMind</s>\n" }}{% endif %}
{%- for m in messages %}{%- if m.role == "user" %}{{ "<s>user\n" + m.content + "</s>\n<s>assistant\n" }}
{%- elif m.role == "assistant" %}{{ m.content + "</s>\n" }}{% else %}{{ "<s>system\n" + m.content + "</s>\n" }}{% endif %}{% endfor %}"""
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GENERATIONS = {  # special tokens and the form of prompts
    "MiniMind v1": (("<unk>", "<s>", "</s>"), None),
    "MiniMind2 of 2025-02": (("<unk>", "<s>", "</s>"), OLD_DEFAULT),
    "MiniMind2 of 2025-04": (IM, CHATML),
    "MiniMind-3": ((*IM, "<think>", "</think>", "<|image_pad|>"), THINKING),
}


def byte_tokenizer(texts, vocab_size=400, special=("<unk>", "<s>", "</s>"), chat_template=None):
    """A byte-level BPE with the published special ids, trained on some texts."""
    tokenizer = Tokenizer(models.BPE(unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


def generation_tokenizer(generation):
    """A small tokenizer with the special tokens and the chat template of one of GENERATIONS."""
    special, template = GENERATIONS[generation]
    return byte_tokenizer(["a < b << <<<<< >> @ system\nuser\nassistant\n ?"] * 50, 400, special, template)


def write_parquet(path, records, images):
    """Records with one picture each as today's Parquet files have them: turns as JSON text, and the picture's bytes."""
    columns = {
        "conversations": [json.dumps(record["conversations"]) for record in records],
        "image_bytes": [(images / record["image"]).read_bytes() for record in records],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


PRETRAIN, SFT, CHAT = "1-pretrain_vlm.py", "2-sft_vlm.py", "3-eval_chat.py"


class Place:
    """A folder with everything small: a random CLIP, the demo's tokenizer, a picture world; and the flags that say so."""

    def __init__(self, folder, world, clip):
        self.out = folder / "out"
        self.out.mkdir()
        self.world = world
        self.model = [
            "--dim",
            64,
            "--n_layers",
            2,
            "--n_heads",
            4,
            "--n_kv_heads",
            2,
            "--out_dir",
            self.out,
            "--device",
            "cpu",
        ]
        self.model += ["--vision_path", clip, "--tokenizer_path", "model/demo"]
        self.training = [*self.model, "--batch_size", 8, "--log_interval", 1]

    def data(self, name):
        return ["--data_path", self.world / name, "--images_path", self.world / "images"]

    def pretrain(self, *more, **options):
        return run_python(PRETRAIN, *self.training, *self.data("pretrain.json"), *more, **options)

    def sft(self, name, *more):
        return run_python(SFT, *self.training, *self.data(name), *more)

    def log(self, name):
        lines = [json.loads(line) for line in (self.out / f"{name}.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]


def save_llm(place, tokenizer, **config):
    """A language model's file, as `512_llm.pth` is one: no projector."""
    torch.manual_seed(0)
    sizes = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2)
    model = MiniMindLM(LMConfig(**{**sizes, **config}, **tokenizer_fields(tokenizer)))
    torch.save(model.state_dict(), place.out / f"64{'_moe' if config.get('use_moe') else ''}_llm.pth")


def make_place(folder, world, tokenizer):
    """A place with a language model to start from. In each of them the same training gives the same weights."""
    place = Place(folder, world, save_clip(folder / "tiny_clip"))
    save_llm(place, tokenizer)
    return place


SETTINGS = ["--log_interval", 1, "--save_interval", 3, "--epochs", 3, "--learning_rate", 1e-3]  # 18 steps of 8 samples
TORCHRUN = ["-m", "torch.distributed.run"]


def begin(place, *flags, launcher=(), limit=None, env=None):
    """Starts stage 1 in the background."""
    import resource  # there is none on Windows, where the other tests run

    def prepare():
        heed_interrupts()
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, *launcher, PRETRAIN, *place.training, *place.data("pretrain.json"), *SETTINGS, *flags]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(env or {})},
        preexec_fn=prepare,  # noqa: PLW1509  no thread of the test runs while this does
        start_new_session=True,
    )


def finish(process):
    """Its exit code and all it printed."""
    text, _ = process.communicate(timeout=300)
    return process.returncode, text


def until(process, step):
    """Waits until a run has logged this step; what it printed until then."""
    guard = threading.Timer(300, os.killpg, [process.pid, signal.SIGKILL])  # a run that stands still
    guard.start()
    seen = ""
    try:
        for line in process.stdout:
            seen += line
            if line.startswith(f"step {step}/"):
                return seen
    finally:
        guard.cancel()
    raise AssertionError(f"ended before step {step}: {seen}")


def attempt(place, *flags, launcher=(), limit=None, env=None):
    """Stage 1 from its beginning to its end: its exit code and all it printed."""
    if launcher or limit:
        return finish(begin(place, *flags, launcher=launcher, limit=limit, env=env))
    code, out, err = place.pretrain(*SETTINGS, *flags, **(env or {}))
    return code, out + err


def run_whole(place, *flags, **more):
    code, text = attempt(place, *flags, **more)
    assert code == 0, text
    return text


def losses(place):
    return {line["step"]: line["loss"] for line in place.log("64_vlm_pretrain")}


def digest(place):
    return hashlib.sha256((place.out / "64_vlm_pretrain.pth").read_bytes()).hexdigest()


def log_lines(place):
    text = (place.out / "64_vlm_pretrain.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@contextlib.contextmanager
def serving(app):
    """The application on a real server: its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()


def data_url(path):
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture_url(image, kind="png"):
    """A Pillow image as a data: URL."""
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def question(text, *urls):
    return [{"role": "user", "content": [*(part(url) for url in urls), {"type": "text", "text": text}]}]


def ask(client, **body):
    return client.post("/v1/chat/completions", json=body)


class RawClient:
    """A raw connection that sends a request and can hang up at any moment; if `slow`, it withholds the last bytes."""

    def __init__(self, address, slow=False, path="/v1/chat/completions", **body):
        host, port = address.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data[: -5 if slow else None])

    def read_pieces(self, count):
        seen = b""
        while seen.count(b'"content"') < count + 1:  # the first event's is empty
            seen += self.socket.recv(65536)

    def hang_up(self):
        self.socket.close()


def eventually(condition):
    limit = time.time() + 10
    while not condition():
        assert time.time() < limit
        time.sleep(0.01)


def animated(path, pictures, **options):
    if path.suffix in (".webp", ".avif"):
        options |= {"lossless": True} if path.suffix == ".webp" else {"quality": 100}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path


def video(path, pictures, codec, rotation=0, times=None):
    """times: of each picture, in milliseconds; ten a second otherwise."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30 if times else 10)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# of Chromium
FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
