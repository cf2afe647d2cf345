"""The training loop of every stage, alone or under torchrun, and the arguments that the stages share."""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.checkpoint import load_tokenizer, load_vlm, read_notes, save_weights, tokenizer_warning
from model.dataset import LengthBatches, Pictures, VLMDataset, collate, tokenizer_fields
from model.LMConfig import BadInput, LMConfig
from model.model_vlm import MiniMindVLM
from model.vision_utils import FeatureCache, cache_key, load_vision

# the demo's preset of the arguments that training and chatting share
DEMO_MODEL = {
    "dim": 192,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 3,
    "vision_path": "model/demo",
    "tokenizer_path": "model/demo",
    "images_path": "dataset/demo_world/images",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- arguments ------------------------------------------------------------------------------------------------------


def yes_or_no(text):
    """For `--multi`, `--multi True` and `--multi False`."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} should be True or False")


def add_switch(parser, name, help):
    """An option that is off, on when named, and may be spelled out as True or False."""
    parser.add_argument(name, nargs="?", const=True, default=False, type=yes_or_no, metavar="True|False", help=help)


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def add_model_arguments(parser):
    """Sizes and places of the model: what training and chatting share."""
    parser.add_argument("--dim", type=int, default=512, help="width of the language model (published: 512 or 768)")
    parser.add_argument("--n_layers", type=int, default=8, help="its layers (published: 8 or 16)")
    parser.add_argument("--n_heads", type=int, default=16, help="its attention heads")
    parser.add_argument("--n_kv_heads", type=int, default=8, help="its key/value heads")
    parser.add_argument("--max_seq_len", type=int, default=512, help="longest conversation in tokens, 50 a picture")
    add_switch(parser, "--use_moe", help="experts in place of each feed-forward")
    parser.add_argument("--out_dir", default="out", help="where weights and logs are written and looked for")
    parser.add_argument("--vision_path", default="model/clip_model/clip-vit-base-patch32", help="folder of the CLIP")
    parser.add_argument("--tokenizer_path", default="model/minimind_tokenizer", help="folder of the tokenizer")
    parser.add_argument("--device", default=default_device(), help="cuda, mps or cpu (default: the first at hand)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 or float16 on a GPU, float32 on a CPU")


def model_sizes(args):
    """The LMConfig fields that `add_model_arguments` asks for."""
    return {
        name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "use_moe")
    }


def add_training_arguments(parser, learning_rate, data_path, images_path):
    """The published training arguments, with the defaults of one stage."""
    add_model_arguments(parser)
    parser.add_argument("--data_path", default=data_path, help="JSON file of records (default %(default)s)")
    parser.add_argument("--images_path", default=images_path, help="folder of its pictures (default %(default)s)")
    parser.add_argument(
        "--from_weights", help="start from this file, or transformers folder, instead of the previous stage's"
    )
    add_switch(parser, "--freeze_llm", help="train the projector only, and leave the language model as it is")
    parser.add_argument("--seed", type=int, default=1337, help="of random weights and of the order of samples")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16, help="samples per step and process (default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=learning_rate, help="its peak (default %(default)s)")
    parser.add_argument("--accumulation_steps", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--warmup_iters", type=int, default=0, help="optimizer steps of rising learning rate")
    parser.add_argument("--log_interval", type=int, default=10, help="optimizer steps between log lines")
    parser.add_argument("--save_interval", type=int, default=1000, help="optimizer steps between saved weights")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read pictures ahead")
    add_switch(parser, "--cache_features", help="run CLIP once over all pictures and keep the result in out_dir")
    add_switch(parser, "--use_wandb", help="log to Weights & Biases")
    parser.add_argument("--wandb_project", default="MiniMind-V")
    parser.add_argument(
        "--wandb_run_name", help="default: the published form, with epochs, batch size and learning rate"
    )


def parse_with_demo(parser, demo, flags=None):
    """Parses the command line; `--demo` only puts the defaults `demo` in place of others, and each can still be given."""
    add_switch(parser, "--demo", help="the embedded demo: a drawn picture world and small models, nothing downloaded")
    args = parser.parse_args(flags)
    if args.demo:
        parser.set_defaults(**demo)
        args = parser.parse_args(flags)
    return args


def run_script(main):
    """Runs a script's main; what people can mend is told in one line, with exit code 1."""
    try:
        main()
    except BadInput as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("stopped")


# --- devices and processes ------------------------------------------------------------------------------------------


def pick_dtype(name, device):
    """The precision of matrix products: as asked, or the best the device has."""
    if name:
        return DTYPES[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


class Processes:
    """This process's place among those that torchrun started; one process alone where it did not."""

    def __init__(self, device):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        if self.world > 1:
            if device.startswith("cuda"):
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")

    @property
    def first(self):
        return self.rank == 0

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor):
        """Adds a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


# --- what a stage needs ---------------------------------------------------------------------------------------------


def prepare(args, weights, allow_missing_projector):
    """Loads everything a stage needs: (model, encoder, tokenizer, dataset).

    weights: the file to start from, or None for random weights. Whatever is missing stops the run here, before any work.
    """
    tokenizer = load_tokenizer(args.tokenizer_path)
    encoder = load_vision(args.vision_path, args.device, vision_dtype(args))
    config = LMConfig(
        **model_sizes(args),
        vision_width=encoder.vision_width,
        image_tokens=encoder.image_tokens,
        **tokenizer_fields(tokenizer),
    )
    torch.manual_seed(args.seed)
    if weights:
        model, loaded = load_vlm(weights, config, tokenizer, allow_missing_projector)
        if int(os.environ.get("RANK", "0")) == 0:
            print("\n".join(filter(None, [loaded, tokenizer_warning(weights, tokenizer)])), flush=True)
    else:
        model = MiniMindVLM(config)
    dataset = VLMDataset(args.data_path, args.images_path, tokenizer, config, args.max_seq_len, encoder.image_size)
    return model.to(args.device), encoder, tokenizer, dataset


def vision_dtype(args):
    """CLIP's own precision: half on a GPU, float32 elsewhere."""
    return pick_dtype(args.dtype, args.device) if args.device.startswith("cuda") else torch.float32


def learning_rate_at(step, steps, peak, warmup):
    """Linear warm-up, then a cosine from `peak` to a tenth of it at the last step (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def open_cache(args, dataset, encoder, processes):
    """Gives the dataset its feature cache, which the first process builds if need be."""
    paths = dataset.image_paths
    cache = FeatureCache(Path(args.out_dir) / "features", cache_key(args.vision_path, paths))
    if processes.first and not cache.ready():
        loader = DataLoader(Pictures(paths, encoder.image_size), batch_size=64, num_workers=args.num_workers)
        with tqdm(total=len(paths), unit="picture", desc="CLIP", disable=not sys.stderr.isatty()) as bar:
            if bar.disable:
                print(f"running CLIP over {len(paths)} pictures ...", file=sys.stderr, flush=True)
            cache.build(encoder, paths, loader, bar.update)
    processes.wait()
    if not cache.ready():
        raise BadInput(
            f"{cache.file} was not found by process {processes.rank}: --out_dir must be shared by all machines"
        )
    dataset.features = cache


class Log:
    """Where the figures of a run go: a bar or plain lines, a JSON-lines file, and Weights & Biases if asked."""

    def __init__(self, args, name, steps):
        self.file = open(Path(args.out_dir) / f"{name}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.bar = tqdm(total=steps, desc=name, disable=not sys.stderr.isatty())
        self.steps, self.begun = steps, time.time()
        self.wandb = None
        if args.use_wandb:
            import wandb

            self.wandb = wandb.init(project=args.wandb_project, name=args.wandb_run_name, config=vars(args))
        self.file.write(json.dumps({"run": name, "time": time.time(), "args": vars(args)}) + "\n")

    def write(self, step, figures):
        left = (time.time() - self.begun) / step * (self.steps - step)
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log(figures, step=step)
        if self.bar.disable:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"step {step}/{self.steps}: {shown}, {left / 60:.1f} min left", flush=True)
        else:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
            self.bar.update(step - self.bar.n)

    def close(self):
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


# --- the loop -------------------------------------------------------------------------------------------------------


def train(args, stage, weights, weights_file, allow_missing_projector=False):
    """Trains projector and language model from `weights` into `weights_file`; CLIP stays as it is."""
    processes = Processes(args.device)
    args.device = processes.device
    try:
        model, encoder, tokenizer, dataset = prepare(args, weights, allow_missing_projector)
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        if processes.first and dataset.dropped:
            print(f"{dataset.dropped} records left out: their answers lie beyond --max_seq_len {args.max_seq_len}")
        if args.cache_features:
            open_cache(args, dataset, encoder, processes)
        history = read_notes(weights).get("training", []) if weights else []
        Run(args, stage, processes, model, encoder, tokenizer, dataset, weights_file, history).train()
    finally:
        processes.close()


class Run:
    """One stage's training. `history` tells, one entry a stage, how the weights were made that it starts from."""

    def __init__(self, args, stage, processes, model, encoder, tokenizer, dataset, weights_file, history):
        self.args, self.stage, self.processes = args, stage, processes
        self.model, self.encoder, self.tokenizer = model, encoder, tokenizer
        self.weights_file, self.history = weights_file, history
        self.sampler = LengthBatches(
            dataset.lengths, args.batch_size, args.seed, processes.rank, processes.world, args.accumulation_steps
        )
        self.on_gpu = args.device.startswith("cuda")
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=args.num_workers,
            pin_memory=self.on_gpu,
            persistent_workers=args.num_workers > 0,
        )
        self.samples = len(dataset)
        self.dtype = pick_dtype(args.dtype, args.device)
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=self.dtype == torch.float16)
        if args.freeze_llm:
            model.requires_grad_(False).vision_proj.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, fused=args.device != "mps")
        self.steps = self.sampler.steps * args.epochs
        self.parallel = DistributedDataParallel(model) if processes.world > 1 else model

    def train(self):
        """Every epoch, with a log line every `log_interval` steps and the weights saved at the end."""
        args = self.args
        log = Log(args, self.weights_file.stem, self.steps) if self.processes.first else None
        step, seen, begun, loss_sum = 0, 0, time.time(), 0.0
        self.parallel.train()
        for epoch in range(args.epochs):
            self.sampler.set_epoch(epoch)
            for batches in grouped(self.loader, args.accumulation_steps):
                rate = learning_rate_at(step, self.steps, args.learning_rate, args.warmup_iters)
                loss, norm = self.step(batches, rate)
                step += 1
                loss_sum = loss_sum + loss
                seen += sum(len(batch["input_ids"]) for batch in batches) * self.processes.world
                last = step == self.steps
                if step % args.log_interval == 0 or last:
                    loss_sum = self.processes.sum(loss_sum) / (step % args.log_interval or args.log_interval)
                    seconds = time.time() - begun
                    if log:
                        figures = {"loss": loss_sum.item(), "lr": rate, "samples/s": seen / seconds}
                        log.write(step, {**figures, "grad_norm": norm.item(), "epoch": step / self.steps * args.epochs})
                    seen, begun, loss_sum = 0, time.time(), 0.0
                if self.processes.first and (step % args.save_interval == 0 or last):
                    self.save(step, epoch)
        if log:
            log.close()
            print(f"saved {self.weights_file}", flush=True)
        self.processes.wait()

    def step(self, batches, rate):
        """One optimizer step over its micro-batches: (this process's share of the loss, gradient norm), as tensors.

        The loss is summed over answers and divided by the number of answer tokens in all micro-batches of all processes,
        so that how a global batch is divided changes nothing.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        answers = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        answers = self.processes.sum(answers.to(self.args.device).float())
        total = 0.0
        for i, batch in enumerate(batches):
            waits = self.processes.world > 1 and i < len(batches) - 1  # gradients are exchanged with the last one
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                loss = self.loss(batch, answers)
                # DistributedDataParallel averages gradients over processes; the loss is already a share of the whole
                self.scaler.scale(loss * self.processes.world).backward()
            total = total + loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total, norm

    def loss(self, batch, answers):
        """One micro-batch's summed loss over `answers`, the answer tokens of the whole step."""
        device = self.args.device
        batch = {name: None if x is None else x.to(device, non_blocking=True) for name, x in batch.items()}
        features = batch.get("image_features")
        if features is not None:
            features = features.to(torch.float32)
        elif batch["pixel_values"] is not None:
            features = self.encoder(batch["pixel_values"]).to(torch.float32)
        with torch.autocast(device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            return self.parallel(
                batch["input_ids"], image_features=features, labels=batch["labels"], num_items_in_batch=answers
            ).loss

    def save(self, step, epoch):
        names = ("data_path", "epochs", "batch_size", "accumulation_steps", "learning_rate", "freeze_llm", "seed")
        stage = {"stage": self.stage, **{name: getattr(self.args, name) for name in names}, "steps": step}
        training = [*self.history, {**stage, "processes": self.processes.world}]
        save_weights(
            self.weights_file, self.model, self.tokenizer, stage=self.stage, step=step, epoch=epoch, training=training
        )


def grouped(batches, size):
    """Lists of `size` batches, the last one possibly shorter."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
