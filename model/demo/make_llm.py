"""Makes the demo's language model, the counterpart of the published `512_llm.pth`: a small MiniMind trained on text only.

    python -m model.demo.make_llm --minutes 3.2 --batch_size 512 --num_workers 6 --learning_rate 3e-3    # on an H100

Where a picture will stand later, it reads a scene described in words. It learns to answer the demo's questions about the
scene, to retell it, and to name the change from one description to another. Held-out scenes are not among its texts. It
prints its exact-match score on held-out scenes during training, and writes model/demo/192_llm.pth (float16).
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer

from dataset.dataset import collate
from dataset.demo import scenes, sentences
from model.arguments import COUNT, COUNT_OR_NONE, LEARNING_RATE, MINUTES, SEED, THREADS
from model.checkpoint import provenance, write_weights
from model.conversation import encode_conversations
from model.errors import run_script
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.training.graphs import GraphedForwardBackward

FOLDER = Path(__file__).parent
SIZES = {"dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 3, "multiple_of": 64}

# Words that stand between what is asked about and what is said about it. So small a model doesn't learn to look beyond them
# if they are there from the start: it begins with telegrams ("左上角红色", "top left red"), and the gap grows slowly.
FILLERS = re.compile(r"的图形|的|是|图中|，图中|了|一个|\b([Tt]he|an?|is|at|on|in|shape|[Tt]here|are) ?")
GAP_TIME = 0.4  # of the training, until no filler is left out


def with_few_fillers(text, rng, chance):
    """The text without fillers, each left out with this chance."""
    return FILLERS.sub(lambda match: "" if rng.random() < chance else match[0], text) if chance else text


def about_one_scene(rng, split, turns, progress):
    """[(question, answer), ...] about a scene in words, easier at the beginning of training (`progress` from 0 to 1).

    Easy ones give the scene as pairs of words, and most only retell it: a question trains one word to look up, a retelling
    every word of the scene.
    """
    easy = rng.random() < 1 - 4 * progress
    counts = (2, 2, 3) if easy else scenes.COUNTS
    scene = scenes.random_scene(rng, split, counts)
    described = rng.choice(list(sentences.LANGUAGES.values()))
    form = "pairs" if easy else rng.choice(sentences.FORMS)
    if rng.random() < (0.6 if easy else 0.1):  # in the same or the other language
        retelling = rng.choice(list(sentences.LANGUAGES.values()))
        pairs = [sentences.question(retelling, scene, rng, "caption")]
    else:
        pairs = sentences.questions(scene, rng, turns)
    pairs[0] = (f"{sentences.scene_in_words(described, scene, rng, form)}\n{pairs[0][0]}", pairs[0][1])
    return pairs


def about_a_change(rng, split, progress):
    """[(question, answer)] about two scenes in words; at the beginning of training, the two in the same form."""
    scene, change = scenes.changed_scene(rng, split, (1, 2) if rng.random() < 1 - 2 * progress else scenes.COUNTS)
    language, described = (rng.choice(list(sentences.LANGUAGES.values())) for _ in range(2))
    forms = [rng.choice(["places", "places", *sentences.FORMS])] * 2
    if rng.random() < progress - 0.3:
        forms[1] = rng.choice(sentences.FORMS)
    texts = [
        sentences.scene_in_words(described, s, rng, f) for s, f in zip((scene, change.apply(scene)), forms, strict=True)
    ]
    asked = rng.choice(language.questions[rng.choice(["change", "animation"])])
    return [("\n".join([*texts, asked]), sentences.change_in_words(language, change))]


def as_turns(pairs):
    """[(question, answer), ...] -> turns of a conversation."""
    return [turn for asked, answer in pairs for turn in (("user", asked), ("assistant", answer))]


class Conversations(IterableDataset):
    """Batches of conversations without end. What is easy and what is left out follows the clock."""

    def __init__(self, tokenizer, config, args):
        self.tokenizer, self.config, self.args = tokenizer, config, args
        self.begun = time.time()

    def progress(self):
        return (time.time() - self.begun) / (60 * self.args.minutes)

    def conversation(self, rng):
        progress = self.progress()
        if progress > 0.1 and rng.random() < 0.3:
            pairs = about_a_change(rng, "train", progress)
        else:
            pairs = about_one_scene(rng, "train", self.args.turns, progress)
        chance = max(0, 1 - progress / GAP_TIME)
        return as_turns((asked, with_few_fillers(answer, rng, chance)) for asked, answer in pairs)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.args.seed} {worker and worker.id}")
        while True:
            yield batch_of(self.tokenizer, self.config, [self.conversation(rng) for _ in range(self.args.batch_size)])


def batch_of(tokenizer, config, talks):
    """Conversations -> input_ids, labels (B, T) and label_positions (L,)."""
    encoded = encode_conversations(tokenizer, talks, config)
    items = []
    for ids, flags in encoded:
        ids = torch.tensor(ids)
        labels = torch.where(torch.tensor(flags), ids, -100)
        items.append({"input_ids": ids.numpy(), "labels": labels.numpy(), "pixel_values": [], "problems": []})
    batch = collate(items, few_shapes=True)
    return {name: batch[name] for name in ("input_ids", "labels", "label_positions")}


@torch.no_grad()
def score(model, tokenizer, split, count=100):
    """Share of single questions about scenes in words whose answer is exactly right, per kind (teacher forced, argmax)."""
    rng = random.Random(5)
    talks, kinds = [], []
    for _ in range(count):
        scene = scenes.random_scene(rng, split)
        for name, language in sentences.LANGUAGES.items():
            described = rng.choice(list(sentences.LANGUAGES.values()))
            for kind in sentences.QUESTIONS:
                pair = sentences.question(language, scene, rng, kind)
                if pair:
                    text = sentences.scene_in_words(described, scene, rng, rng.choice(sentences.FORMS))
                    talks.append(as_turns([(f"{text}\n{pair[0]}", pair[1])]))
                    kinds.append(f"{name} {kind}")
        talks.append(as_turns(about_a_change(rng, "heldout", 1.0)))
        kinds.append("change")
    device = next(model.parameters()).device
    model.eval()
    total, good = Counter(kinds), Counter()
    for begin in range(0, len(talks), 128):
        batch = batch_of(tokenizer, model.config, talks[begin : begin + 128])
        labels = batch["labels"][:, 1:]
        predicted = model(batch["input_ids"].to(device)).logits.argmax(-1)[:, :-1].cpu()
        right = ((predicted == labels) | (labels == -100)).all(dim=1)
        good.update(kind for kind, ok in zip(kinds[begin:], right.tolist(), strict=False) if ok)
    model.train()
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
    chosen = optimizers(model, args)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]

    def forward_backward(batch, answer_tokens):
        # the backward of PyTorch's CPU flash attention is slow in bfloat16: 113 ms a layer against 58
        backends = (
            [SDPBackend.MATH] if args.device == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        )
        with torch.autocast(args.device, torch.bfloat16), sdpa_kernel(backends):
            loss = model(**batch, num_items_in_batch=answer_tokens).loss
        loss.backward()
        return loss.detach()

    if args.device == "cuda":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        forward_backward = GraphedForwardBackward(forward_backward, args.device)
    talks = Conversations(tokenizer, model.config, args)
    loader = DataLoader(talks, batch_size=None, num_workers=args.num_workers)
    average, shown = torch.zeros((), device=args.device), 0.0
    for step, batch in enumerate(loader):
        progress = talks.progress()
        answer_tokens = (batch["labels"] != -100).sum().item()
        batch = {name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()}
        loss = forward_backward(batch, answer_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, max(0, 2 * progress - 1))))
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=args.device == "cpu")
        average.lerp_(loss, 1 if step == 0 else 0.02)
        if progress - shown > 0.1 or progress >= 1:
            shown = progress
            scores = score(model, tokenizer, "heldout")
            print(f"{progress * args.minutes:.1f} min, step {step}, loss {average.item():.4f}, {scores}", flush=True)
            save(model, tokenizer)
        if progress >= 1:
            return


def save(model, tokenizer):
    """Writes the weights in float16."""
    weights = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
    notes = {"stage": "llm", **provenance(model.config, tokenizer)}
    write_weights(FOLDER / f"{model.config.dim}_llm.pth", weights, notes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=MINUTES, default=60)
    parser.add_argument("--batch_size", type=COUNT, default=32)
    parser.add_argument("--turns", type=COUNT, default=4, help="questions about each scene")
    parser.add_argument("--learning_rate", type=LEARNING_RATE, default=2e-3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=COUNT_OR_NONE, default=0, help="processes that write texts ahead")
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
    train(model.to(args.device), tokenizer, args)
    print("unseen", score(model, tokenizer, "unseen"))


if __name__ == "__main__":
    run_script(main)
