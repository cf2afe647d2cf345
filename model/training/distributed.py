"""The processes of one training, and the signals that tell them to stop."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


class Processes:
    """This process's place among those that torchrun started; one process alone where it did not."""

    def __init__(self, device):
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if self.world_size > 1:
            if device.startswith("cuda"):
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            self.init_group("nccl" if device.startswith("cuda") else "gloo")
            # small things go from host to host, so that no GPU is waited for; the first may be long at CLIP's features
            self.host_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))

    def init_group(self, backend):
        """Makes the process group.

        torchrun without --rdzv_backend keeps its store when it starts the processes again, with the addresses of the dead
        in it, and the new ones would call those: they leave theirs under a name of their own.
        """
        store, rank, world = next(dist.rendezvous("env://"))
        if store.check(["initialised before"]):
            fresh = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        else:
            fresh = store
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=world)
        dist.barrier()
        store.set("initialised before", "")

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        if self.world_size > 1:
            dist.barrier(self.host_group)

    def all_reduce(self, tensor):
        """Adds a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=None if tensor.is_cuda else self.host_group)
        return tensor

    def broadcast(self, value):
        """What the first process has, in all of them."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def all_gather(self, value):
        """What every process has, as a list in all of them."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


class Stop:
    """Asked for by Ctrl-C or SIGTERM: the loop ends after its step. A second Ctrl-C ends the process at once."""

    def __init__(self, quiet):
        self.quiet, self.signal, self.since = quiet, None, 0.0
        self.previous_handlers = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        # from a terminal under torchrun the first Ctrl-C comes twice: by itself and through torchrun
        if self.signal is not None and number == signal.SIGINT and time.monotonic() - self.since > 1:
            os._exit(130)
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            if not self.quiet:
                print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    def restore_handlers(self):
        """Signals do again what they did before."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)


def ignore_signals(_):
    """For the workers that read data: a terminal's Ctrl-C and torchrun's SIGTERM go to all, and are for the loop to heed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # and not SIG_IGN for SIGTERM, by which the loop ends them
