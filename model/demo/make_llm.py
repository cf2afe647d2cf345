"""Makes the demo's language model, the counterpart of the published `512_llm.pth`: a small MiniMind trained on text only.

    python -m model.demo.make_llm --minutes 16

Where a picture will stand later, it reads a scene described in words. It learns to answer the demo's questions about the
scene, to retell it, and to name the change from one description to another. Held-out scenes are not among its texts. It
prints its exact-match score on held-out scenes during training, and writes model/demo/192_llm.pth (float16).
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer

from dataset import demo
from model.arguments import COUNT, LEARNING_RATE, MINUTES, SEED, THREADS
from model.checkpoint import provenance, write_weights
from model.conversation import encode_conversations
from model.errors import run_script
from model.LMConfig import LMConfig
from model.model import MiniMindLM

FOLDER = Path(__file__).parent
SIZES = {"dim": 192, "n_layers": 4, "n_heads": 6, "n_kv_heads": 3, "multiple_of": 64}


def conversation(rng, split, turns, progress):
    """A conversation about a scene in words, easier at the beginning of training (`progress` from 0 to 1).

    Easy ones give the scene as pairs of words, and most only retell it: a question trains one word to look up, a retelling
    every word of the scene.
    """
    # two scenes, and what changed
    easy = rng.random() < 1 - 3 * progress
    if not easy and rng.random() < 0.12:
        before, after, instruction, _ = demo.scene_pair(rng, split)
        texts = [demo.scene_in_words(scene, rng) for scene in (before, after)]
        return [("user", "\n".join([*texts, rng.choice(demo.PAIR_PROMPTS)])), ("assistant", instruction)]

    # one scene: retell it, or answer questions about it
    scene = demo.random_scene(rng, split, counts=(2, 2, 3) if easy else (1, 2, 3, 4))
    form = "pairs" if easy else None
    if rng.random() < (0.7 if easy else 0.2):
        retold = demo.caption(scene, rng) if rng.random() < 0.7 else demo.scene_in_words(scene, rng, form)
        pairs = [(rng.choice(demo.CAPTION_PROMPTS), retold)]
    else:
        pairs = demo.questions(scene, rng, turns)

    # the scene stands before the first question, as a picture will
    pairs[0] = (f"{demo.scene_in_words(scene, rng, form)}\n{pairs[0][0]}", pairs[0][1])
    return [turn for asked, answer in pairs for turn in (("user", asked), ("assistant", answer))]


def pad(encoded, width=None):
    """Encoded conversations -> input_ids and labels (B, T)."""
    width = width or max(len(ids) for ids, _ in encoded)
    input_ids = torch.zeros(len(encoded), width, dtype=torch.long)
    labels = torch.full((len(encoded), width), -100)
    for row, (ids, flags) in enumerate(encoded):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.where(torch.tensor(flags), input_ids[row, : len(ids)], -100)
    return input_ids, labels


@torch.no_grad()
def score(model, tokenizer, split, count=150):
    """Share of single questions about scenes in words whose answer is exactly right, per kind (teacher forced, argmax)."""
    rng = random.Random(5)
    talks, kinds = [], []
    for _ in range(count):
        scene = demo.random_scene(rng, split)
        for kind in demo.QUESTIONS:
            pair = demo.question(scene, rng, kind)
            if pair:
                talks.append([("user", f"{demo.scene_in_words(scene, rng)}\n{pair[0]}"), ("assistant", pair[1])])
                kinds.append(kind)
        before, after, instruction, _ = demo.scene_pair(rng, "heldout")
        asked = "\n".join([demo.scene_in_words(before, rng), demo.scene_in_words(after, rng), demo.PAIR_PROMPTS[0]])
        talks.append([("user", asked), ("assistant", instruction)])
        kinds.append("pair")
    input_ids, labels = pad(encode_conversations(tokenizer, talks, model.config))
    model.eval()
    predicted = torch.cat([model(part).logits.argmax(-1)[:, :-1] for part in input_ids.split(128)])
    model.train()
    right = ((predicted == labels[:, 1:]) | (labels[:, 1:] == -100)).all(dim=1)
    total = Counter(kinds)
    good = Counter(kind for kind, ok in zip(kinds, right.tolist(), strict=True) if ok)
    return {kind: round(good[kind] / total[kind], 3) for kind in total}


def optimizers(model, args):
    """Muon for the matrices of the layers (Jordan et al. 2024), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("layers.") and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model, tokenizer, args):
    """Trains for `args.minutes`; the learning rate is constant for half of that time, then falls to zero."""
    rng = random.Random(args.seed)
    chosen = optimizers(model, args)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    begun, step, shown, average = time.time(), 0, 0.0, None
    while (progress := (time.time() - begun) / (60 * args.minutes)) < 1:
        talks = [conversation(rng, "train", args.turns, progress) for _ in range(args.batch_size)]
        input_ids, labels = pad(encode_conversations(tokenizer, talks, model.config))
        # the backward of PyTorch's CPU flash attention is slow in bfloat16: 113 ms a layer against 58
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids, labels=labels).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * max(0, 2 * progress - 1)))
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if progress - shown > 0.05:
            shown = progress
            minutes = (time.time() - begun) / 60
            print(
                f"{minutes:.1f} min, step {step}, loss {average:.4f}, {score(model, tokenizer, 'heldout')}", flush=True
            )
            save(model, tokenizer)


def save(model, tokenizer):
    """Writes the weights in float16."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    notes = {"stage": "llm", **provenance(model.config, tokenizer)}
    write_weights(FOLDER / f"{model.config.dim}_llm.pth", weights, notes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=MINUTES, default=16)
    parser.add_argument("--batch_size", type=COUNT, default=32)
    parser.add_argument("--turns", type=COUNT, default=3, help="questions about each scene")
    parser.add_argument("--learning_rate", type=LEARNING_RATE, default=2e-3)
    parser.add_argument("--threads", type=THREADS, default=2)
    parser.add_argument("--seed", type=SEED, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **SIZES)).train()
    with torch.no_grad():  # at this width, a standard deviation of 0.02 makes attention too uniform to learn from
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.07 / 0.02)
    print(sum(p.numel() for p in model.parameters()), "parameters", json.dumps(vars(args)))
    train(model, tokenizer, args)
    print("unseen", score(model, tokenizer, "unseen"))
    save(model, tokenizer)


if __name__ == "__main__":
    run_script(main)
