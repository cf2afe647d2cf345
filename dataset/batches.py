"""Batch samplers: which samples share a batch, in which order batches come, and which process gets them."""

import math

import numpy as np

from model.errors import BadInput

from .records import chunked


class StepBatches:
    """Base of the two training samplers: the samples, this process's rank, and the point in training to start at.

    For each optimizer step they yield `micro_batches` lists of sample indices on every process. All processes draw the same
    order and deal out the same step, so what a step contains doesn't depend on the number of processes.

    indices: the samples to use; lengths: of all samples, in tokens. step_size: samples or batches, as `unit` says, per step over
    all processes. BadInput if that is less than one for each process.
    """

    unit = None  # "samples" or "batches"

    def __init__(self, indices, lengths, step_size, rank, world, seed):
        if step_size < world:
            raise BadInput(
                f"{world} processes can't share the {step_size} {self.unit} of a step: resume with at most {step_size}"
            )
        self.indices = indices
        self.lengths = lengths[indices]
        self.step_size = step_size
        self.rank = rank
        self.world = world
        self.seed = seed
        self.begin(0)

    def begin(self, epoch, done=0):
        """Sets which epoch is iterated next, and how many of its steps to skip because they are done."""
        self.epoch = epoch
        self.done = done


class LengthBatches(StepBatches):
    """Batches of `batch_size` samples of similar length, in a new random order each epoch.

    A step has `samples_per_step` samples over all processes. Each group of 64 steps of the shuffled order is sorted by
    length and divided into steps, which are then shuffled again. Rank r takes every world-th sample of a step, starting
    at r. The last step of an epoch may be smaller; the fewer than `world` samples that can't be dealt evenly are left out
    of that epoch.
    """

    unit = "samples"

    def __init__(self, indices, lengths, samples_per_step, batch_size, rank=0, world=1, seed=0):
        super().__init__(indices, lengths, samples_per_step, rank, world, seed)
        self.samples_per_step = samples_per_step
        self.batch_size = batch_size

    @property
    def steps(self):
        """Optimizer steps per epoch."""
        full, rest = divmod(len(self.indices), self.samples_per_step)
        return full + (rest >= self.world)

    @property
    def micro_batches(self):
        """Batches that this process yields for a full step."""
        own_samples = len(range(self.rank, self.samples_per_step, self.world))
        return math.ceil(own_samples / self.batch_size)

    def __len__(self):
        full, rest = divmod(len(self.indices), self.samples_per_step)
        return self.micro_batches * full + math.ceil(rest // self.world / self.batch_size)

    def __iter__(self):
        # a new order for each epoch, the same on all processes
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.indices))

        # sort each group by length; lexsort is stable, so samples of the same length stay shuffled
        group = np.arange(len(order)) // (64 * self.samples_per_step)
        order = order[np.lexsort((self.lengths[order], group))]

        # shuffle the full steps; the smaller one, if there is one, stays last
        full = len(order) // self.samples_per_step
        steps = [*rng.permutation(full), *range(full, self.steps)]

        for i in steps[self.done :]:
            step = order[i * self.samples_per_step : (i + 1) * self.samples_per_step]
            # the smaller step: only as many samples as give every process the same number
            if i == full:
                step = step[: len(step) // self.world * self.world]
            # this process's share, in micro-batches
            own = self.indices[step[self.rank :: self.world]]
            yield from chunked(own.tolist(), self.batch_size)


class TokenBatches(StepBatches):
    """Batches of as many samples of similar length as fit into `batch_tokens`, padding included.

    A step has `batches_per_step` batches over all processes; rank r takes every world-th of them, starting at r. Batch
    boundaries depend only on the lengths, sorted from long to short; each epoch shuffles the samples of the same length,
    and the steps. The last step may have smaller batches; fewer than `batches_per_step` samples are left out.
    BadInput if the longest sample alone exceeds a batch.
    """

    unit = "batches"

    def __init__(self, indices, lengths, batch_tokens, batches_per_step, rank=0, world=1, seed=0):
        super().__init__(indices, lengths, batches_per_step, rank, world, seed)
        self.batches_per_step = batches_per_step
        padded = np.sort(-self.lengths) // 8 * -8  # rounded up to 8 as `collate` does, from long to short
        if padded[0] > batch_tokens:
            raise BadInput(f"the longest sample has {padded[0]} tokens, over --batch_tokens {batch_tokens}: raise it")

        # step i has the samples from bounds[i] to bounds[i + 1]; its longest sample decides how many fit into a batch
        self.bounds = [0]
        while (left := len(padded) - self.bounds[-1]) >= batches_per_step:
            longest = padded[self.bounds[-1]]
            samples_per_batch = min(batch_tokens // longest, left // batches_per_step)
            self.bounds.append(self.bounds[-1] + int(samples_per_batch) * batches_per_step)

    @property
    def steps(self):
        """Optimizer steps per epoch."""
        return len(self.bounds) - 1

    @property
    def micro_batches(self):
        """Batches that this process yields for each step."""
        return len(range(self.rank, self.batches_per_step, self.world))

    def __len__(self):
        return self.micro_batches * self.steps

    def __iter__(self):
        # shuffle, then sort from long to short; the sort is stable, so samples of the same length stay shuffled
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.indices))
        order = self.indices[order[np.argsort(-self.lengths[order], kind="stable")]]

        # steps in random order; their samples are dealt to the batches in turn
        for i in rng.permutation(self.steps)[self.done :]:
            step = order[self.bounds[i] : self.bounds[i + 1]]
            for batch in range(self.rank, self.batches_per_step, self.world):
                yield step[batch :: self.batches_per_step].tolist()


class SortedBatches:
    """Batch sampler for validation: each sample once, in batches of similar length; rank r takes every world-th batch."""

    def __init__(self, indices, lengths, batch_size, rank=0, world=1):
        by_length = indices[np.argsort(lengths[indices], kind="stable")]
        self.batches = list(chunked(by_length.tolist(), batch_size))[rank::world]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)
