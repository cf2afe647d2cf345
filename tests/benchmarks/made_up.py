"""Files of the sizes of the real ones, made up: what the benchmarks here run on, and the roofs they are measured against.

A random ViT-B/32 (transformers' default CLIP vision config, 87M parameters), a tokenizer of 6,400 tokens, drawn JPEGs of
128x128, and records of as many tokens as the published data's.
"""

import json
import random
import resource
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from dataset.demo.drawing import draw
from dataset.demo.scenes import random_scene
from dataset.records import make_record
from model.conversation import encode
from model.model_vlm import MiniMindVLM


def words(rng, count):
    return [
        "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
        for _ in range(count)
    ]


def make_files(folder, pictures, stage="pretrain", clip=None):
    """CLIP, tokenizer, pictures and a record for each of them in `data.json`, in the layout of the real ones.

    clip: the encoder's config, a ViT-B/32's if None.
    """
    CLIPVisionModel(clip or CLIPVisionConfig()).save_pretrained(folder / "clip")
    tokenizer = make_tokenizer(folder / "tokenizer")
    rng = random.Random(0)
    (folder / "images").mkdir()
    for i in range(pictures):
        draw(random_scene(rng), rng).resize((128, 128)).save(folder / "images" / f"{i}.jpg", quality=90)
    make_records(folder / "data.json", tokenizer, stage, [f"{i}.jpg" for i in range(pictures)])


def make_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=6400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(random.Random(0), 40000), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


@torch.no_grad()
def make_model(config):
    """A random `MiniMindVLM`, its matrices three times as large as fresh ones.

    Fresh ones find the token that they have just read the likeliest, over and over, whatever the engine gets wrong.
    """
    model = MiniMindVLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(3)
    return model


def make_records(file, tokenizer, stage, pictures, repeat=1):
    """A record for each picture, the whole list `repeat` times over.

    Records of "pretrain" have 80 to 110 tokens, the picture's 50 among them, those of "sft" 100 to 400, in up to 4 turns.
    """
    rng = random.Random(0)

    def text(tokens):
        """Words of about so many tokens."""
        said = words(rng, tokens)
        lengths = [len(ids) for ids in encode(tokenizer, said)]
        while sum(lengths) > tokens:
            lengths.pop()
        return "".join(said[: len(lengths)])

    records = []
    for picture in pictures:
        if stage == "pretrain":
            turns = [(f"{text(5)}\n<image>", text(rng.randint(12, 42)))]
        else:
            tokens = rng.randint(35, 335)
            count = min(4, 1 + tokens // 80)
            turns = [(text(15), text(max(8, tokens // count - 15))) for _ in range(count)]
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        records.append(make_record([picture], turns))
    file.write_text(json.dumps(records * repeat))


def roofs(device, dtype):
    """What this machine can do at best: (FLOP/s of a product of 4,096 x 4,096 matrices, bytes/s of a copy of 256 MB)."""
    a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.ones(2**28, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * 4096**3 / fastest(lambda: a @ b, device), 2 * 2**28 / fastest(lambda: target.copy_(source), device)


def fastest(work, device, times=5):
    """The least of several times, in seconds, after one to warm up."""
    seconds = []
    for _ in range(times + 1):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def synchronize(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(device):
    """The most that was in use so far, in bytes: of the GPU by PyTorch, of a CPU by the whole process."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device):
    return (
        torch.cuda.get_device_name(device)
        if str(device).startswith("cuda")
        else f"cpu, {torch.get_num_threads()} threads"
    )
