"""The training loop of every stage, alone or under torchrun."""

import contextlib
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.batches import LengthBatches, SortedBatches, TokenBatches
from dataset.dataset import VLMDataset, collate
from model.arguments import model_sizes, pick_dtype
from model.checkpoint import (
    PROJECTOR,
    load_tokenizer,
    load_vlm,
    read_notes,
    save_weights,
    tokenizer_hash,
    tokenizer_warning,
)
from model.conversation import tokenizer_fields
from model.errors import BadInput
from model.files import replace_file
from model.LMConfig import LMConfig
from model.model import can_group
from model.model_vlm import MiniMindVLM
from model.vision_utils import load_vision

from .distributed import Processes, Stop, ignore_signals
from .feature_cache import open_cache
from .graphs import GraphedForwardBackward
from .logs import Log, tell

# --- what a stage needs ---------------------------------------------------------------------------------------------


def prepare(args, weights, allow_missing_projector, saved, first):
    """Loads everything a stage needs: (model, encoder, tokenizer, dataset, held-out dataset or None).

    weights: the file to start from, or None for random weights; with a `saved` run it need not be there any more.
    Whatever is missing stops the run here, before any work.
    """
    tokenizer = load_tokenizer(args.tokenizer_path)
    encoder = load_vision(args.vision_path, args.device, pick_dtype(args.dtype, args.device))
    config = LMConfig(
        **model_sizes(args),
        vision_width=encoder.vision_width,
        image_tokens=encoder.image_tokens,
        **tokenizer_fields(tokenizer),
    )
    torch.manual_seed(args.seed)
    if weights and not saved:
        model, loaded = load_vlm(weights, config, tokenizer, allow_missing_projector)
        if first:
            print("\n".join(filter(None, [loaded, tokenizer_warning(weights, tokenizer)])), flush=True)
    else:
        config.vision_bias = bool(saved) and f"{PROJECTOR}vision_proj.0.bias" in saved["model"]
        model = MiniMindVLM(config)
    sizes = (args.max_seq_len, encoder.image_size)
    strictness = {"strict": args.strict, "most": args.max_bad_fraction, "tell": tell if first else None}
    dataset, held_out = (
        path and VLMDataset(path, args.images_path, tokenizer, config, *sizes, **strictness)
        for path in (args.data_path, args.val_path)
    )
    return model.to(args.device), encoder, tokenizer, dataset, held_out


def compile_model(model, device):
    """A model that is compiled at its first batch, with sizes that differ from batch to batch as unknowns.

    After eight compilations PyTorch lets what is still new run as it is. BadInput if the compiler is missing.
    """
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and not shutil.which(compiler):
        raise BadInput(f"--compile needs a C++ compiler, and {compiler} was not found: install one, or leave it out")
    if device.startswith("cuda") and not importlib.util.find_spec("triton"):
        raise BadInput("--compile needs Triton on a GPU, and this PyTorch came without: leave it out")
    return torch.compile(model, dynamic=True)


def train_val_split(dataset, fraction, seed):
    """Indices to train on and to hold out, the latter a random `fraction` of the samples."""
    order = np.random.default_rng([seed, 2**31]).permutation(len(dataset))  # no epoch has this number
    held_out = round(len(dataset) * fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def learning_rate_at(step, steps, peak, warmup):
    """Linear warm-up, then a cosine from `peak` to a tenth of it at the last step (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


# --- the loop -------------------------------------------------------------------------------------------------------

PATIENCE = 20  # steps in a row without a finite gradient
FORMAT = 3  # of resume states: to be raised with every change of what they hold


def train(args, stage, weights, weights_file, allow_missing_projector=False):
    """Trains projector and language model from `weights` into `weights_file`; CLIP stays as it is.

    With --resume, or started again by torchrun, it goes on from the state of a run that was cut off, if there is one.
    """
    processes = Processes(args.device)
    args.device = processes.device
    try:
        saved = None
        if processes.all_reduce(torch.tensor(float(args.resume or processes.restarted))):  # any of them
            saved = processes.broadcast(read_state(state_file(weights_file)) if processes.is_main else None)
            if saved is None and processes.is_main:
                print(f"nothing to resume: {state_file(weights_file)} is not there; starting from the beginning")
        parts = prepare(args, weights, allow_missing_projector, saved, processes.is_main)
        _, encoder, _, *datasets = parts
        try:
            Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{args.out_dir} could not be made ({error.strerror}): name another --out_dir") from None
        if args.cache_features:
            for dataset in filter(None, datasets):
                open_cache(args, dataset, encoder, processes)
        history = read_notes(weights).get("training", []) if weights else []
        run = Run(args, stage, processes, *parts, weights_file, history, saved)
        saved = None  # as large as model and optimizer together
        run.train()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise BadInput(
            f"out of memory ({oom_details(error)}): lower --batch_size (or --batch_tokens), and raise --accumulation_steps as much "
            "to train on the same batches; or lower --max_seq_len"
        ) from None
    finally:
        processes.close()


def oom_details(error):
    """How much memory was wanted and how much was there, in PyTorch's own words."""
    words = re.search(r"[Tt]ried to allocate.*?(?=\. (?:Including|Of)|\. Error|$)", str(error))
    return words.group().rstrip(".") if words else str(error).splitlines()[0]


def state_file(weights_file):
    """Where a run keeps all it needs to continue."""
    return weights_file.with_name(f"{weights_file.stem}_resume.pth")


def read_state(path):
    """What `Run.state_dict` wrote; None if there is nothing. BadInput if it is no such file, or another version's."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        raise BadInput(f"{path} is not a whole resume state: start anew without --resume") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise BadInput(
            f"{path} was written by another version of MiniMind-V: resume with that one, or start anew without --resume"
        )
    return state


class Run:
    """One stage's training. `history` tells, one entry a stage, how the weights were made that it starts from."""

    def __init__(
        self, args, stage, processes, model, encoder, tokenizer, dataset, held_out, weights_file, history, saved
    ):
        self.args, self.stage, self.processes = args, stage, processes
        self.model, self.encoder, self.tokenizer = model, encoder, tokenizer
        self.weights_file, self.history = weights_file, history
        self.dtype = pick_dtype(args.dtype, args.device)
        # of what is captured as CUDA graphs; experts one by one would have to be counted by the host
        self.use_cuda_graphs = args.device.startswith("cuda") and processes.world_size == 1 and not args.compile
        self.use_cuda_graphs &= not args.use_moe or can_group(torch.empty(1, device=args.device, dtype=self.dtype))
        training, kept = train_val_split(dataset, args.val_fraction, args.seed)
        place = (processes.rank, processes.world_size)
        size = self.step_size(saved)
        if args.batch_tokens:
            self.sampler = TokenBatches(training, dataset.lengths, args.batch_tokens, size, *place, args.seed)
        else:
            self.sampler = LengthBatches(training, dataset.lengths, size, args.batch_size, *place, args.seed)
        self.loader = self.make_loader(dataset, self.sampler)
        if held_out:
            kept = np.arange(len(held_out))
        self.measures = len(kept) > 0
        held_out = held_out or dataset
        self.held_out = self.make_loader(held_out, SortedBatches(kept, held_out.lengths, args.batch_size, *place))
        self.problems = dataset.problems
        self.fingerprint = zlib.crc32(dataset.ids.values.numpy(), zlib.crc32(dataset.lengths))
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=self.dtype == torch.float16)
        if args.freeze_llm:
            model.requires_grad_(False).vision_proj.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, fused=args.device != "mps")
        self.step, self.steps = 0, self.sampler.steps * args.epochs
        if not self.steps:
            raise BadInput(
                f"there is nothing to do: {args.epochs} epochs of {len(training)} samples, and a step takes "
                f"{size} {'batches' if args.batch_tokens else 'samples'}"
            )
        # since the last log line: loss and steps that counted; steps in a row without a finite gradient, now and at most
        self.loss_stats, self.nonfinite_streak = torch.zeros(2, device=args.device), torch.zeros(2, device=args.device)
        self.samples_seen, self.skipped, self.wandb_id = 0, 0, None
        if saved:
            self.load_state_dict(saved)
        self.wrapped_model = compile_model(model, args.device) if args.compile else model
        if processes.world_size > 1:
            self.wrapped_model = DistributedDataParallel(self.wrapped_model)
        self.forward_backward = self.eager_forward_backward
        if self.use_cuda_graphs:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            self.forward_backward = GraphedForwardBackward(self.eager_forward_backward, args.device)

    def make_loader(self, dataset, batches):
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=partial(collate, few_shapes=self.use_cuda_graphs),
            num_workers=self.args.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.args.device.startswith("cuda"),
            persistent_workers=self.args.num_workers > 0,
        )

    # --- to continue as if nothing had happened ---

    def step_size(self, saved):
        """Samples of a step over all processes, or with --batch_tokens its batches; those of the run that is resumed."""
        args = self.args
        if saved and saved["batching"] == [args.batch_size, args.accumulation_steps]:
            return saved["invariants"]["size of a step"]
        return (1 if args.batch_tokens else args.batch_size) * args.accumulation_steps * self.processes.world_size

    def resume_invariants(self):
        """What must not change between a run and its continuation."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "use_moe", "epochs", "learning_rate")
        names += ("grad_clip", "warmup_iters", "seed", "freeze_llm", "val_fraction", "batch_tokens")
        return {
            **{f"--{name}": getattr(self.args, name) for name in names},
            "size of a step": self.sampler.size,
            "precision": str(self.dtype),
            "checksum of the data": self.fingerprint,
            "tokenizer": tokenizer_hash(self.tokenizer),
        }

    def state_dict(self):
        """All that `load_state_dict` needs. Random numbers need no state of their own: each step seeds them anew."""
        return {
            "format": FORMAT,
            "invariants": self.resume_invariants(),
            "batching": [self.args.batch_size, self.args.accumulation_steps],
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "running_stats": [self.loss_stats, self.nonfinite_streak, self.skipped],
            "wandb_id": self.wandb_id,
            "problems": {reason: sorted(numbers) for reason, numbers in self.problems.numbers.items()},
            "history": json.dumps(self.history),
        }

    def load_state_dict(self, saved):
        """Continues where `saved` was written. BadInput lists what contradicts it."""
        same = self.resume_invariants()
        odd = [
            f"{name} is {same[name]}, was {value}"
            for name, value in saved["invariants"].items()
            if same.get(name) != value
        ]
        if odd:
            raise BadInput(
                f"{state_file(self.weights_file)} is of another run ({'; '.join(odd)}): resume with what it had, or start "
                "anew without --resume"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        sums, streak, self.skipped = saved["running_stats"]
        self.problems.merge([saved["problems"]])
        self.loss_stats, self.nonfinite_streak = sums.to(self.args.device), streak.to(self.args.device)
        self.step, self.wandb_id, self.history = saved["step"], saved["wandb_id"], json.loads(saved["history"])
        if self.processes.is_main:
            print(f"resuming after step {self.step} of {self.steps}", flush=True)

    def save(self):
        """Weights and resume state; what is there already stays until the new is whole. False if that failed."""
        self.problems.merge(self.processes.all_gather(self.problems.numbers))
        if not self.processes.is_main:
            return True
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            tell(f"the weights hold numbers that are not finite: {self.weights_file} is left as it was")
            return False
        names = ("data_path", "epochs", "batch_size", "batch_tokens", "accumulation_steps", "learning_rate")
        names += ("freeze_llm", "seed")
        stage = {"stage": self.stage, **{name: getattr(self.args, name) for name in names}, "steps": self.step}
        training = [*self.history, {**stage, "processes": self.processes.world_size}]
        notes = {"stage": self.stage, "step": self.step, "training": training}
        try:
            save_weights(self.weights_file, self.model, self.tokenizer, **notes)
            replace_file(state_file(self.weights_file), lambda f: torch.save(self.state_dict(), f))
        except OSError as error:
            tell(f"could not save to {self.args.out_dir} ({error.strerror}): the last good files are kept")
            return False
        return True

    # --- steps ---

    def train(self):
        """Every epoch, until the end or until it is told to stop; saves every `save_interval` steps and where it ends."""
        args, first = self.args, self.processes.is_main
        log = Log(args, self.weights_file.stem, self.step, self.steps, self.wandb_id) if first else None
        self.wandb_id = log.wandb_id if log else None
        stop, saved, begun = Stop(quiet=not first), True, time.time()
        self.wrapped_model.train()
        while self.step < self.steps:
            epoch, done = divmod(self.step, self.sampler.steps)
            self.sampler.begin(epoch, done)
            for batches in chunked(self.loader, self.sampler.parts):
                stopping = self.train_step(batches, stop)
                last = self.step == self.steps
                if self.step % args.log_interval == 0 or last:
                    figures = self.collect_metrics(begun)
                    begun = time.time()
                    if log:
                        log.write(self.step, figures)
                if self.measures and (self.step % args.eval_interval == 0 or last):
                    loss = self.validate()
                    if log:
                        log.write(self.step, {"val_loss": loss})
                    begun = time.time()
                if self.step % args.save_interval == 0 or last or stopping:
                    saved = self.save()
                if stopping:
                    break
            if stopping:
                break
        if log:
            if self.problems.count:
                print(self.problems)
            log.close({reason: len(numbers) for reason, numbers in self.problems.numbers.items()})
        self.processes.barrier()
        self.finish(stop, saved)

    def finish(self, stop, saved):
        """The last word: what was saved, and an exit code that tells whether the run came to its end."""
        stop.restore_handlers()
        if not saved:
            raise BadInput(f"the last weights could not be saved: make room in {self.args.out_dir}, then --resume")
        if self.processes.is_main:
            print(f"saved {self.weights_file}" + (f" after step {self.step}" if stop.signal else ""), flush=True)
        if self.step < self.steps:
            if self.processes.is_main:
                tell("stopped; the same command with --resume goes on from here")
            sys.exit(128 + (stop.signal or signal.SIGTERM))

    def train_step(self, batches, stop):
        """One optimizer step over its micro-batches. True if some process was asked to stop.

        The loss is summed over answers and divided by the number of answer tokens in all micro-batches of all processes,
        so that how a global batch is divided changes nothing. A step whose gradient is not finite changes nothing, on all
        processes alike, as all have the same gradient; nobody waits for the device to find out.
        """
        args = self.args
        for batch in batches:
            self.problems.take(batch)
        torch.manual_seed(int(np.random.SeedSequence([args.seed, self.step, self.processes.rank]).generate_state(1)[0]))
        rate = learning_rate_at(self.step, self.steps, args.learning_rate, args.warmup_iters)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        answers = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        agreed = self.processes.all_reduce(torch.tensor([answers, float(stop.signal is not None)], dtype=torch.float64))
        answers, stopping = agreed.tolist()
        total = torch.zeros((), device=args.device)
        for i, batch in enumerate(batches):
            waits = self.processes.world_size > 1 and i < len(batches) - 1  # gradients are exchanged with the last one
            with self.wrapped_model.no_sync() if waits else contextlib.nullcontext():
                total = total + self.forward_backward(batch, answers)
        self.scaler.unscale_(self.optimizer)
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip)
        good = self.norm.isfinite()
        self.optimizer_step(good)
        self.loss_stats += torch.where(good, torch.stack([total.float(), torch.ones_like(total).float()]), 0.0)
        row = (self.nonfinite_streak[0] + 1) * ~good
        self.nonfinite_streak = torch.stack([row, torch.maximum(self.nonfinite_streak[1], row)])
        self.step += 1
        self.samples_seen += sum(len(batch["input_ids"]) for batch in batches) * self.processes.world_size
        return bool(stopping)

    def eager_forward_backward(self, batch, answers):
        """Adds the gradients of one micro-batch; returns its loss."""
        loss = self.compute_loss(batch, answers)
        # DistributedDataParallel averages gradients over processes; the loss is already a share of the whole
        self.scaler.scale(loss * self.processes.world_size).backward()
        return loss.detach()

    def optimizer_step(self, good):
        """The optimizer's step, left out if `good` is false; with a scaler, that looks for itself."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = (~good).float()  # what GradScaler tells fused optimizers, on the device
            self.optimizer.step()
        elif good:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.use_cuda_graphs)

    def compute_loss(self, batch, answers):
        """One micro-batch's summed loss over `answers`, the answer tokens of the whole step."""
        device = self.args.device
        batch = {name: None if x is None else x.to(device, non_blocking=True) for name, x in batch.items()}
        features = batch.get("image_features")
        if features is not None:
            features = features.to(torch.float32)
        elif batch["pixel_values"] is not None:
            features = self.encoder(batch["pixel_values"]).to(torch.float32)
        model = self.wrapped_model if self.wrapped_model.training else self.model  # only gradients are to be exchanged
        with torch.autocast(device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            return model(
                batch["input_ids"],
                image_features=features,
                labels=batch["labels"],
                label_positions=batch["label_positions"],
                num_items_in_batch=answers,
            ).loss

    def collect_metrics(self, begun):
        """What is logged of the steps since `begun`. BadInput after too many of them without a finite gradient."""
        loss, counted = self.processes.all_reduce(
            torch.stack([self.loss_stats[0], self.loss_stats[1] / self.processes.world_size])
        ).tolist()
        seconds = time.time() - begun  # now that they are done
        steps = self.step % self.args.log_interval or self.args.log_interval
        self.skipped += steps - round(counted)
        if self.nonfinite_streak[1] >= PATIENCE:
            raise BadInput(
                f"{PATIENCE} steps in a row had a gradient that is not finite; {self.weights_file} is as last saved: "
                "--resume it with a lower --learning_rate or more --warmup_iters is another run, so start anew from it "
                "with --from_weights; look at the data of these steps; with --dtype float16 try float32"
            )
        figures = {
            "loss": loss / counted if counted else math.nan,
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_s": self.samples_seen / seconds,
            "grad_norm": self.norm.item(),
            "epoch": self.step / self.sampler.steps,
        }
        self.loss_stats, self.samples_seen = torch.zeros_like(self.loss_stats), 0
        return {**figures, "skipped": self.skipped} if self.skipped else figures

    @torch.no_grad()
    def validate(self):
        """Mean loss over the answers that are held out."""
        self.wrapped_model.eval()
        sums = torch.zeros(2, device=self.args.device)
        for batch in self.held_out:
            self.held_out.dataset.problems.take(batch)
            sums[0] += self.compute_loss(batch, 1)
            sums[1] += (batch["labels"] != -100).sum()
        loss, answers = self.processes.all_reduce(sums).tolist()
        self.wrapped_model.train()
        return loss / answers


def chunked(batches, size):
    """Lists of `size` batches, the last one possibly shorter."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
