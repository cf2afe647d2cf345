"""Makes the demo's CLIP from scratch: a real but small `CLIPModel`, trained contrastively on the demo's pictures.

    python -m model.demo.make_clip --minutes 30

Two losses, both contrasts of pictures and texts:
- whole pictures against whole captions, CLIP's own loss. A batch holds variants of the same scene that differ in one word:
  in plain random batches, colour and place alone would tell the scenes apart;
- things against words: the token of the patch in a thing's middle must find each of its four words ("左上角", "大", "红色",
  "圆形") among all words of that sort. The first loss reaches only the class token; without the second, the last layer's
  patch tokens, which MiniMind-V reads, would forget what they show (the idea is RegionCLIP's, Zhong et al. 2022). Words
  rather than phrases, so that a colour and a shape never seen together are still recognised.

Held-out scenes are not among its pictures. It prints how well a linear probe reads each word from the patch tokens, and writes
model/demo/config.json and model.safetensors (float16).
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from dataset import demo
from model.arguments import COUNT, LEARNING_RATE, MINUTES, SEED, THREADS
from model.conversation import encode
from model.errors import run_script
from model.images import Preprocess, normalise, to_pixels
from model.vision_utils import VisionEncoder

FOLDER = Path(__file__).parent
WIDTH, LAYERS = 128, 4
WORDS = [list(demo.PLACES), list(demo.SIZES), list(demo.COLOURS), demo.SHAPES]  # in the order of a Thing's fields
PREPROCESS = Preprocess(demo.PICTURE)


def new_clip(vocab_size):
    """An untrained CLIP: patch 32, 224 pixels, so 50 tokens like ViT-B/32."""
    config = CLIPConfig(
        projection_dim=96,
        vision_config=dict(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            image_size=demo.PICTURE,
            patch_size=32,
        ),
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=0,  # CLIP pools at the first eos token: here the first padding after the text
            pad_token_id=0,
        ),
    )
    clip = CLIPModel(config)
    # with the usual 0.02, patch embeddings would swamp the position embeddings, and tokens forget where they are
    torch.nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.5)
    return clip


def variant(scene, rng):
    """The scene with one word of one thing changed; None if the result is not in the training split."""
    i = rng.randrange(len(scene))
    thing = scene[i]
    word = rng.choice(["colour", "shape", "size", "place"])
    if word == "place":
        free = [place for place in demo.PLACES if not demo.only(scene, place=place)]
        new = thing._replace(place=rng.choice(free))
    elif word == "size":
        new = thing._replace(size="小" if thing.size == "大" else "大")
    elif word == "colour":
        new = thing._replace(colour=rng.choice(list(demo.COLOURS)))
    else:
        new = thing._replace(shape=rng.choice(demo.SHAPES))
    other = tuple(sorted((*scene[:i], new, *scene[i + 1 :]), key=lambda t: list(demo.PLACES).index(t.place)))
    return other if other != scene and demo.split_of(other) == "train" else None


def batch_of_scenes(rng, size):
    """`size` different scenes, in groups of one and up to three variants of it."""
    scenes = {}  # an ordered set
    while len(scenes) < size:
        scene = demo.random_scene(rng)
        scenes[scene] = None
        for _ in range(3):
            other = variant(scene, rng)
            if other and len(scenes) < size:
                scenes[other] = None
    return list(scenes)


def plain_caption(scene):
    return "；".join("".join(thing) for thing in scene)


def patch_of(thing):
    """Index of the patch token at a thing's place; token 0 is the class token."""
    x, y = demo.PLACES[thing.place]
    return 1 + y // 32 * 7 + x // 32


def numbers(things, field):
    """Index of each thing's word among the words of this field: (n,)."""
    return torch.tensor([WORDS[field].index(thing[field]) for thing in things])


def contrast(a, b, scale):
    """CLIP's loss on matching rows of a and b (n, d) (Radford et al. 2021)."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def text_vectors(clip, tokenizer, texts):
    """(n, projection_dim), before normalising."""
    ids = encode(tokenizer, texts)
    width = max(len(one) for one in ids) + 1
    input_ids = torch.zeros(len(ids), width, dtype=torch.long)
    for row, one in enumerate(ids):
        input_ids[row, : len(one)] = torch.tensor(one)
    return clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output)


def step_loss(clip, tokenizer, scenes, pixels):
    """Both losses, (pictures against captions, things against words), of a batch of scenes and their normalised pictures."""
    output = clip.vision_model(pixels)
    scale = clip.logit_scale.exp().clamp(max=100)

    # whole pictures against whole captions
    captions = text_vectors(clip, tokenizer, [plain_caption(scene) for scene in scenes])
    picture_loss = contrast(clip.visual_projection(output.pooler_output), captions, scale)

    # the patch token in the middle of each thing
    things = [thing for scene in scenes for thing in scene]
    rows = [row for row, scene in enumerate(scenes) for _ in scene]
    patches = [patch_of(thing) for thing in things]
    tokens = clip.vision_model.post_layernorm(output.last_hidden_state[rows, patches])
    tokens = F.normalize(clip.visual_projection(tokens), dim=-1)  # (things, projection_dim)

    # against the words of each sort: place, size, colour, shape
    vectors = F.normalize(text_vectors(clip, tokenizer, [word for words in WORDS for word in words]), dim=-1)
    word_loss = 0.0
    for field, own in enumerate(vectors.split([len(words) for words in WORDS])):
        word_loss = word_loss + F.cross_entropy(scale * tokens @ own.T, numbers(things, field))
    return picture_loss, word_loss


@torch.no_grad()
def features_of(encoder, rng, split, count):
    """Patch tokens at the places of things, and the things: ((n, V), list)."""
    scenes = [demo.random_scene(rng, split) for _ in range(count)]
    vectors, things = [], []
    for begin in range(0, count, 100):
        part = scenes[begin : begin + 100]
        features = encoder(torch.stack([to_pixels(demo.draw(scene, rng), PREPROCESS) for scene in part]))
        for row, scene in enumerate(part):
            vectors += [features[row, patch_of(thing)] for thing in scene]
            things += scene
    return torch.stack(vectors), things


def probe(clip):
    """Accuracy of a linear probe (least squares) on the patch tokens, per word, on held-out and unseen things."""
    encoder = VisionEncoder(clip.vision_model)
    rng = random.Random(3)
    x, things = features_of(encoder, rng, "train", 1500)
    tests = {split: features_of(encoder, rng, split, 300) for split in ("heldout", "unseen")}
    clip.train().requires_grad_(True)  # the encoder froze it

    # ridge regression on standardised features and a constant
    mean = x.mean(0)
    std = x.std(0)
    x = F.pad((x - mean) / std, (0, 1), value=1.0)
    inverse = torch.linalg.inv(x.T @ x + torch.eye(x.shape[1]))
    result = {}
    for field, words in enumerate(WORDS):
        weights = inverse @ x.T @ F.one_hot(numbers(things, field)).float()
        for split, (test_x, test_things) in tests.items():
            guess = (F.pad((test_x - mean) / std, (0, 1), value=1.0) @ weights).argmax(1)
            result[f"{words[0]} {split}"] = round((guess == numbers(test_things, field)).float().mean().item(), 3)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=MINUTES, default=30)
    parser.add_argument("--batch_size", type=COUNT, default=128)
    parser.add_argument("--learning_rate", type=LEARNING_RATE, default=1e-3)
    parser.add_argument("--threads", type=THREADS, default=2)
    parser.add_argument("--seed", type=SEED, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    clip = new_clip(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.learning_rate, weight_decay=0.05, fused=True)
    print(sum(p.numel() for p in clip.parameters()), "parameters")
    begun, step, shown = time.time(), 0, 0.0
    while (progress := (time.time() - begun) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 200) * (1 - progress)
        scenes = batch_of_scenes(rng, args.batch_size)
        pixels = torch.stack([to_pixels(demo.draw(s, rng), PREPROCESS) for s in scenes])
        pixels = normalise(pixels, *PREPROCESS.statistics())
        with torch.autocast("cpu", torch.bfloat16):
            picture_loss, word_loss = step_loss(clip, tokenizer, scenes, pixels)
        (picture_loss + word_loss).backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if progress - shown > 0.05:
            shown = progress
            minutes = (time.time() - begun) / 60
            losses = f"pictures {picture_loss:.3f}, words {word_loss:.3f}"
            print(f"{minutes:.1f} min, step {step}, {losses}", probe(clip), flush=True)
    print(probe(clip))
    clip.half().save_pretrained(FOLDER)


if __name__ == "__main__":
    run_script(main)
