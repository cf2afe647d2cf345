"""The training loop of every stage, alone or under torchrun.

`train` loads what a stage needs and hands it to a `Run`, whose `train_step` is the heart of it.

Shapes: B batch, T tokens, N images in the batch, P tokens per image, V vision width, S picture size, L answer tokens.
"""

import contextlib
import importlib.util
import json
import math
import os
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
from dataset.records import chunked
from model.arguments import model_sizes, pick_dtype
from model.checkpoint import KNOWN_TOKENIZERS, config_of, load_parts, save_weights, tokenizer_hash
from model.errors import BadInput
from model.model import can_use_grouped_mm
from model.stages import STAGES, weights_path

from .distributed import Processes, Stop, ignore_signals
from .feature_cache import open_cache
from .graphs import GraphedForwardBackward
from .logs import Log, tell
from .resume import global_batch_size, load_state_dict, read_state, save_state, state_file
from .stats import RunningStats

PATIENCE = 20  # non-finite steps in a row that end a run
# flags that are saved with the weights, to tell how they were made
RECORDED_FLAGS = ("data_path", "epochs", "batch_size", "batch_tokens", "accumulation_steps", "learning_rate")
RECORDED_FLAGS += ("freeze_llm", "seed")

# --- what a stage needs ---------------------------------------------------------------------------------------------


def prepare(args, weights, allow_missing_projector, resume_state, processes):
    """Loads everything a stage needs: (parts, dataset, validation dataset or None).

    weights: the file to start from, or None for random weights; a resumed run doesn't need it any more.
    Whatever is missing stops the run here, before any work.
    """
    parts = load_parts(
        None if resume_state else weights,
        args.vision_path,
        args.tokenizer_path,
        args.device,
        pick_dtype(args.dtype, args.device),
        sizes=model_sizes(args),
        metadata=resume_state and json.loads(resume_state["metadata"]),
        allow_missing_projector=allow_missing_projector,
        seed=args.seed,
    )
    if processes.is_main:
        print(describe(args, parts, resume_state), flush=True)

    # token ids and answer flags of all records; pictures are read later, batch by batch. One process of each machine
    # reads the files, and the others what it has kept in out_dir
    if not processes.is_local_main:
        processes.barrier()
    datasets = []
    for path in (args.data_path, args.val_path):
        dataset = path and VLMDataset(
            path,
            args.images_path,
            parts.tokenizer,
            parts.model.config,
            args.max_seq_len,
            parts.encoder.preprocess,
            args.out_dir,
            strict=args.strict,
            max_fraction=args.max_bad_fraction,
            notify=tell if processes.is_main else None,
        )
        if path and processes.is_main:
            print(f"data: {dataset.describe()}", flush=True)
        datasets.append(dataset)
    if processes.is_local_main:
        processes.barrier()
    return parts._replace(model=parts.model.to(args.device)), *datasets


def describe(args, parts, resume_state):
    """What is trained, on what, in lines for people."""
    config, encoder = parts.model.config, parts.encoder
    name = KNOWN_TOKENIZERS.get(tokenizer_hash(parts.tokenizer))
    lines = [
        parts.summary or (f"weights of step {resume_state['step']}" if resume_state else "random weights"),
        f"device: {args.device}, {str(pick_dtype(args.dtype, args.device)).removeprefix('torch.')}",
        f"model: {config.dim}+{config.n_layers}, {config.projector} projector, {parts.model.num_parameters():,} parameters"
        + ("; only the projector is trained" if args.freeze_llm else ""),
        f"encoder: {args.vision_path}, frozen; {encoder.image_tokens} tokens for a picture of {encoder.preprocess.size} pixels",
        f"tokenizer: {args.tokenizer_path}, {len(parts.tokenizer):,} tokens" + (f", {name}'s" if name else ""),
    ]
    return "\n".join(lines)


def compile_layers(model, device):
    """Has each layer compiled at the first batch, with dynamic shapes: sizes differ from batch to batch.

    All layers are the same code, so one compilation serves them all; the whole model at once would take several times
    longer. BadInput if the compiler is missing.
    """
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and not shutil.which(compiler):
        raise BadInput(f"--compile needs a C++ compiler, and {compiler} was not found: install one, or leave it out")
    if device.startswith("cuda") and not importlib.util.find_spec("triton"):
        raise BadInput("--compile needs Triton on a GPU, and this PyTorch has none: leave out --compile")
    for layer in model.layers:
        layer.compile(dynamic=True)


def can_use_cuda_graphs(args, config, dtype, world_size):
    """Whether forward and backward can be captured: on one GPU, and with no device sync in them."""
    if not args.device.startswith("cuda") or world_size > 1:
        return False
    # a loop over experts syncs to learn how many tokens each has; grouped matmuls don't
    return not config.use_moe or can_use_grouped_mm(torch.empty(1, device=args.device, dtype=dtype))


def train_val_split(num_samples, fraction, seed):
    """(indices to train on, indices to validate on), both sorted; the latter are a random `fraction` of all samples."""
    rng = np.random.default_rng([seed, 2**31])  # a stream that no epoch uses
    order = rng.permutation(num_samples)
    num_val = round(num_samples * fraction)
    return np.sort(order[num_val:]), np.sort(order[:num_val])


def make_sampler(args, lengths, indices, step_size, processes):
    """Deals the samples `indices` of a dataset to steps and processes; lengths: of all its samples."""
    ranks = processes.rank, processes.world_size
    if args.batch_tokens:
        return TokenBatches(indices, lengths, args.batch_tokens, step_size, *ranks, args.seed)
    return LengthBatches(indices, lengths, step_size, args.batch_size, *ranks, args.seed)


def make_loader(dataset, batch_sampler, args, few_shapes=False):
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=partial(collate, few_shapes=few_shapes),
        num_workers=args.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=args.device.startswith("cuda"),
        persistent_workers=args.num_workers > 0,
    )


def learning_rate_at(step, steps, peak, warmup):
    """Linear warm-up, then a cosine from `peak` to a tenth of it at the last step (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


# --- the loop -------------------------------------------------------------------------------------------------------


def train(args, stage, from_scratch=False):
    """Trains projector and language model, or the projector alone, in one of the `STAGES`; CLIP stays frozen.

    args: flags of `add_training_arguments`. from_scratch: start from random weights.

    With --resume, or when torchrun has restarted it, it continues an interrupted run if there is the state of one.
    """
    starts_from = STAGES[stage].starts_from
    weights = args.from_weights or weights_path(args.out_dir, args, starts_from)
    if from_scratch:
        if args.freeze_llm:
            raise BadInput(
                "--from_scratch starts from a random language model, which has to learn: leave out --freeze_llm; with --demo, "
                "add --freeze_llm False --learning_rate 1e-3"
            )
        weights = None
    # what is written is named after the model's size; so is what a run that is resumed has written
    is_given = weights is not None and args.from_weights and Path(weights).exists()
    named_after = config_of(weights) if is_given else args
    weights_file = weights_path(args.out_dir, named_after, STAGES[stage].writes)

    processes = Processes(args.device)
    args.device = processes.device
    try:
        # if any process was restarted, all resume, from the state that the main process reads
        resume_state = None
        resuming = torch.tensor(float(args.resume or processes.restarted))
        if processes.all_reduce(resuming):
            resume_state = processes.broadcast(read_state(state_file(weights_file)) if processes.is_main else None)
            if resume_state is None and processes.is_main:
                print(f"nothing to resume: {state_file(weights_file)} not found; starting from the beginning")

        # refuse what is missing, and an out_dir that can't be written to, before any work
        try:
            Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{args.out_dir} could not be created ({error.strerror}): name another --out_dir") from None
        before = next((each for each in STAGES.values() if each.writes == starts_from), None)
        if before and not (args.from_weights or from_scratch or resume_state or weights.exists()):
            command = f"python {before.command}{' --demo' if args.demo else ''}"
            raise BadInput(f"{weights} not found: run {command} first, or name other weights with --from_weights")
        parts, dataset, val_dataset = prepare(args, weights, starts_from == "llm", resume_state, processes)

        # run the frozen CLIP once over all pictures; from then on items carry its features instead of pixels
        if args.cache_features:
            for each in filter(None, [dataset, val_dataset]):
                cache = open_cache(
                    each,
                    parts.encoder,
                    processes,
                    folder=Path(args.out_dir) / "features",
                    vision_path=args.vision_path,
                    num_workers=args.num_workers,
                )
                each.use_features(cache)

        run = Run(
            args=args,
            stage=stage,
            processes=processes,
            parts=parts,
            dataset=dataset,
            val_dataset=val_dataset,
            weights_file=weights_file,
            resume_state=resume_state,
        )
        del resume_state  # as large as model and optimizer together
        run.train()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise BadInput(
            f"out of memory ({oom_details(error)}): lower --batch_size (or --batch_tokens), and raise "
            "--accumulation_steps by the same factor to train on the same batches; or lower --max_seq_len"
        ) from None
    finally:
        processes.close()


def oom_details(error):
    """How much memory PyTorch asked for and how much was free, in its own words."""
    words = re.search(r"[Tt]ried to allocate.*?(?=\. (?:Including|Of)|\. Error|$)", str(error))
    return words.group().rstrip(".") if words else str(error).splitlines()[0]


class Run:
    """One stage's training, from its first step, or that of `resume_state`, to its last.

    args: the parsed flags; kept for the log, the resume state and the metadata, while the loop reads attributes.
    val_dataset: the dataset to validate on; without it, --val_fraction of `dataset` is held out.
    parts: what `load_parts` returned; its metadata has a list "training", one entry per earlier stage.
    resume_state: what `read_state` returned, or None.
    """

    def __init__(
        self,
        *,
        args,
        stage,
        processes,
        parts,
        dataset,
        val_dataset=None,
        weights_file,
        resume_state=None,
    ):
        self.args = args
        self.stage = stage
        self.processes = processes
        self.model = model = parts.model
        self.encoder = parts.encoder
        self.tokenizer = parts.tokenizer
        self.history = parts.metadata.get("training", [])
        self.weights_file = weights_file
        self.wandb_id = None

        # flags that the loop reads
        self.device = args.device
        self.dtype = pick_dtype(args.dtype, args.device)
        self.seed = args.seed
        self.learning_rate = args.learning_rate
        self.warmup_iters = args.warmup_iters
        self.grad_clip = args.grad_clip
        self.log_interval = args.log_interval
        self.eval_interval = args.eval_interval
        self.save_interval = args.save_interval
        self.use_cuda_graphs = can_use_cuda_graphs(args, model.config, self.dtype, processes.world_size)

        # training data
        train_indices, val_indices = train_val_split(len(dataset), 0.0 if val_dataset else args.val_fraction, args.seed)
        step_size = global_batch_size(args, processes.world_size, resume_state)
        self.sampler = make_sampler(args, dataset.lengths, train_indices, step_size, processes)
        self.loader = make_loader(dataset, self.sampler, args, few_shapes=self.use_cuda_graphs)
        self.problems = dataset.problems
        self.data_checksum = zlib.crc32(dataset.ids.values.numpy(), zlib.crc32(dataset.lengths))

        # validation data: a dataset of its own, or the samples held out above
        if val_dataset is None:
            val_dataset = dataset
        else:
            val_indices = np.arange(len(val_dataset))
        self.val_loader = None
        if len(val_indices) and args.eval_interval:
            ranks = processes.rank, processes.world_size
            val_sampler = SortedBatches(val_indices, val_dataset.lengths, args.batch_size, *ranks)
            self.val_loader = make_loader(val_dataset, val_sampler, args)

        # optimizer; with --freeze_llm it only has the projector's parameters
        if args.freeze_llm:
            model.requires_grad_(False).vision_proj.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, fused=args.device != "mps")
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=self.dtype == torch.float16)

        # where the run is
        self.step = 0  # optimizer steps done
        self.total_steps = self.sampler.steps * args.epochs
        self.stats = RunningStats(args.device)
        if not self.total_steps:
            raise BadInput(
                f"there is nothing to do: {args.epochs} epochs of {len(train_indices)} samples, and a step takes "
                f"{step_size} {'batches' if args.batch_tokens else 'samples'}"
            )
        if resume_state:
            load_state_dict(self, resume_state)
            if processes.is_main:
                print(f"resuming after step {self.step} of {self.total_steps}", flush=True)

        # what forward and backward go through: compiled layers, DDP, CUDA graphs
        self.wrapped_model = model
        if args.compile:
            compile_layers(model, args.device)
        if processes.world_size > 1:
            self.wrapped_model = DistributedDataParallel(self.wrapped_model)
        self.forward_backward = self.eager_forward_backward
        if self.use_cuda_graphs:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)  # graphs add to it, so it must exist and stay in place
            self.forward_backward = GraphedForwardBackward(self.eager_forward_backward, args.device)

    def train(self):
        """Trains to the last step, or until it is asked to stop. Saves every `save_interval` steps and at the end."""
        is_main = self.processes.is_main
        stop = Stop(quiet=not is_main)
        log = None
        if is_main:
            print(f"steps: {self.total_steps}, in {self.args.epochs} epoch{'s' * (self.args.epochs > 1)}", flush=True)
            log = Log(self.args, self.weights_file.stem, self.step, self.total_steps, self.wandb_id)
            self.wandb_id = log.wandb_id
        save_ok = True
        started = time.time()  # of the steps that the next log line covers
        self.wrapped_model.train()

        while self.step < self.total_steps:
            # a resumed run enters its epoch in the middle
            epoch, steps_done = divmod(self.step, self.sampler.steps)
            self.sampler.begin(epoch, steps_done)
            for micro_batches in chunked(self.loader, self.sampler.micro_batches):
                stopping = self.train_step(micro_batches, stop)
                is_last = self.step == self.total_steps

                # all processes take part in metrics and validation, as they all-reduce; only the main one logs
                if self.is_due(self.log_interval) or is_last:
                    metrics = self.collect_metrics(started)
                    started = time.time()
                    if log and self.log_interval:
                        log.write(self.step, metrics)
                if self.val_loader is not None and (self.is_due(self.eval_interval) or is_last):
                    val_loss = self.validate()
                    if log:
                        log.write(self.step, {"val_loss": val_loss})
                    started = time.time()  # validation doesn't count as training time

                # a failed save doesn't end the run, as a later one may succeed
                if self.is_due(self.save_interval) or is_last or stopping:
                    save_ok = self.save()
                if stopping:
                    break
            if stopping:
                break

        if log:
            if self.problems.count:
                print(self.problems)
            log.close({reason: len(numbers) for reason, numbers in self.problems.by_reason.items()})
        self.processes.barrier()
        self.finish(stop, save_ok)

    def is_due(self, interval):
        """Whether what is done every `interval` steps is due after this one; an interval of 0 means never."""
        return interval > 0 and self.step % interval == 0

    def finish(self, stop, save_ok):
        """Reports what was saved. Exits with 128 + the signal if the run was stopped before its last step."""
        if save_ok and self.processes.is_main:
            print(f"saved {self.weights_file}" + (f" after step {self.step}" if stop.signal else ""), flush=True)
            if self.step < self.total_steps:
                tell("stopped; add --resume to the same command to continue")
        stop.restore()
        if not save_ok:
            raise BadInput(f"the last weights could not be saved: make room in {self.args.out_dir}, then --resume")
        if self.step < self.total_steps:
            # without a signal of its own, this process stops because another one was asked to
            sys.exit(128 + (stop.signal or signal.SIGTERM))

    # --- a step ---

    def train_step(self, micro_batches, stop):
        """One optimizer step over its micro-batches. True if any process was asked to stop.

        The loss is summed over answer tokens and divided by their global number in this step, so it does not depend on
        how the step is split over micro-batches and processes.
        """
        # count the records that could not be read; what is left in a batch are tensors
        for batch in micro_batches:
            self.problems.take(batch)

        # reseed, so that a resumed run draws the same dropout
        seed = np.random.SeedSequence([self.seed, self.step, self.processes.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))

        # determine and set the learning rate for this step
        learning_rate = learning_rate_at(self.step, self.total_steps, self.learning_rate, self.warmup_iters)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        # agree on the global number of answer tokens, and on whether to stop; on the host, so without a device sync
        answer_tokens = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        agreed = torch.tensor([answer_tokens, float(stop.signal is not None)], dtype=torch.float64)
        answer_tokens, stopping = self.processes.all_reduce(agreed).tolist()

        # forward and backward; DDP all-reduces gradients with the last micro-batch only
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            skip_all_reduce = self.processes.world_size > 1 and not is_last
            with self.wrapped_model.no_sync() if skip_all_reduce else contextlib.nullcontext():
                loss = loss + self.forward_backward(batch, answer_tokens)

        # a non-finite gradient is the same on all ranks: all skip the update, without a device sync
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        is_finite = grad_norm.isfinite()
        self.optimizer_step(is_finite)

        # statistics stay on the device until the next log line
        samples = sum(len(batch["input_ids"]) for batch in micro_batches) * self.processes.world_size
        self.stats.add(loss=loss, grad_norm=grad_norm, is_finite=is_finite, samples=samples)
        self.step += 1
        return bool(stopping)

    def eager_forward_backward(self, batch, answer_tokens):
        """Adds the gradients of one micro-batch to `.grad`; returns its loss (), detached."""
        loss = self.compute_loss(batch, answer_tokens)
        # DDP averages gradients over processes, but the loss is already this process's share of a global mean: undo it
        self.scaler.scale(loss * self.processes.world_size).backward()
        return loss.detach()

    def compute_loss(self, batch, answer_tokens):
        """Loss () of a micro-batch: the sum over its answer tokens, divided by the whole step's number of them."""
        inputs = {}
        for name, tensor in batch.items():
            inputs[name] = None if tensor is None else tensor.to(self.device, non_blocking=True)

        # features (N, P, V): from the cache, or from pixels (N, 3, S, S); None without pictures
        features = inputs.get("image_features")
        if features is None and inputs["pixel_values"] is not None:
            features = self.encoder(inputs["pixel_values"])
        if features is not None:
            features = features.to(torch.float32)

        # DDP's wrapper only while training: validation has no gradients to all-reduce
        model = self.wrapped_model if self.wrapped_model.training else self.model
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            return model(
                inputs["input_ids"],  # (B, T)
                image_features=features,
                labels=inputs["labels"],  # (B, T), -100 everywhere but on answers
                label_positions=inputs["label_positions"],  # (L,)
                num_items_in_batch=answer_tokens,
            ).loss

    def optimizer_step(self, is_finite):
        """The optimizer's step, skipped if `is_finite`, a bool tensor (), is false. GradScaler makes its own check."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults["fused"]:
            # the flag that GradScaler hands to fused optimizers; private API, no device sync
            self.optimizer.found_inf = (~is_finite).float()
            self.optimizer.step()
        elif is_finite:  # a device sync, on MPS only
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.use_cuda_graphs)

    # --- what is measured and saved ---

    def collect_metrics(self, started):
        """Metrics of the steps since the last log line. started: when they began. BadInput if training diverges."""
        stats = self.stats.collect(self.processes)
        seconds = time.time() - started  # after the device sync in `collect`, so the steps are done
        if stats["nonfinite_streak"] >= PATIENCE:
            kept = ""
            start = "Start a new run with"
            if self.weights_file.exists():
                kept = f" {self.weights_file} still holds the last good weights."
                start += f" --from_weights {self.weights_file} and"
            raise BadInput(
                f"{PATIENCE} steps in a row had NaN or inf gradients.{kept} {start} a lower --learning_rate or more "
                "--warmup_iters (--resume needs unchanged settings); check the data of these steps; if you use "
                "--dtype float16, try float32"
            )
        metrics = {
            "loss": stats["loss"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_s": stats["samples"] / seconds,
            "grad_norm": stats["grad_norm"],
            "epoch": self.step / self.sampler.steps,
        }
        if stats["skipped"]:
            metrics["skipped"] = stats["skipped"]
        return metrics

    @torch.no_grad()
    def validate(self):
        """Mean loss over the answer tokens of the validation data."""
        self.wrapped_model.eval()

        # divided by 1, a batch's loss is a sum over tokens; so the mean doesn't depend on how samples are batched
        sums = torch.zeros(2, device=self.device)  # [loss, answer tokens]
        for batch in self.val_loader:
            self.val_loader.dataset.problems.take(batch)
            sums[0] += self.compute_loss(batch, answer_tokens=1)
            sums[1] += (batch["labels"] != -100).sum()

        # a process may have had no batch at all, but all have the sums
        loss, answer_tokens = self.processes.all_reduce(sums).tolist()
        self.wrapped_model.train()
        return loss / answer_tokens

    def save(self):
        """Saves weights and resume state, replacing the last ones only once complete. False if that failed."""
        # each process has counted the bad records among its own samples
        self.problems.merge(self.processes.all_gather(self.problems.by_reason))
        if not self.processes.is_main:
            return True

        # never overwrite good weights with bad ones
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            tell(f"the weights contain NaN or inf: {self.weights_file} was not overwritten")
            return False

        # metadata: how the weights were made, stage by stage, for people and for the next stage
        this_stage = {
            "stage": self.stage,
            **{name: getattr(self.args, name) for name in RECORDED_FLAGS},
            "steps": self.step,
            "processes": self.processes.world_size,
        }
        metadata = {"stage": self.stage, "step": self.step, "training": [*self.history, this_stage]}

        # weights first: if saving the state then fails, resuming from the older one repeats the same steps
        try:
            save_weights(self.weights_file, self.model, self.tokenizer, self.encoder, **metadata)
            save_state(state_file(self.weights_file), self)
        except OSError as error:
            tell(f"could not save to {self.args.out_dir} ({error.strerror}): the last good files are kept")
            return False
        return True
