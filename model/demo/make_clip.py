"""Makes the demo's CLIP from scratch: a real but small `CLIPModel`, trained contrastively on the demo's pictures.

    python -m model.demo.make_clip --minutes 3.2 --batch_size 512 --num_workers 9             # on an H100, then
    python -m model.demo.make_clip --further --minutes 50 --learning_rate 5e-4 --seed 11      # on two CPU cores

Four losses, the first three of them contrasts of pictures and texts, in Chinese and English:
- whole pictures against whole captions, CLIP's own loss. A batch holds variants of the same scene that differ in one word:
  in plain random batches, colour and place alone would tell the scenes apart;
- things against words: the token of the patch in a thing's middle must find each of its four words ("左上角", "大", "红色",
  "圆形") among the words of that sort (but see `contrasted`). The first loss reaches only the class token; without the second, the last layer's
  patch tokens, which MiniMind-V reads, would forget what they show (the idea is RegionCLIP's, Zhong et al. 2022). Words
  rather than phrases, so that a colour and a shape never seen together are still recognised;
- all other patches against places: they must find "空" rather than a place. So each thing is told by one token, which makes
  things easy to count;
- what a linear layer reads from each patch token, against 1 for the words of the thing in its middle, 0 for all others: the
  projector is linear, too, so what such a layer reads is what the language model can get.

Held-out scenes are not among its pictures. It prints how well a linear probe reads each word from the patch tokens, and writes
model/demo/config.json and model.safetensors (float16). tests/benchmarks/LOG.md has the runs that made the shipped one.
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from dataset.demo import drawing
from dataset.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, UNSEEN_PAIRS, random_change, random_scene, split_of
from dataset.demo.sentences import FIELDS, KEYS, LANGUAGES
from model.arguments import COUNT, COUNT_OR_NONE, LEARNING_RATE, MINUTES, SEED, THREADS, add_switch
from model.conversation import encode
from model.errors import run_script
from model.images import Preprocess, normalise, to_pixels
from model.vision_utils import VisionEncoder

FOLDER = Path(__file__).parent
WIDTH, LAYERS = 192, 6
PREPROCESS = Preprocess(drawing.PICTURE)
NEVER_SHOWN = torch.tensor([[(colour, shape) in UNSEEN_PAIRS for shape in SHAPES] for colour in COLOURS])


def new_clip(vocab_size):
    """An untrained CLIP: patch 32, 224 pixels, so 50 tokens like ViT-B/32."""
    config = CLIPConfig(
        projection_dim=128,
        vision_config=dict(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            image_size=drawing.PICTURE,
            patch_size=32,
        ),
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=80,
            bos_token_id=1,
            eos_token_id=0,  # CLIP pools at the first eos token: here the first padding after the text
            pad_token_id=0,
        ),
    )
    clip = CLIPModel(config)
    # with the usual 0.02, patch embeddings would swamp the position embeddings, and tokens forget where they are
    torch.nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.5)
    return clip


def batch_of_scenes(rng, size):
    """`size` different scenes, in groups of one and up to three variants of it that differ in one word.

    Things of some groups have colours, or shapes, that have no name, so that shapes are recognised in any colour, and
    colours on any shape.
    """
    scenes = {}  # an ordered set
    while len(scenes) < size:
        scene, kinds = random_scene(rng), {"shape": "reshape", "size": "resize", "place": "move", "colour": "recolour"}
        (nameless,) = rng.choices([None, "colour", "shape"], [0.4, 0.4, 0.2])
        if nameless:
            scene = tuple(thing._replace(**{nameless: None}) for thing in scene)
            del kinds[nameless]
        scenes[scene] = None
        for _ in range(3):
            variant = random_change(scene, rng, list(kinds.values())).apply(scene)
            if split_of(variant) == "train" and len(scenes) < size:
                scenes[variant] = None
    return list(scenes)


def patch_of(look):
    """Index of the patch token in a thing's middle; token 0 is the class token."""
    return 1 + int(look.y) // 32 * 7 + int(look.x) // 32


def padded(tokenizer, texts):
    """Texts -> token ids (n, T), with at least one 0 after each."""
    ids = encode(tokenizer, texts)
    input_ids = torch.zeros(len(ids), max(map(len, ids)) + 1, dtype=torch.long)
    for row, one in enumerate(ids):
        input_ids[row, : len(one)] = torch.tensor(one)
    return input_ids


def drawn(scenes, rng):
    """Pictures of scenes and the things on them: pixels (B, 3, 224, 224), picture, patch and words (4) of each thing."""
    pixels, rows, patches, words = [], [], [], []
    for row, scene in enumerate(scenes):
        looks = drawing.random_looks(scene, rng)
        paper = drawing.random_paper(rng, drawing.tones(looks))
        pixels.append(to_pixels(drawing.paint(looks, paper, smooth=rng.random() < 0.7), PREPROCESS))
        for thing, look in looks.items():
            rows.append(row)
            patches.append(patch_of(look))
            words.append(
                [known.index(word) if word else -100 for known, word in zip(FIELDS.values(), thing, strict=True)]
            )
    return torch.stack(pixels), torch.tensor(rows), torch.tensor(patches), torch.tensor(words)


class Pictures(IterableDataset):
    """Batches without end: what `drawn` returns, and the captions' token ids (B, T)."""

    def __init__(self, tokenizer, batch_size, seed):
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {worker and worker.id}")
        while True:
            scenes = batch_of_scenes(rng, self.batch_size)
            captions = [rng.choice(list(LANGUAGES.values())).caption(scene) for scene in scenes]
            yield *drawn(scenes, rng), padded(self.tokenizer, captions)


def contrast(a, b, scale):
    """CLIP's loss on matching rows of a and b (n, d) (Radford et al. 2021)."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def text_vectors(clip, input_ids):
    """Token ids (n, T) -> (n, projection_dim), before normalising."""
    return clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output)


def contrasted(words):
    """Which of all words things' own are contrasted with, (n, 25): all, but for those that training never shows with them.

    As there is no green star, green things are not contrasted with "star", nor stars with "green". Else the encoder would
    learn that what is green is no star, and wouldn't see the first green star. words: (n, 4), as `drawn` makes them.
    """
    # -100, for what has no name, becomes -1: the row added here, where nothing is left out
    never = F.pad(NEVER_SHOWN.to(words.device), (0, 1, 0, 1))
    colours, shapes = words.clamp(min=-1)[:, 2:].T
    others = never.new_zeros(len(words), len(PLACES) + len(SIZES))
    return ~torch.cat([others, never.T[shapes, :-1], never[colours, :-1]], 1)


def reading_loss(read, rows, patches, words):
    """Squared errors of what a linear layer reads from the tokens, (B, 50, words + 1), of things and of other patches.

    It should read 1 for each word of a thing and 0 for the others that it is contrasted with; where no thing has its middle,
    the last, "nothing". What has no name isn't asked for.
    """
    fields = list(zip(words.T, map(len, FIELDS.values()), strict=True))
    wanted, asked = torch.zeros_like(read), torch.ones_like(read)
    wanted[..., -1] = 1.0
    of_things = torch.cat([F.one_hot(own.clamp(min=0), n) for own, n in fields], 1)  # (things, words)
    named = torch.cat([(own >= 0)[:, None].expand(-1, n) for own, n in fields], 1)
    wanted[rows, patches] = F.pad(of_things, (0, 1)).float()
    asked[rows, patches] = F.pad(named & contrasted(words), (0, 1), value=True).float()
    errors = (asked * (read - wanted).square()).sum(-1)[:, 1:]  # (B, 49), without the class token
    of_a_thing = torch.zeros_like(errors, dtype=torch.bool)
    of_a_thing[rows, patches - 1] = True
    return (errors * of_a_thing).sum() / of_a_thing.sum() + (errors * ~of_a_thing).sum() / (~of_a_thing).sum()


def step_loss(clip, reader, word_ids, pixels, rows, patches, words, captions):
    """The losses (pictures against captions, things against words, empty patches against places, words read) of a batch.

    reader: a linear layer from a token to the words; word_ids: token ids of a language's words and of its word for nothing,
    (n, T) for each language; the rest as `Pictures` makes it, pixels normalised.
    """
    output = clip.vision_model(pixels)
    scale = clip.logit_scale.exp().clamp(max=100)

    # whole pictures against whole captions
    picture_loss = contrast(clip.visual_projection(output.pooler_output), text_vectors(clip, captions), scale)

    # all tokens, and those of the patches in the middle of things
    tokens = clip.vision_model.post_layernorm(output.last_hidden_state)
    tokens = F.normalize(clip.visual_projection(tokens), dim=-1)  # (B, 50, projection_dim)
    things = tokens[rows, patches]

    # things against the words of each sort: place, size, colour, shape; the other patches against places and nothing
    places = torch.full(tokens.shape[:2], len(PLACES), device=pixels.device)  # "nothing" comes after the places
    places[:, 0] = places[rows, patches] = -100
    named = (words >= 0).sum(dim=0).clamp(min=1)  # things with a word of each sort; a small batch may name no colour
    counts = [*map(len, FIELDS.values())]
    others = [*contrasted(words).split(counts, dim=1)]
    others[0] = F.pad(others[0], (0, 1), value=True)  # places are contrasted with nothing, too
    word_loss = empty_loss = 0.0
    for input_ids in word_ids:
        *vectors, nothing = F.normalize(text_vectors(clip, input_ids), dim=-1).split([*counts, 1])
        vectors[0] = torch.cat([vectors[0], nothing])
        for field, own in enumerate(vectors):
            logits = (scale * things @ own.T).masked_fill(~others[field], -torch.inf)
            losses = F.cross_entropy(logits, words[:, field], reduction="sum")
            word_loss = word_loss + losses / named[field]
        logits = scale * tokens @ vectors[0].T  # (B, 50, places + 1)
        empty_loss = empty_loss + F.cross_entropy(logits.flatten(0, 1), places.flatten())

    read_loss = reading_loss(reader(output.last_hidden_state).float(), rows, patches, words)
    return picture_loss, word_loss / len(word_ids), empty_loss / len(word_ids), read_loss


@torch.no_grad()
def features_of(encoder, rng, split, count):
    """Patch tokens in the middle of things, and the numbers of their words: (n, V) and (n, 4), on the CPU."""
    vectors, things = [], []
    for _ in range(0, count, 100):
        pixels, rows, patches, words = drawn([random_scene(rng, split) for _ in range(min(count, 100))], rng)
        vectors.append(encoder(pixels).float().cpu()[rows, patches])
        things.append(words)
    return torch.cat(vectors), torch.cat(things)


def probe(encoder, seen=1500, tested=300):
    """Accuracy of a linear probe (ridge regression) on the patch tokens, per word, on held-out and unseen things."""
    rng = random.Random(3)
    x, things = features_of(encoder, rng, "train", seen)
    mean, std = x.mean(0), x.std(0)
    x = F.pad((x - mean) / std, (0, 1), value=1.0)
    result = {}
    for split in ("heldout", "unseen"):
        test_x, test_things = features_of(encoder, rng, split, tested)
        test_x = F.pad((test_x - mean) / std, (0, 1), value=1.0)
        for field, known in enumerate(FIELDS.values()):
            target = F.one_hot(things[:, field], len(known)).float()
            weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ target)
            right = (test_x @ weights).argmax(1) == test_things[:, field]
            result[f"{known[0]} {split}"] = round(right.float().mean().item(), 3)
    return result


def save(clip):
    """Writes a copy in float16."""
    half = CLIPModel(clip.config).half()
    half.load_state_dict(clip.state_dict())
    half.save_pretrained(FOLDER)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=MINUTES, default=120)
    parser.add_argument("--batch_size", type=COUNT, default=128)
    parser.add_argument("--learning_rate", type=LEARNING_RATE, default=1e-3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=COUNT_OR_NONE, default=0, help="processes that draw ahead")
    parser.add_argument("--threads", type=THREADS, default=2)
    parser.add_argument("--seed", type=SEED, default=0)
    add_switch(parser, "--further", help="train the one that is there further, with another --seed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    clip = CLIPModel.from_pretrained(FOLDER).float() if args.further else new_clip(len(tokenizer))
    clip = clip.to(args.device)
    encoder = VisionEncoder(clip.vision_model, args.device)  # to probe it
    clip.train().requires_grad_(True)  # the encoder froze it
    reader = torch.nn.Linear(WIDTH, len(KEYS) + 1).to(args.device)  # used in training only
    parameters = [*clip.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.05, fused=True)
    word_ids = [
        padded(tokenizer, [*(language.words[word] for word in KEYS), language.nothing.strip()]).to(args.device)
        for language in LANGUAGES.values()
    ]
    loader = DataLoader(Pictures(tokenizer, args.batch_size, args.seed), batch_size=None, num_workers=args.num_workers)
    print(sum(p.numel() for p in clip.parameters()), "parameters")
    begun, shown = time.time(), 0.0
    for step, batch in enumerate(loader):
        progress = (time.time() - begun) / (60 * args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 200) * max(0, 1 - progress)
        pixels, *rest = (tensor.to(args.device, non_blocking=True) for tensor in batch)
        pixels = normalise(pixels, *PREPROCESS.statistics(args.device))
        # noise, as a camera's or a JPEG's
        pixels = pixels + 0.1 * torch.rand(len(pixels), 1, 1, 1, device=args.device) * torch.randn_like(pixels)
        with torch.autocast(args.device, torch.bfloat16):
            picture_loss, word_loss, empty_loss, read_loss = step_loss(clip, reader, word_ids, pixels, *rest)
        (picture_loss + word_loss + empty_loss + read_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress - shown > 0.2 or progress >= 1:
            shown = progress
            losses = f"pictures {picture_loss:.3f}, words {word_loss:.3f}, empty {empty_loss:.4f}, read {read_loss:.3f}"
            print(f"{progress * args.minutes:.1f} min, step {step}, {losses}", probe(encoder), flush=True)
            save(clip)
        if progress >= 1:
            return


if __name__ == "__main__":
    run_script(main)
