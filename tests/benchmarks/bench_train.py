"""How fast a stage trains at a published size, where a step's time goes, and what share of the machine it uses.

    python tests/benchmarks/bench_train.py                                   # 512+8, captions, on the GPU if there is one
    python tests/benchmarks/bench_train.py --baseline                        # and the same work in the original's manner
    python tests/benchmarks/bench_train.py --beside transformers             # and by transformers' LLaVA
    python tests/benchmarks/bench_train.py --cache_features --stage sft --dim 768 --n_layers 16

In a temporary folder it makes a random ViT-B/32, JPEGs of 128x128 and records of as many tokens as the real ones, then lets
`trainer.Run` itself make steps on them, from the files on disk to the optimizer. The last line is JSON.

FLOPs a sample, counted without padding and recomputation: the language model's and projector's matrices 2 forward and 4
backward per weight and token, with the output matrix for answers only; attention 4 x D per layer, token and token it sees, and
twice that backward; CLIP forward only. The roof is a product of 4,096 x 4,096 matrices in the same precision.

--baseline does what the original did: every sample padded to 512 tokens; one float32 CLIP forward a picture, with pooling and
with the text tower loaded; the placeholder sought by comparing every window of 50 tokens, twice; the loss computed twice over
all positions; AdamW not fused. The language model itself is the same, so that what the baseline lacks is only that.

--beside transformers trains transformers' own LlavaForConditionalGeneration from the same weights on the same batches, step by
step in turns with the trainer, with the same frozen CLIP, AdamW, learning rates and clipping of gradients, so that both have the
same losses. In bfloat16 both keep the trained weights in float32 and use autocast. Its batches are made before its time is taken.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from made_up import device_name, make_files, peak_memory, roofs, synchronize  # puts the repository on the path
from transformers import CLIPConfig, CLIPModel
from transformers_llava import Llava

from model.arguments import add_training_arguments, pick_dtype
from model.errors import BadInput, run_script
from model.images import normalise
from model.training.distributed import Processes, Stop
from model.training.feature_cache import open_cache
from model.training.trainer import Run, chunked, prepare


class Laps:
    """Adds up the seconds of calls, by name."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def wrap(self, name, call):
        def timed(*args, **kwargs):
            synchronize(self.device)
            begun = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
            return result

        return timed


def flops(config, encoder, lengths, answers, cached):
    """FLOPs of training on samples of these lengths, with as many answer tokens, one picture each."""
    kv = config.n_kv_heads * config.head_dim
    experts = config.num_experts_per_tok + config.n_shared_experts if config.use_moe else 1  # that a token passes
    layer = config.dim * (2 * config.dim + 2 * kv) + experts * 3 * config.dim * config.hidden_dim
    tokens, pairs = lengths.sum(), (lengths.astype(float) ** 2).sum() / 2  # each token sees half of them on average
    lm = 6 * layer * config.n_layers * tokens + 12 * config.dim * config.n_layers * pairs
    lm += 6 * config.dim * config.vocab_size * answers
    projector = 4 * config.dim * config.vision_width * config.image_tokens * len(lengths)  # no gradient to its input
    clip = encoder.model.config
    weights = 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size
    picture = (
        clip.num_hidden_layers * encoder.image_tokens * (2 * weights + 4 * clip.hidden_size * encoder.image_tokens)
    )
    picture += 2 * encoder.image_tokens * clip.hidden_size * 3 * clip.patch_size**2
    return lm + projector, 0 if cached else picture * len(lengths)


def ours(args, run):
    """(seconds of `args.steps` steps of the trainer, the samples of each of their batches, seconds a step by its parts).

    The parts are taken in steps of their own, as to wait for each of them costs time.
    """
    stop, parts = Stop(quiet=True), run.sampler.micro_batches
    batches = list(run.sampler)[args.warm_up * parts : (args.warm_up + args.steps) * parts]
    steps = chunked(iter(run.loader), parts)
    run.wrapped_model.train()
    run.sampler.begin(0)
    for _ in range(args.warm_up):
        run.train_step(next(steps), stop)
    synchronize(args.device)
    begun = time.perf_counter()
    for _ in range(args.steps):
        run.train_step(next(steps), stop)
    synchronize(args.device)
    seconds = time.perf_counter() - begun
    laps, graphed = Laps(args.device), run.forward_backward
    run.forward_backward = run.eager_forward_backward  # no captured graph, of which no part can be timed
    run.encoder = laps.wrap("clip", run.encoder)
    run.compute_loss = laps.wrap("forward", run.compute_loss)
    run.optimizer_step = laps.wrap("optimizer", run.optimizer_step)
    next_step, train_step = laps.wrap("data", next), laps.wrap("step", run.train_step)
    for _ in range(args.lap_steps):
        train_step(next_step(steps), stop)
    stop.restore()
    run.forward_backward = graphed
    each = {name: spent / args.lap_steps for name, spent in laps.seconds.items()}
    each["forward"] -= each.get("clip", 0.0)  # which is a part of it
    each["backward"] = each.pop("step") - sum(each.values()) + each["data"]
    return seconds, batches, each


def original(args, model, encoder, dataset, batches):
    """Seconds of the same batches in the original's manner."""
    config, device = model.config, args.device
    clip = CLIPModel(CLIPConfig(vision_config=encoder.model.config.to_dict())).eval().requires_grad_(False).to(device)
    seen = {}
    clip.vision_model.encoder.register_forward_hook(lambda *call: seen.update(features=call[2].last_hidden_state))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, foreach=False)
    image, width = torch.tensor(config.image_ids, device=device), config.image_tokens
    dtype = pick_dtype(args.dtype, device)

    def step(numbers):
        input_ids = torch.zeros(len(numbers), 512, dtype=torch.long)
        labels = torch.full((len(numbers), 512), -100)
        pictures = []
        for row, number in enumerate(numbers):
            item = dataset[number]
            input_ids[row, : len(item["input_ids"])] = torch.from_numpy(item["input_ids"])
            labels[row, : len(item["labels"])] = torch.from_numpy(item["labels"])
            pictures.append(
                normalise(dataset.read_pixels(dataset.image_rows[number][0])[None], *encoder.preprocess.statistics())
            )
        input_ids, labels = input_ids.to(device), labels.to(device)
        features = []
        with torch.no_grad():
            for picture in pictures:
                clip.get_image_features(pixel_values=picture.to(device))
                features.append(seen["features"])
        for _ in range(2):
            for row in input_ids:
                for begin in range(len(row) - width + 1):
                    torch.equal(row[begin : begin + width], image)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            model.eval()  # logits of all positions
            logits = model(input_ids, image_features=torch.cat(features)).logits
            for _ in range(2):
                loss = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
                )
            counted = labels[:, 1:].flatten() != -100
            loss = (loss * counted).sum() / counted.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(batches[0])
    synchronize(device)
    begun = time.perf_counter()
    for batch in batches:
        step(batch)
    synchronize(device)
    return time.perf_counter() - begun


def beside_transformers(args, run):
    """What the same steps cost the trainer and transformers' LLaVA, in turns, and how far their losses differ."""
    llava, stop, laps = Llava(run), Stop(quiet=True), Laps(args.device)
    ours, theirs = laps.wrap("ours", run.train_step), laps.wrap("transformers", llava.train_step)
    steps = chunked(iter(run.loader), run.sampler.micro_batches)
    run.sampler.begin(0)
    run.wrapped_model.train()
    samples, losses = 0, []
    for number in range(args.warm_up + args.steps):
        if number == args.warm_up:
            samples, laps.seconds = 0, {}
        batches = next(steps)
        samples += sum(len(batch["input_ids"]) for batch in batches)
        answer_tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        inputs = [llava.inputs(batch) for batch in batches]
        ours(batches, stop)
        their_loss = theirs(inputs, answer_tokens).item()
        losses.append((run.stats.collect(run.processes)["loss"], their_loss))
    stop.restore()
    return {
        "samples_per_s": {name: round(samples / seconds, 2) for name, seconds in laps.seconds.items()},
        "ratio": round(laps.seconds["transformers"] / laps.seconds["ours"], 2),
        "last_losses": [round(loss, 5) for loss in losses[-1]],
        "largest_loss_difference": float(f"{max(abs(a - b) for a, b in losses):.1e}"),
    }


def measure(args, run, dataset, roof):
    """A dictionary of what a run's steps cost. roof: FLOP/s and bytes/s that this machine can do at best."""
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    encoder = run.encoder
    seconds, batches, each = ours(args, run)
    samples = [i for batch in batches for i in batch]
    lengths = dataset.lengths[samples]
    answers = sum(int(dataset.is_answer[i].sum()) for i in samples)
    padded = sum(len(batch) * -(-dataset.lengths[batch].max() // 8) * 8 for batch in batches)
    lm_flops, clip_flops = flops(run.model.config, encoder, lengths, answers, args.cache_features)
    product, copy = roof
    size = f"of {args.batch_tokens} tokens" if args.batch_tokens else args.batch_size
    return {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "config": f"{args.dim}+{args.n_layers}{' moe' if args.use_moe else ''}, {run.dtype}, {run.stage}, batch {size}",
        "cached": args.cache_features,
        "compiled": args.compile,
        "workers": args.num_workers,
        "samples_per_s": round(len(samples) / seconds, 2),
        "tokens_per_s": round(float(lengths.sum() / seconds)),
        "tokens_per_sample": round(float(lengths.mean()), 1),
        "padding": round(float(1 - lengths.sum() / padded), 3),
        "peak_gb": round(peak_memory(args.device) / 1e9, 2),
        "gflop_per_sample": {
            "lm": round(lm_flops / len(samples) / 1e9, 2),
            "clip": round(clip_flops / len(samples) / 1e9, 2),
        },
        "seconds_per_step": {"all": round(seconds / args.steps, 5)} | {name: round(s, 5) for name, s in each.items()},
        "roof_tflops": round(product / 1e12, 3),
        "copy_gb_per_s": round(copy / 1e9, 1),
        "fraction_of_roof": round((lm_flops + clip_flops) / seconds / product, 3),
    }


def parse(flags=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    parser.add_argument("--stage", choices=["pretrain", "sft"], default="pretrain", help="how long the records are")
    parser.add_argument("--steps", type=int, default=10, help="that are measured")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before them")
    parser.add_argument("--lap_steps", type=int, default=5, help="steps after them, in which each part is timed")
    parser.add_argument("--baseline", action="store_true", help="also do the same work in the original's manner")
    parser.add_argument("--beside", choices=["transformers"], help="also train the same model with another library")
    return parser.parse_args(flags)


def main():
    args = parse()
    is_float16 = pick_dtype(args.dtype, args.device) == torch.float16
    if args.beside and (args.use_moe or args.projector == "mlp" or args.cache_features or is_float16):
        raise BadInput(
            f"--beside {args.beside} compares dense models with a linear projector, from pictures, in float32 or bfloat16: "
            "leave out --use_moe, --projector mlp, --cache_features and --dtype float16"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch_size = args.batch_tokens // 80 if args.batch_tokens else args.batch_size
        steps = args.steps + args.warm_up + args.lap_steps + 1
        make_files(folder, batch_size * args.accumulation_steps * steps, args.stage)
        args.vision_path, args.tokenizer_path = str(folder / "clip"), str(folder / "tokenizer")
        args.data_path, args.images_path, args.out_dir = folder / "data.json", folder / "images", folder / "out"
        processes = Processes(args.device)
        parts, dataset, _ = prepare(args, None, True, None, processes)
        if args.cache_features:
            places = {"folder": folder / "out" / "features", "vision_path": args.vision_path}
            cache = open_cache(dataset, parts.encoder, processes, **places, num_workers=args.num_workers)
            dataset.use_features(cache)
        settings = {
            "args": args,
            "stage": args.stage,
            "processes": processes,
            "parts": parts,
            "dataset": dataset,
            "weights_file": folder / "out" / "weights.pth",
        }
        run = Run(**settings)
        result = measure(args, run, dataset, roofs(args.device, run.dtype))
        if args.baseline:
            batches = list(run.sampler)[: args.steps]
            seconds = original(args, parts.model, parts.encoder, dataset, batches)
            result["baseline_samples_per_s"] = round(sum(map(len, batches)) / seconds, 2)
            result["ratio"] = round(result["samples_per_s"] / result["baseline_samples_per_s"], 2)
        if args.beside:
            result["beside_transformers"] = beside_transformers(args, Run(**settings))  # with an optimizer of its own
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
