"""Makes the demo's language model, the counterpart of the published `512_llm.pth`: a small MiniMind trained on text only.

    python -m model.demo.make_llm --minutes 3.2 --batch_size 512 --num_workers 6 --learning_rate 3e-3     # on an H100, then
    python -m model.demo.make_llm --further --minutes 60 --learning_rate 1e-3 --seed 1                    # on two CPU cores

It reads scenes in words, and learns to answer the demo's questions about them, to retell them, and to name the change from
one to another. After the first tenth of the training, one conversation in four describes its scenes in words. The others
have a picture's placeholder, filled as an ideal encoder would: the words of a thing, added up, are the one vector of its
patch. So only the encoder's own vectors are new to it when it gets pictures.

In nine conversations of ten, all colours, all shapes or both have other words, any that the tokenizer has and new ones
each time ("a big weather star"). With its own 14 words it would learn which colours never come with a shape, and not say
"the star is green" whatever it sees, as green stars are held out. With any word in their place it has to say what is there.

Held-out scenes are not among its texts. It prints its exact-match score on them during training, and writes
model/demo/192_llm.pth (float16). tests/benchmarks/LOG.md has the runs that made the one that is shipped.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from copy import copy
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer

from dataset.dataset import collate
from dataset.demo import drawing, scenes, sentences
from model.arguments import COUNT, COUNT_OR_NONE, LEARNING_RATE, MINUTES, SEED, THREADS, add_switch
from model.checkpoint import provenance, read_weights, write_weights
from model.conversation import encode, encode_conversations
from model.errors import run_script
from model.LMConfig import LMConfig
from model.model_vlm import MiniMindVLM
from model.training.graphs import GraphedForwardBackward

from .make_clip import patch_of

FOLDER = Path(__file__).parent
SIZES = {"dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 3, "multiple_of": 64}

# Words that stand between what is asked about and what is said about it. So small a model doesn't learn to look beyond them
# if they are there from the start: it begins with telegrams ("左上角红色", "top left red"), and the gap grows slowly.
FILLERS = re.compile(r"的图形|的|是|图中|，图中|了|一个|\b([Tt]here|[Tt]he|an?|is|at|on|in|shape|are)\b ?")
SHARES = 0.4, 1.6  # of a word in what is added up
NOISE = 0.5  # on that, at most: a part of its standard deviation
GAP_TIME = 0.4  # of the training, until no filler is left out
COINED = 0.9  # of the conversations have other words for colours and shapes


def with_few_fillers(text, rng, chance):
    """The text without fillers, each left out with this chance."""
    return FILLERS.sub(lambda match: "" if rng.random() < chance else match[0], text) if chance else text


@cache
def spare_words(tokenizer):
    """{language: words, and pieces of words, that name nothing here and are one token in place of a colour and a shape}."""
    spare = {}
    words = {tokenizer.decode([token]).strip() for token in range(len(tokenizer))}
    for language in sentences.LANGUAGES.values():
        words -= {
            *language.words.values(),
            *language.numbers,
            language.nothing.strip(),
            language.noun(),
            language.nouns(),
        }
    words -= {"圆", "color", "colour", "coloured"}  # `as_typed` puts some of them in place of others
    words = sorted(word for word in words if word.isalpha() and word == word.lower() and not FILLERS.search(word))
    for code, language in sentences.LANGUAGES.items():
        spare[code] = []
        for word in words:
            named = copy(language)
            named.words = {**language.words, "red": word, "star": word}
            text = named.caption([scenes.Thing("top", "big", "red", "star")])
            (own, *others), found = encode(tokenizer, [language.glue + word, text])
            if not others and found.count(own) == 2:
                spare[code].append(word)
    return spare


def coined(tokenizer, rng):
    """The languages with other words for all colours, all shapes or both, as if the next word would do as well."""
    replaced = rng.choice([scenes.COLOURS, scenes.SHAPES, scenes.COLOURS + scenes.SHAPES])
    languages = {}
    for code, language in sentences.LANGUAGES.items():
        languages[code] = copy(language)
        words = rng.sample(spare_words(tokenizer)[code], len(replaced))
        languages[code].words = {**language.words, **dict(zip(replaced, words, strict=True))}
    return languages


def as_picture(scene, rng, languages):
    """{patch token: a thing's words in all languages} of a scene: where an encoder would tell of each thing."""
    while True:
        things = {patch_of(look): thing for thing, look in drawing.random_looks(scene, rng).items()}
        if len(things) == len(scene):  # no two on the same patch
            return {
                # what stands between words is part of a word's token
                patch: [language.glue + language.words[word] for word in thing for language in languages.values()]
                for patch, thing in things.items()
            }


def about_one_scene(rng, split, turns, progress, in_words, languages):
    """([(question, answer), ...], pictures) about a scene, easier at the beginning of training (`progress` from 0 to 1).

    in_words: whether the scene is described in words; else it is a picture. Easy descriptions are pairs of words, and most
    answers to them only retell the scene: a question trains one word to look up, a retelling every word of the scene.
    """
    easy = rng.random() < 1 - 4 * progress
    counts = (2, 2, 3) if easy else scenes.COUNTS
    scene = scenes.random_scene(rng, split, counts, alike=rng.choice(scenes.ALIKE))
    described = rng.choice(list(languages.values()))
    form = "pairs" if easy else rng.choice(sentences.FORMS)
    if rng.random() < (0.6 if easy else 0.1):  # in the same or the other language
        pairs = [sentences.question(rng.choice(list(languages.values())), scene, rng, "caption")]
    else:
        pairs = sentences.questions(scene, rng, turns, languages=languages)
    text = sentences.scene_in_words(described, scene, rng, form) if in_words else "<image>"
    pairs[0] = (f"{text}\n{pairs[0][0]}", pairs[0][1])
    return pairs, [] if in_words else [as_picture(scene, rng, languages)]


def about_a_change(rng, split, progress, in_words, languages):
    """([(question, answer)], pictures) about two scenes; at the beginning of training, the two in the same form."""
    scene, change = scenes.changed_scene(rng, split, (1, 2) if rng.random() < 1 - 2 * progress else scenes.COUNTS)
    both = scene, change.apply(scene)
    language, described = (rng.choice(list(languages.values())) for _ in range(2))
    forms = [rng.choice(["places", "places", *sentences.FORMS])] * 2
    if rng.random() < progress - 0.3:
        forms[1] = rng.choice(sentences.FORMS)
    texts = ["<image>"] * 2
    if in_words:
        texts = [sentences.scene_in_words(described, s, rng, form) for s, form in zip(both, forms, strict=True)]
    asked = rng.choice(language.questions[rng.choice(["change", "animation"])])
    pairs = [("\n".join([*texts, asked]), sentences.change_in_words(language, change))]
    return pairs, [] if in_words else [as_picture(s, rng, languages) for s in both]


def as_turns(pairs):
    """[(question, answer), ...] -> turns of a conversation."""
    return [turn for asked, answer in pairs for turn in (("user", asked), ("assistant", answer))]


class Conversations(IterableDataset):
    """Batches of conversations without end. What is easy and what is left out follows the clock."""

    def __init__(self, tokenizer, config, args):
        self.tokenizer, self.config, self.args = tokenizer, config, args
        self.begun = time.time()

    def progress(self):
        """From 0 to 1; a model that is trained further is past the easy half."""
        progress = (time.time() - self.begun) / (60 * self.args.minutes)
        return (1 + progress) / 2 if self.args.further else progress

    def conversation(self, rng, number):
        """(turns, pictures) of a batch's conversation with this number; the number decides what it is about."""
        progress = self.progress()
        in_words = progress < 0.1 or number % 4 == 0
        languages = coined(self.tokenizer, rng) if rng.random() < COINED else sentences.LANGUAGES
        if progress > 0.1 and number % 8 < 2:
            pairs, pictures = about_a_change(rng, "train", progress, in_words, languages)
        else:
            pairs, pictures = about_one_scene(rng, "train", self.args.turns, progress, in_words, languages)
        chance = max(0, 1 - progress / GAP_TIME)
        return as_turns((asked, with_few_fillers(answer, rng, chance)) for asked, answer in pairs), pictures

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.args.seed} {worker and worker.id}")
        while True:
            talks = [self.conversation(rng, number) for number in range(self.args.batch_size)]
            yield batch_of(self.tokenizer, self.config, talks)


@cache
def ids_of_word(tokenizer, word):
    (ids,) = encode(tokenizer, [word])
    return ids


def words_on_patches(tokenizer, config, pictures):
    """Pictures as `as_picture` makes them -> token ids of the words at each vector, (N, P, W), filled up with 0."""
    words = torch.zeros(len(pictures), config.image_tokens, 10, dtype=torch.long)
    nothing = [token for language in sentences.LANGUAGES.values() for token in ids_of_word(tokenizer, language.nothing)]
    words[:, 1:, : len(nothing)] = torch.tensor(nothing)  # all but the class token
    for row, things in enumerate(pictures):
        for patch, said in things.items():
            ids = [token for word in said for token in ids_of_word(tokenizer, word)]
            words[row, patch, : len(ids)] = torch.tensor(ids)
    return words


def image_features(model, words):
    """Token ids (N, P, W) -> (N, P, D): at each position its words' embeddings, added up.

    In training more or less of each word, and noise: no encoder is sure, and a sum in which two words are never in the
    same proportion is harder to know by heart than the two words.
    """
    embeddings = model.tok_embeddings.weight.detach()
    shares = torch.ones(words.shape, device=words.device)
    if model.training:
        shares.uniform_(*SHARES)
    features = F.embedding_bag(
        words.flatten(0, 1), embeddings, mode="sum", per_sample_weights=shares.flatten(0, 1), padding_idx=0
    )
    if model.training:
        features = features + NOISE * features.std() * torch.rand_like(features[:, :1]) * torch.randn_like(features)
    return features.unflatten(0, words.shape[:2])


def batch_of(tokenizer, config, talks):
    """Conversations -> input_ids, labels (B, T), label_positions (L,) and the words on their pictures (N, P, W) or None."""
    encoded = encode_conversations(tokenizer, [turns for turns, _ in talks], config)
    items = []
    for ids, flags in encoded:
        ids = torch.tensor(ids)
        labels = torch.where(torch.tensor(flags), ids, -100)
        items.append({"input_ids": ids.numpy(), "labels": labels.numpy(), "pixel_values": [], "problems": []})
    batch = collate(items, few_shapes=True)
    batch = {name: batch[name] for name in ("input_ids", "labels", "label_positions")}
    pictures = [things for _, pictures in talks for things in pictures]
    return {**batch, "words": words_on_patches(tokenizer, config, pictures) if pictures else None}


@torch.no_grad()
def score(model, tokenizer, split, count=100):
    """Share of single questions whose answer is exactly right, per kind (teacher forced, argmax).

    About scenes in words, and as "image" with the words of each thing added up.
    """
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
                    talks.append((as_turns([(f"{text}\n{pair[0]}", pair[1])]), []))
                    picture = as_picture(scene, rng, sentences.LANGUAGES)
                    talks.append((as_turns([(f"<image>\n{pair[0]}", pair[1])]), [picture]))
                    kinds += [f"{name} {kind}", f"image {name} {kind}"]
        for kind, in_words in (("change", True), ("image change", False)):
            pairs, pictures = about_a_change(rng, split, 1.0, in_words, sentences.LANGUAGES)
            talks.append((as_turns(pairs), pictures))
            kinds.append(kind)
    device = next(model.parameters()).device
    model.eval()
    total, good = Counter(kinds), Counter()
    for begin in range(0, len(talks), 128):
        batch = batch_of(tokenizer, model.config, talks[begin : begin + 128])
        labels = batch["labels"][:, 1:]
        features = image_features(model, batch["words"].to(device))
        predicted = model(batch["input_ids"].to(device), features).logits.argmax(-1)[:, :-1].cpu()
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
    """Trains for `args.minutes`; the learning rate is constant for half of that time, then falls to zero.

    With --further it falls from the beginning.
    """
    chosen = optimizers(model, args)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]

    def forward_backward(batch, answer_tokens):
        texts = {name: x for name, x in batch.items() if name != "words"}
        features = None if batch["words"] is None else image_features(model, batch["words"])
        backends = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
        with torch.autocast(args.device, torch.bfloat16), backends:
            loss = model(**texts, image_features=features, num_items_in_batch=answer_tokens).loss
        loss.backward()
        return loss.detach()

    if args.device == "cuda":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        forward_backward = GraphedForwardBackward(forward_backward, args.device)
    talks = Conversations(tokenizer, model.config, args)
    loader = DataLoader(talks, batch_size=None, num_workers=args.num_workers)
    average, shown = torch.zeros((), device=args.device), talks.progress()
    for step, batch in enumerate(loader):
        progress = talks.progress()
        answer_tokens = (batch["labels"] != -100).sum().item()
        batch = {name: None if x is None else x.to(args.device, non_blocking=True) for name, x in batch.items()}
        loss = forward_backward(batch, answer_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, max(0, 2 * progress - 1))))
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=args.device == "cpu")
        average.lerp_(loss, 1 if step == 0 else 0.02)
        if progress - shown > 0.3 or progress >= 1:
            shown = progress
            scores = score(model, tokenizer, "heldout", count=20)
            print(f"{progress:.0%}, step {step}, loss {average.item():.4f}, {scores}", flush=True)
            save(model, tokenizer)
        if progress >= 1:
            return


def text_model(tokenizer):
    """An untrained language model. What stands in a placeholder needs no projector here."""
    model = MiniMindVLM(LMConfig(vocab_size=len(tokenizer), vision_width=SIZES["dim"], **SIZES))
    model.vision_proj = nn.Identity()
    return model


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
    add_switch(parser, "--further", help="train the one that is there further, with another --seed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = text_model(tokenizer).train()
    if args.further:
        model.load_state_dict(read_weights(FOLDER / "192_llm.pth"))
    else:
        with torch.no_grad():  # at this width, a standard deviation of 0.02 makes attention too uniform to learn from
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(0.07 / 0.02)
    print(sum(p.numel() for p in model.parameters()), "parameters", json.dumps(vars(args)))
    train(model.to(args.device), tokenizer, args)
    print("unseen", score(model, tokenizer, "unseen"))


if __name__ == "__main__":
    run_script(main)
