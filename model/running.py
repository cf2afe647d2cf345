"""What surrounds a training loop: the processes of torchrun, signals to stop, and the log."""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from .errors import BadInput


class Processes:
    """This process's place among those that torchrun started; one process alone where it did not."""

    def __init__(self, device):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if self.world > 1:
            if device.startswith("cuda"):
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            self.meet("nccl" if device.startswith("cuda") else "gloo")
            # small things go from host to host, so that no GPU is waited for; the first may be long at CLIP's features
            self.hosts = dist.new_group(backend="gloo", timeout=timedelta(hours=12))

    def meet(self, backend):
        """Makes the process group.

        torchrun without --rdzv_backend keeps its store when it starts the processes again, with the addresses of the dead
        in it, and the new ones would call those: they leave theirs under a name of their own.
        """
        store, rank, world = next(dist.rendezvous("env://"))
        if store.check(["met before"]):
            fresh = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        else:
            fresh = store
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=world)
        dist.barrier()
        store.set("met before", "")

    @property
    def first(self):
        return self.rank == 0

    def wait(self):
        if self.world > 1:
            dist.barrier(self.hosts)

    def sum(self, tensor):
        """Adds a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=None if tensor.is_cuda else self.hosts)
        return tensor

    def from_first(self, value):
        """What the first process has, in all of them."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def gather(self, value):
        """What every process has, as a list in all of them."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.hosts)
        return values

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


class Stop:
    """Asked for by Ctrl-C or SIGTERM: the loop ends after its step. A second Ctrl-C ends the process at once."""

    def __init__(self, quiet):
        self.quiet, self.signal, self.since = quiet, None, 0.0
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        # from a terminal under torchrun the first Ctrl-C comes twice: by itself and through torchrun
        if self.signal is not None and number == signal.SIGINT and time.monotonic() - self.since > 1:
            os._exit(130)
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            if not self.quiet:
                print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    def end(self):
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals(_):
    """For the workers that read data: a terminal's Ctrl-C and torchrun's SIGTERM go to all, and are for the loop to heed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # and not SIG_IGN for SIGTERM, by which the loop ends them


class Log:
    """Where the figures of a run go: a bar or plain lines, a JSON-lines file, and Weights & Biases if asked.

    step: where the run continues; what the file has beyond it, of a run that was cut off, is taken out.
    """

    def __init__(self, args, name, step, steps, wandb_id=None):
        path = Path(args.out_dir) / f"{name}.jsonl"
        try:
            self.file = open(path, "r+" if step and path.exists() else "a", encoding="utf-8")  # noqa: SIM115
            if step:
                self.forget_beyond(step)
            self.file.write(
                json.dumps({"run": name, "step": step, "steps": steps, "time": time.time(), "args": vars(args)}) + "\n"
            )
        except OSError as error:
            raise BadInput(f"{path} could not be written ({error.strerror}): name another --out_dir") from None
        self.bar = tqdm(total=steps, initial=step, desc=name, disable=not sys.stderr.isatty())
        self.first, self.steps, self.begun = step, steps, time.time()
        self.full = False
        self.wandb = self.open_wandb(args, wandb_id) if args.use_wandb else None

    def forget_beyond(self, step):
        """Cuts the file before the first line of the last run that tells of a later step."""
        lines = self.file.readlines()
        last = max((i for i, line in enumerate(lines) if line.startswith('{"run"')), default=0)
        kept = lines[:last] + [line for line in lines[last:] if whole_step(line) <= step]
        self.file.seek(0)
        self.file.truncate()
        self.file.writelines(kept)

    @staticmethod
    def open_wandb(args, wandb_id):
        """The run at Weights & Biases, or None, with a word about it, where there can be none."""
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds in which it must be reached
        import wandb

        try:
            return wandb.init(
                project=args.wandb_project, name=args.wandb_run_name, config=vars(args), id=wandb_id, resume="allow"
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            tell(f"no Weights & Biases ({reason}): set WANDB_MODE=offline to log here and sync later; going on without")
            return None

    @property
    def wandb_id(self):
        return self.wandb.id if self.wandb else None

    def write(self, step, figures):
        left = (time.time() - self.begun) / (step - self.first) * (self.steps - step) / 60
        figures = {**figures, "epoch_Time": left}
        try:
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.file.flush()
        except OSError as error:
            if not self.full:
                tell(f"{self.file.name} could not be written ({error.strerror}); training goes on")
            self.full = True
        if self.wandb:
            self.wandb.log(figures, step=step)
        if self.bar.disable:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "epoch_Time")
            print(f"step {step}/{self.steps}: {shown}, {left:.1f} min left", flush=True)
        else:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
            self.bar.update(step - self.bar.n)

    def close(self, left_out):
        """left_out: how many records were not used, by reason."""
        self.bar.close()
        try:
            self.file.write(json.dumps({"left_out": left_out}) + "\n")
            self.file.close()
        except OSError:
            pass  # told before
        if self.wandb:
            self.wandb.finish()


def whole_step(line):
    """The step of a line of the log; infinity for a line that was cut off in the middle."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def tell(text):
    """A line for the person who watches, beside a bar that may be moving."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
