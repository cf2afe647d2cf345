"""Pretraining at the published size on made-up data: samples/s and peak memory of 1-pretrain_vlm.py, and where the time goes.

    python tests/benchmarks/real_size.py --pictures 300

In a temporary folder it makes a random ViT-B/32 (transformers' default CLIP vision config, 87M parameters), a tokenizer of
6,400 tokens, and drawn pictures of 128x128 with captions of 60 to 120 tokens, runs the script on them in a process of its
own, then times the parts of a step one by one. The last line is JSON.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from dataset import demo
from model.checkpoint import load_tokenizer
from model.dataset import VLMDataset, collate, encode, tokenizer_fields
from model.LMConfig import LMConfig
from model.model_vlm import MiniMindVLM
from model.vision_utils import load_vision


def words(rng, count):
    return [
        "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
        for _ in range(count)
    ]


def make_files(folder, pictures):
    """CLIP, tokenizer, pictures and records, in the layout of the real ones."""
    rng = random.Random(0)
    CLIPVisionModel(CLIPVisionConfig()).save_pretrained(folder / "clip")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=6400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(rng, 40000), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "tokenizer")
    (folder / "images").mkdir()
    records = []
    for i in range(pictures):
        demo.draw(demo.random_scene(rng), rng).resize((128, 128)).save(folder / "images" / f"{i}.jpg", quality=90)
        wanted, text = rng.randint(60, 120), words(rng, 130)
        while len(encode(fast, ["".join(text)])[0]) > wanted:
            text.pop()
        records.append(demo.record([f"{i}.jpg"], [("Describe the picture.\n<image>", "".join(text))]))
    (folder / "data.json").write_text(json.dumps(records))


def run_script(folder, args):
    """1-pretrain_vlm.py from its start to its saved weights: (samples/s of the last log line, seconds, peak MB)."""
    flags = [f"--{name}={folder / value}" for name, value in (("vision_path", "clip"), ("tokenizer_path", "tokenizer"))]
    flags += [
        f"--data_path={folder / 'data.json'}",
        f"--images_path={folder / 'images'}",
        f"--out_dir={folder / 'out'}",
    ]
    flags += ["--from_scratch", f"--batch_size={args.batch_size}", f"--device={args.device}", "--log_interval=5"]
    begun = time.time()
    output = subprocess.run(
        [sys.executable, "1-pretrain_vlm.py", *flags], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    rates = [float(rate) for rate in re.findall(r"samples/s ([\d.]+)", output)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return sum(rates) / len(rates), time.time() - begun, peak


def time_parts(folder, args):
    """Mean seconds a batch for data, CLIP, forward and backward with the optimizer's step."""
    tokenizer, encoder = load_tokenizer(folder / "tokenizer"), load_vision(folder / "clip", args.device)
    config = LMConfig(**tokenizer_fields(tokenizer))
    dataset = VLMDataset(folder / "data.json", folder / "images", tokenizer, config, 512, encoder.image_size)
    model = MiniMindVLM(config).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds, tokens, batches = dict.fromkeys(("data", "clip", "forward", "backward", "optimizer"), 0.0), 0, 6

    def lap(name, begun):
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds[name] += time.time() - begun
        return time.time()

    for number in range(-1, batches):  # the first warms up
        if number == 0:
            seconds = dict.fromkeys(seconds, 0.0)
        at = time.time()
        items = [dataset[i % len(dataset)] for i in range(number * args.batch_size, (number + 1) * args.batch_size)]
        batch = {name: value.to(args.device) for name, value in collate(items).items()}
        at = lap("data", at)
        features = encoder(batch["pixel_values"])
        at = lap("clip", at)
        loss = model(batch["input_ids"], features, labels=batch["labels"]).loss
        at = lap("forward", at)
        loss.backward()
        at = lap("backward", at)
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer", at)
        tokens = max(tokens, batch["input_ids"].shape[1])
    return {name: round(value / batches, 3) for name, value in seconds.items()}, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, args.pictures)
        rate, wall, peak = run_script(folder, args)
        parts, tokens = time_parts(folder, args)
    result = {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "config": "512+8, ViT-B/32 at 224, float32" if args.device == "cpu" else "512+8, ViT-B/32 at 224",
        "batch_size": args.batch_size,
        "longest_batch_tokens": tokens,
        "samples_per_s": round(rate, 2),
        "script_seconds": round(wall, 1),
        "script_peak_mb": round(peak),
        "seconds_per_batch": parts,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
