"""Everything a GPU is to tell about this repository, in one command of at most 8 minutes on an H100.

    python tests/benchmarks/on_gpu.py                                  # all sections, into out/on_gpu
    python tests/benchmarks/on_gpu.py --sections training decoding     # some of them
    python tests/benchmarks/on_gpu.py --smoke                          # all of them, tiny, on any machine: a test runs this

It needs nothing but this repository and torch, transformers, pillow, numpy and tqdm. Each section is a process of its own with
a time limit, so that one that fails or hangs never stops the next. What is measured is written as it comes:

    rows.jsonl      a JSON object for each measurement, flushed at once
    tables.md       the same as Markdown tables, written again after each section
    SECTION.log     what the section printed, with its traceback if it failed

correctness   logits and 20 training steps against the CPU's in three precisions, generation, experts, waiting for the GPU
training      samples/s of `trainer.Run` from JPEG files, by batch size, model, workers, cache and compiler, and what it takes
decoding      tokens/s at 1, 8 and 64 answers at once, and the time to the first token, with and without a captured graph
memory        of answering, 512+8 and 768+16 with ViT-B/32
demo          the embedded demo's three stages and their scores, by the README's own commands

The last line says which sections failed; the exit code is their number.
"""

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_decode import best, generate, no_end, stream
from bench_train import measure, original, parse
from made_up import ROOT, device_name, make_files, make_model, make_records, roofs, synchronize  # sets sys.path
from transformers import CLIPVisionConfig

from dataset.dataset import VLMDataset, collate
from dataset.demo.world import build
from model.chat import Chat
from model.checkpoint import Parts, load_tokenizer, save_weights
from model.conversation import as_conversation, tokenizer_fields
from model.decoder import Decoder, GraphDecoder
from model.LMConfig import LMConfig
from model.model import can_use_grouped_mm
from model.model_vlm import MiniMindVLM
from model.training.distributed import Processes, Stop
from model.training.feature_cache import open_cache
from model.training.trainer import Run, chunked
from model.vision_utils import load_vision

NO_GRAPHS = "no graphs"  # in place of a flag
LIMITS = {"correctness": 80, "training": 190, "decoding": 60, "memory": 25, "demo": 125}  # seconds, 480 together
RECORDS = {"pretrain": 595_000, "sft": 230_000}  # of the published data
SIZES = {"512+8": {"dim": 512, "n_layers": 8}, "768+16": {"dim": 768, "n_layers": 16}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Bench:
    """What all sections share: made-up files, and where to write rows."""

    def __init__(self, args, folder):
        self.out, self.smoke = args.out, args.smoke
        self.device = "cpu" if args.smoke else "cuda"
        self.sizes = {"64+2": {"dim": 64, "n_layers": 2}} if self.smoke else SIZES
        self.folder = folder
        tiny = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        clip = CLIPVisionConfig(**tiny, image_size=64) if self.smoke else CLIPVisionConfig()
        self.pictures = 24 if self.smoke else 1024
        make_files(folder, self.pictures, clip=clip)
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self.names = [f"{i}.jpg" for i in range(self.pictures)]
        (folder / "out").mkdir()

    def tidy(self):
        """Frees what a measurement has left."""
        gc.collect()
        if not self.smoke:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def row(self, section, **figures):
        with open(self.out / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"section": section, **figures}) + "\n")
        print(section, figures, flush=True)

    def encoder(self, dtype="float32", device=None):
        return load_vision(self.folder / "clip", device or self.device, DTYPES[dtype])

    def config(self, encoder, **sizes):
        vision = {"vision_width": encoder.vision_width, "image_tokens": encoder.image_tokens}
        return LMConfig(**sizes, **vision, **tokenizer_fields(self.tokenizer))

    def dataset(self, stage, encoder, repeat=1):
        """Records of a stage, each of them so many times."""
        file = self.folder / f"{stage}.json"
        make_records(file, self.tokenizer, stage, self.names)
        places = file, self.folder / "images"
        dataset = VLMDataset(*places, self.tokenizer, self.config(encoder), 512, encoder.preprocess, strict=True)
        for column in (dataset.ids, dataset.is_answer, dataset.image_rows):
            lengths = column.offsets.diff().repeat(repeat)
            column.values, column.offsets = column.values.repeat(repeat), F.pad(lengths.cumsum(0), (1, 0))
        dataset.record_numbers = dataset.record_numbers.repeat(repeat)
        return dataset

    def arguments(self, *flags, device=None):
        """The trainer's arguments, with these flags."""
        args = parse([*flags, "--device", device or self.device, "--out_dir", str(self.folder / "out")])
        args.vision_path = self.folder / "clip"
        return args

    def run(self, args, encoder, dataset, **config):
        """A trainer on a random model."""
        processes = Processes(args.device)
        if args.cache_features:
            places = {"folder": self.folder / "out" / "features", "vision_path": args.vision_path}
            cache = open_cache(dataset, encoder, processes, **places, num_workers=args.num_workers)
            dataset.use_features(cache)
        torch.manual_seed(args.seed)
        model = MiniMindVLM(self.config(encoder, dim=args.dim, n_layers=args.n_layers, use_moe=args.use_moe, **config))
        return Run(
            args=args,
            stage=args.stage,
            processes=processes,
            parts=Parts(model.to(args.device), encoder, self.tokenizer, {}, ""),
            dataset=dataset,
            weights_file=self.folder / "out" / "weights.pth",
        )

    def chat(self, dtype, **sizes):
        """A random model that answers."""
        encoder = self.encoder(device="cpu")
        torch.manual_seed(0)
        model = make_model(self.config(encoder, **sizes))
        save_weights(self.folder / "weights.pth", model, self.tokenizer)
        places = self.folder / "weights.pth", self.folder / "clip", self.folder / "tokenizer"
        return Chat(*places, self.device, DTYPES[dtype])

    def flags(self, size):
        return [f"--{name}={value}" for name, value in self.sizes[size].items()]


# --- correctness ----------------------------------------------------------------------------------------------------


def difference(found, expected):
    """||found - expected|| / ||expected||, in float64 on the CPU; NaN never passes a limit."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def correctness(bench):
    def check(name, value, most):
        bench.row("correctness", check=name, value=float(f"{value:.3g}"), limit=most, ok=bool(value <= most))

    size = next(iter(bench.sizes.values()))
    encoder, reference = bench.encoder(), bench.encoder(device="cpu")
    dataset = bench.dataset("pretrain", encoder)
    batch = collate([dataset[i] for i in range(4)])
    features = reference(batch["pixel_values"])
    check("features of CLIP, float32", difference(encoder(batch["pixel_values"]), features), 1e-3)
    limits = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
    experts_limits = {
        **limits,
        "float16": 3e-2,
    }  # a random router's near ties fall another way, and a token to another expert

    # logits and gradients of one batch, without and with experts; autocast as in training
    for moe in (False, True):
        torch.manual_seed(0)
        model = MiniMindVLM(bench.config(encoder, **size, use_moe=moe)).train()

        def step(model, device, dtype, moe=moe):
            model = model.to(device)
            model.zero_grad()
            inputs = {name: batch[name].to(device) for name in ("input_ids", "labels")}
            with torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "float32"):
                output = model(**inputs, image_features=features.to(device))
            output.loss.backward()
            gradient = model.vision_proj.vision_proj[0].weight.grad.cpu()
            return output.logits.float().cpu(), gradient

        logits, gradient = step(model, "cpu", "float32")
        for dtype, most in limits.items():
            found = step(model, bench.device, dtype)
            if moe:
                check(f"experts' logits, {dtype}", difference(found[0], logits), experts_limits[dtype])
            else:
                check(f"logits, {dtype}", difference(found[0], logits), most)
                check(f"gradient of the projector, {dtype}", difference(found[1], gradient), 3 * most)
        if moe:
            tokens = torch.randn(1, device=bench.device, dtype=torch.bfloat16)
            bench.row(
                "correctness",
                check="experts are grouped in bfloat16",
                value=can_use_grouped_mm(tokens),
                limit="",
                ok=True,
            )

    # 20 steps of the trainer, from files to the optimizer
    losses = {}
    for device, dtype in [
        ("cpu", "float32"),
        *((bench.device, dtype) for dtype in limits),
        (bench.device, "no graphs"),
    ]:
        flags = ["--dim=128", "--n_layers=2", "--n_heads=4", "--n_kv_heads=2", "--batch_size=4"]
        flags += [f"--dtype={'float32' if dtype == 'no graphs' else dtype}"]
        args = bench.arguments(*flags, "--learning_rate=1e-3", "--num_workers=0", device=device)
        run = bench.run(args, reference if device == "cpu" else encoder, dataset, n_heads=4, n_kv_heads=2)
        if dtype == "no graphs":
            run.forward_backward = run.eager_forward_backward
        losses[device, dtype] = steps_of(run, 4 if bench.smoke else 20)
    expected = torch.tensor(losses["cpu", "float32"])
    for dtype, most in (("float32", 1e-3), ("no graphs", 1e-3), ("bfloat16", 3e-2), ("float16", 1e-2)):
        found = torch.tensor(losses[bench.device, dtype])
        check(f"loss of 20 steps, {dtype}", (found - expected).abs().max().item(), most)

    # no step waits for the GPU, which the debug mode turns into an error
    if not bench.smoke:
        for flags in ([], ["--dtype=float16"], ["--use_moe"], ["--accumulation_steps=2"], ["--cache_features"]):
            args = bench.arguments("--batch_size=4", "--num_workers=2", *bench.flags("512+8"), *flags)
            run, said = bench.run(args, bench.encoder("bfloat16"), dataset), "none"
            try:
                check_for_waiting(run)
            except RuntimeError as error:
                said = traceback.format_exc().strip().splitlines()[-3].strip() + str(error).splitlines()[0]
            dataset.use_features(None)
            name = f"waits in a step, {' '.join(flags) or 'bfloat16'}"
            bench.row("correctness", check=name, value=said, limit="none", ok=said == "none")

    # greedy answers: the GPU's against the CPU's, a captured graph's against steps one by one
    chat = bench.chat("float32", **size)
    input_ids = chat.encode_prompt(as_conversation("bado nu kipa?", 1, chat.config))
    with torch.inference_mode():
        seen, tokens = chat.encoder(batch["pixel_values"][:1]), 16 if bench.smoke else 64
        answers = {}
        for kind in (Decoder, GraphDecoder):
            answers[kind] = greedy(kind(chat.model, 1, 512), input_ids, seen, tokens)
        model = chat.model.to("cpu")
        alone = greedy(Decoder(model, 1, 512), input_ids.cpu(), seen.cpu(), tokens)
    check("greedy tokens unlike the CPU's, float32", (answers[Decoder].cpu() != alone).float().mean().item(), 0)
    check("greedy tokens of the graph unlike", (answers[GraphDecoder].cpu() != alone).float().mean().item(), 0)


def steps_of(run, count):
    """The losses of a run's first steps."""
    stop, losses, steps = Stop(quiet=True), [], chunked(iter(run.loader), run.sampler.micro_batches)
    run.wrapped_model.train()
    for _ in range(count):
        before = run.stats.loss_stats[0].clone()
        run.train_step(next(steps), stop)
        losses.append((run.stats.loss_stats[0] - before).item())
    stop.restore()
    return losses


def check_for_waiting(run):
    """RuntimeError if a step, kernel by kernel or as a captured graph, makes the host wait for the GPU."""
    stop, batches = Stop(quiet=True), next(chunked(iter(run.loader), run.sampler.micro_batches))
    run.wrapped_model.train()
    for forward_backward in (run.eager_forward_backward, run.forward_backward):
        run.forward_backward = forward_backward
        for i in range(4):
            if i == 3:  # the ones before set up what is used later, and capture
                torch.cuda.set_sync_debug_mode("error")
            try:
                run.train_step([dict(batch) for batch in batches], stop)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    stop.restore()


def greedy(decoder, input_ids, features, count):
    """(B, count) token ids."""
    scores, tokens = decoder.prompt(input_ids, features), []
    for _ in range(count):
        tokens.append(scores.argmax(dim=-1, keepdim=True))
        scores = decoder.step(tokens[-1])
    return torch.cat(tokens, dim=1)


# --- training -------------------------------------------------------------------------------------------------------


def training(bench):
    """The most important first: batch sizes, then sizes of the model, cache, workers, experts, compiler."""
    dtype = "float32" if bench.smoke else "bfloat16"
    roof = roofs(bench.device, DTYPES[dtype]) if not bench.smoke else (1e12, 1e10)
    encoder = bench.encoder(dtype)
    most = 2 if bench.smoke else 40  # records for each picture
    datasets = {stage: bench.dataset(stage, encoder, most) for stage in RECORDS}
    small, large = next(iter(bench.sizes)), list(bench.sizes)[-1]
    runs = [(stage, small, size, []) for size in (64, 256, 16) for stage in RECORDS]
    runs += [("pretrain", small, 256, ["--num_workers=16"]), ("pretrain", small, 256, ["--cache_features"])]
    runs += [(stage, large, 64, []) for stage in RECORDS]
    runs += [
        ("pretrain", small, 64, [NO_GRAPHS]),
        ("sft", small, 64, [NO_GRAPHS]),
        ("pretrain", small, 16, [NO_GRAPHS]),
    ]
    runs += [(stage, small, 64, ["--compile"]) for stage in RECORDS]
    runs += [("pretrain", small, 64, ["--use_moe"]), ("pretrain", small, 256, ["--num_workers=4"])]
    runs += [("pretrain", small, 64, ["--num_workers=0"]), ("pretrain", small, 64, ["--dtype=float32"])]
    runs += [(stage, large, 256, []) for stage in RECORDS]
    if bench.smoke:
        runs = [("pretrain", small, 4, []), ("sft", small, 4, ["--cache_features"])]
    for stage, size, batch_size, flags in runs:
        try:
            figures = one_run(bench, encoder, datasets[stage], roof, stage, size, batch_size, flags)
        except Exception as error:  # noqa: BLE001  the next rows must be measured
            traceback.print_exc()
            figures = {"config": f"{size}, {stage}, batch {batch_size}", "failed": str(error).splitlines()[0]}
        bench.row("training", model=size, stage=stage, batch=batch_size, flags=" ".join(flags), **figures)


def one_run(bench, encoder, dataset, roof, stage, size, batch_size, flags):
    steps = {16: (200, 80), 64: (120, 80), 256: (50, 50)}.get(
        batch_size, (2, 1)
    )  # and as many before, to capture graphs
    counts = [f"--steps={steps[0]}", f"--warm_up={steps[1]}", f"--lap_steps={1 if bench.smoke else 5}"]
    given = [flag for flag in flags if flag != NO_GRAPHS]
    workers = [] if "--num_workers" in str(flags) else [f"--num_workers={0 if bench.smoke else 8}"]
    args = bench.arguments(
        f"--stage={stage}", f"--batch_size={batch_size}", *bench.flags(size), *counts, *workers, *given
    )
    begun = time.perf_counter()
    run = bench.run(args, encoder, dataset)
    if NO_GRAPHS in flags:
        run.forward_backward = run.eager_forward_backward
    figures = measure(args, run, dataset, roof)
    dataset.use_features(None)
    if batch_size == (4 if bench.smoke else 16) and size == next(iter(bench.sizes)) and not flags:
        batches = list(run.sampler)[:2]
        reference = bench.encoder()  # the original's CLIP was in float32
        seconds = original(args, run.model, reference, dataset, batches)
        figures["baseline_samples_per_s"] = round(sum(map(len, batches)) / seconds, 2)
    figures["graphs"] = len(getattr(run.forward_backward, "graphs", ()))
    run.__dict__.clear()  # ends its workers at once; in a cycle of references each of them would take 5 s
    bench.tidy()
    return {**figures, "seconds_of_all": round(time.perf_counter() - begun, 1)}


# --- answering ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decoding(bench):
    tokens = 8 if bench.smoke else 64
    few = tokens // 4  # kernel by kernel, which the host's CPU holds up
    for size, dtype in [(size, "bfloat16") for size in bench.sizes] + [(next(iter(bench.sizes)), "float32")]:
        chat = bench.chat(dtype, **bench.sizes[size])

        def row(manner, rate, first=None, size=size, dtype=dtype):
            first = first and round(1000 * first, 1)
            figures = {"tokens_per_s": round(rate, 1), "first_token_ms": first}
            bench.row("decoding", model=size, dtype=dtype, manner=manner, **figures)

        side = chat.encoder.preprocess.size
        pixels = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        features, input_ids = (
            chat.encode_images([pixels]),
            chat.encode_prompt(as_conversation("bado nu kipa?", 1, chat.config)),
        )
        chat.warm_up()
        if chat.graph:
            row("stream, captured graph", *best(stream, chat, pixels, tokens)[1:])
            chat.graph = None
        row("stream, kernel by kernel", *best(stream, chat, pixels, few, times=2)[1:])
        for count in (2,) if bench.smoke else (8, 64):
            several = input_ids.expand(count, -1), features.expand(count, -1, -1)
            for kind, steps in ((GraphDecoder, tokens), (Decoder, few)):
                decoder = kind(chat.model, count, 512)
                greedy(decoder, *several, 2)
                synchronize(bench.device)
                begun = time.perf_counter()
                greedy(decoder, *several, steps)
                synchronize(bench.device)
                row(f"{kind.__name__} of {count}", count * steps / (time.perf_counter() - begun))
            with no_end(chat):
                row(f"generate of {count}", best(generate, chat, *several, few, times=1)[1])
        del chat
        bench.tidy()


def memory(bench):
    for size, sizes in bench.sizes.items():
        bench.tidy()
        chat = bench.chat("float32" if bench.smoke else "bfloat16", **sizes)
        side = chat.encoder.preprocess.size
        loaded = 0 if bench.smoke else torch.cuda.memory_allocated()
        blank = torch.zeros(3, side, side, dtype=torch.uint8)
        for _ in range(2):
            list(chat.stream("bado nu kipa?", [blank], max_new_tokens=32))
        weights = sum(parameter.nbytes for part in (chat.model, chat.encoder.model) for parameter in part.parameters())
        peak, reserved = (0, 0) if bench.smoke else (torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved())
        figures = {"weights": weights, "loaded": loaded, "peak": peak, "reserved": reserved}
        bench.row("memory", model=size, **{f"{name}_gb": round(value / 1e9, 3) for name, value in figures.items()})
        del chat


# --- the demo -------------------------------------------------------------------------------------------------------


def run_demo(bench):
    """The README's commands; --smoke runs two of them on a world of a few pictures."""
    out = [f"--out_dir={bench.folder / 'demo'}", f"--device={bench.device}"]
    stages = ["1-pretrain_vlm.py --demo", "2-sft_vlm.py --demo", "3-eval_chat.py --demo --all"]
    stages += ["2-sft_vlm.py --demo --multi", "3-eval_chat.py --demo --all --multi"]
    if bench.smoke:
        world = bench.folder / "world"
        build(world, pictures=16, pairs=4, animations=4, held_out=2, turns=2)
        places = f"--images_path={world / 'images'}"
        stages = [f"1-pretrain_vlm.py --demo --data_path={world / 'pretrain.json'} {places} --epochs 1"]
        weights = f"--weights={bench.folder / 'demo' / '192_vlm_pretrain.pth'}"
        stages += [f"3-eval_chat.py --demo --score {world / 'score_heldout.json'} {places} {weights}"]
    for stage in stages:
        begun = time.perf_counter()
        result = subprocess.run(
            [sys.executable, *stage.split(), *out], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
        )
        print(result.stdout[-3000:], result.stderr[-3000:], flush=True)
        if result.returncode:
            raise RuntimeError(f"{stage} ended with exit code {result.returncode}")
        # the score's table has lines like `all  1197 questions  96.9%  shuffled 34.0%`
        scores = re.findall(r"^\s*all\b.*$", result.stdout, flags=re.MULTILINE)
        says = " / ".join(" ".join(line.split()) for line in scores)
        command = " ".join(word for word in stage.split() if "/" not in word)
        bench.row("demo", command=command, seconds=round(time.perf_counter() - begun, 1), score=says)


# --- tables ---------------------------------------------------------------------------------------------------------


def write_tables(out):
    """rows.jsonl as Markdown: a table a section, and the projection that the training rows allow."""
    lines = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines() if (out / "rows.jsonl").exists() else []
    rows = [json.loads(line) for line in lines]
    text = []
    for section in LIMITS:
        chosen = [{k: v for k, v in row.items() if k != "section"} for row in rows if row["section"] == section]
        if not chosen:
            continue
        text += [f"## {section}", "", *table(training_rows(chosen) if section == "training" else chosen), ""]
        if section == "training" and (projected := list(projections(chosen))):
            text += [*table(projected), ""]
    (out / "tables.md").write_text("\n".join(text), encoding="utf-8")


def table(rows):
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for row in rows:
        yield f"| {' | '.join(str(row.get(name, '')) for name in names)} |"


def training_rows(rows):
    """The columns that a person wants to see."""
    for row in rows:
        each = row.get("seconds_per_step", {})
        shown = {name: row.get(name, "") for name in ("model", "stage", "batch", "flags")}
        shown["samples/s"] = row.get("samples_per_s", row.get("failed"))
        shown["of the roof"] = f"{100 * row.get('fraction_of_roof', 0):.1f}%"
        shown["graphs"] = row.get("graphs", "")
        shown["peak GB"] = row.get("peak_gb", "")
        shown["ms a step"] = round(1000 * each.get("all", 0), 1)
        parts = {name: value for name, value in each.items() if name != "all"}
        shown["of which, waited for"] = ", ".join(f"{name} {1000 * value:.1f}" for name, value in parts.items())
        shown["original's manner"] = row.get("baseline_samples_per_s", "")
        yield shown


def projections(rows):
    """Minutes for one epoch of the published data, for each model and batch size that both stages were measured with."""
    rates = {(row["model"], row["batch"], row["flags"], row["stage"]): row.get("samples_per_s") for row in rows}
    for model, batch, flags, stage in rates:
        both = [rates.get((model, batch, flags, one)) for one in RECORDS]
        if stage == "pretrain" and all(both):
            minutes = [count / rate / 60 for count, rate in zip(RECORDS.values(), both, strict=True)]
            shown = {"model": model, "batch": batch, "flags": flags}
            yield shown | {
                "595,000 captions, min": round(minutes[0], 1),
                "230,000 questions, min": round(minutes[1], 1),
                "both": round(sum(minutes), 1),
            }


# --- all of it ------------------------------------------------------------------------------------------------------

SECTIONS = {
    "correctness": correctness,
    "training": training,
    "decoding": decoding,
    "memory": memory,
    "demo": run_demo,
}


def run_section(args, name):
    """One section in this process. True if it came to its end."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            SECTIONS[name](Bench(args, Path(folder)))
        except Exception:  # noqa: BLE001  whatever it is, the next section must be run
            traceback.print_exc()
            return False
    return True


def run_in_process_of_its_own(args, name):
    """The same in a new process, ended with all it started when its time is over."""
    command = [sys.executable, __file__, "--section", name, "--out", str(args.out)]
    with open(args.out / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(timeout=LIMITS[name]) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.write(f"\nended after its {LIMITS[name]} seconds\n")
            return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "on_gpu", help="folder for the results")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help="run one in this process, without a time limit")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on the CPU, in this process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        sys.exit(not run_section(args, args.section))
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("error: no GPU was found; --smoke tries everything on a CPU, tiny")
    (args.out / "rows.jsonl").unlink(missing_ok=True)
    failed, run = [], run_section if args.smoke else run_in_process_of_its_own
    for name in args.sections:
        begun = time.perf_counter()
        good = run(args, name)
        failed += [] if good else [name]
        write_tables(args.out)
        print(f"{name:<14}{'done' if good else 'FAILED'} in {time.perf_counter() - begun:.0f} s", flush=True)
    print((args.out / "tables.md").read_text(encoding="utf-8"))
    machine = f"{device_name('cpu' if args.smoke else 'cuda')}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}: {'failed: ' + ', '.join(failed) if failed else 'all sections came to their end'}")
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
