"""The processes of a training run, and the signals that stop it."""

import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from model.arguments import check_device
from model.errors import discard_output


class Processes:
    """This process among those that torchrun started: rank, world size, collectives. Without torchrun, it is alone."""

    def __init__(self, device):
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        # one GPU per process
        if self.world_size > 1 and device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = device
        check_device(device)
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if self.world_size > 1:
            # NCCL moves gradients between GPUs
            if device.startswith("cuda"):
                torch.cuda.set_device(device)
            self.init_group("nccl" if device.startswith("cuda") else "gloo")

            # gloo for small host-side messages: no device sync. Long timeout: building the feature cache can take hours
            self.host_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))

    def init_group(self, backend):
        """Makes the default process group, also after a restart.

        Without --rdzv_backend, torchrun reuses its store after a restart; it still holds the addresses of the dead
        processes. Each restart therefore uses its own key prefix.
        """
        store, rank, world_size = next(dist.rendezvous("env://"))
        if store.check(["initialised before"]):
            own_store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        else:
            own_store = store
        dist.init_process_group(backend, store=own_store, rank=rank, world_size=world_size)

        # mark the store only when no process needs to look at it any more
        dist.barrier()
        store.set("initialised before", "")

    @property
    def is_main(self):
        """Whether this is the process that prints, logs and saves."""
        return self.rank == 0

    @property
    def is_local_main(self):
        """Whether this is the first process of its machine, which prepares files for the others."""
        return int(os.environ.get("LOCAL_RANK", "0")) == 0

    def barrier(self):
        """Waits until all processes have come here."""
        if self.world_size > 1:
            dist.barrier(self.host_group)

    def all_reduce(self, tensor):
        """Sums a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=None if tensor.is_cuda else self.host_group)
        return tensor

    def broadcast(self, value):
        """The main process's value, in all processes; others pass anything. For any object that pickles."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def all_gather(self, value):
        """Every process's value, as a list by rank, in all processes. For any object that pickles."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()

            # ends gloo's threads: one that still holds a tensor while Python exits would abort the process
            self.host_group = None


class Stop:
    """Catches Ctrl-C, SIGTERM and a closed terminal or pipe, so that the loop ends after its step. A second Ctrl-C ends the
    process at once.

    signal: the number of the signal that came first, or None. quiet: prints nothing.
    """

    def __init__(self, quiet):
        self.quiet = quiet
        self.signal = None
        self.asked_at = 0.0
        self.previous_handlers = {}
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no signal for a closed terminal; after `nohup` it should be ignored
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self.previous_handlers[number] = signal.signal(number, self.handle)

        # a closed pipe, as after `| head`, stops as SIGTERM does; SIGPIPE itself is ignored by Python
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (Output(stream, partial(self.handle, signal.SIGTERM, None)) for stream in self.streams)

    def handle(self, number, frame):
        # from a terminal under torchrun, one Ctrl-C arrives twice: directly and through torchrun
        if self.signal is not None and number == signal.SIGINT and time.monotonic() - self.asked_at > 1:
            os._exit(130)
        if self.signal is None:
            self.signal = number
            self.asked_at = time.monotonic()
            if not self.quiet:
                print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    def restore(self):
        """Restores the previous signal handlers and streams."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        sys.stdout, sys.stderr = self.streams


class Output:
    """stdout or stderr of a training, which must not end where it can't be written to: a closed pipe, a full disk.

    After the first error nothing is written any more. on_closed_pipe: called if the error was a closed pipe.
    """

    def __init__(self, stream, on_closed_pipe):
        self.stream = stream
        self.on_closed_pipe = on_closed_pipe

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, method, *arguments):
        try:
            method(*arguments)
        except OSError as error:
            discard_output(self.stream)
            if isinstance(error, BrokenPipeError):
                self.on_closed_pipe()


def ignore_signals(_):
    """For DataLoader workers: stop signals reach every process, but only the training loop handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        # a process group of its own is out of torchrun's reach; not SIG_IGN, as the loop ends its workers with SIGTERM
        os.setpgrp()
