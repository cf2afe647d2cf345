"""What a run counts between two log lines."""

import math

import torch


class RunningStats:
    """Loss, gradient norm and non-finite steps since the last log line.

    The counters stay on the device: `add` only queues kernels, and `collect` alone syncs.
    """

    def __init__(self, device):
        self.device = device
        self.loss_stats = torch.zeros(2, device=device)  # [loss sum, number of steps], of finite steps only
        self.nonfinite_streak = torch.zeros(2, device=device)  # non-finite steps in a row: [current, longest]
        self.grad_norm = torch.full((), math.nan, device=device)  # of the last step
        self.steps = 0
        self.samples_seen = 0
        self.skipped = 0  # non-finite steps of the whole run, as of the last `collect`

    def add(self, *, loss, grad_norm, is_finite, samples):
        """Counts a step, without a device sync.

        loss (this process's share), grad_norm, is_finite: tensors () on the device. samples: of all processes.
        """
        # torch.where, not a product: 0 * NaN is NaN
        self.loss_stats += torch.where(is_finite, torch.stack([loss.float(), torch.ones_like(loss).float()]), 0.0)

        # a finite step ends the current streak; the longest one is remembered
        current = (self.nonfinite_streak[0] + 1) * ~is_finite
        self.nonfinite_streak = torch.stack([current, torch.maximum(self.nonfinite_streak[1], current)])

        self.grad_norm = grad_norm
        self.steps += 1
        self.samples_seen += samples

    def collect(self, processes):
        """Returns a summary of the steps since the last call, and starts a new one. Syncs with the device.

        loss: the mean over finite steps, NaN if there are none. grad_norm: the last step's. nonfinite_streak (the
        longest) and skipped are the whole run's.
        """
        # each process has a share of every loss, but all count the same steps
        shares = torch.stack([self.loss_stats[0], self.loss_stats[1] / processes.world_size])
        loss, finite_steps = processes.all_reduce(shares).tolist()
        self.skipped += self.steps - round(finite_steps)
        collected = {
            "loss": loss / finite_steps if finite_steps else math.nan,
            "grad_norm": self.grad_norm.item(),
            "samples": self.samples_seen,
            "nonfinite_streak": int(self.nonfinite_streak[1]),
            "skipped": self.skipped,
        }

        # the streak continues across log lines
        self.loss_stats = torch.zeros_like(self.loss_stats)
        self.steps = 0
        self.samples_seen = 0
        return collected

    def state_dict(self):
        """What a resumed run continues to count; not the samples, which only measure the speed of this start."""
        names = ("loss_stats", "nonfinite_streak", "steps", "skipped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        self.loss_stats = state["loss_stats"].to(self.device)
        self.nonfinite_streak = state["nonfinite_streak"].to(self.device)
        self.steps = state["steps"]
        self.skipped = state["skipped"]
