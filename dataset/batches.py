"""Batch samplers: which samples stand together in a batch, in which order, and which process has them."""

import math

import numpy as np

from model.errors import BadInput


class LengthBatches:
    """Batch sampler: a new random order each epoch, in which every batch holds samples of like length.

    Each group of 64 global batches of the shuffled order is sorted by length, cut into batches, and the batches are
    shuffled again. All processes draw the same order. A global batch has `size` samples: rank r takes every world-th of
    them from r on, and yields them as `parts` batches of `batch_size`, so that the samples of a step don't depend on how
    they are divided. The last global batch of an epoch may be smaller; the fewer than `world` samples that can't be dealt
    evenly are left out of that epoch.

    indices: the samples to use; lengths: of all samples. BadInput if a step has fewer samples than there are processes.
    """

    def __init__(self, indices, lengths, size, batch_size, rank=0, world=1, seed=0):
        self.indices, self.lengths, self.size, self.batch_size = indices, lengths[indices], size, batch_size
        self.rank, self.world, self.seed = rank, world, seed
        if size < world:
            raise BadInput(f"{world} processes can't share the {size} samples of a step: resume with at most {size}")
        self.begin(0)

    def begin(self, epoch, done=0):
        """Sets the epoch that is iterated next, and how many of its global batches have been seen already."""
        self.epoch, self.done = epoch, done

    @property
    def steps(self):
        """Global batches an epoch."""
        return len(self.indices) // self.size + (len(self.indices) % self.size >= self.world)

    @property
    def parts(self):
        """Batches that this process yields of a whole global batch."""
        return math.ceil(len(range(self.rank, self.size, self.world)) / self.batch_size)

    def __len__(self):
        left = len(self.indices) % self.size // self.world
        return self.parts * (len(self.indices) // self.size) + math.ceil(left / self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.indices))
        # a stable sort by (group, length) keeps the random order among samples of the same length
        order = order[np.lexsort((self.lengths[order], np.arange(len(order)) // (64 * self.size)))]
        whole = len(order) // self.size
        for i in [*rng.permutation(whole), *range(whole, self.steps)][self.done :]:  # the smaller one is the last
            batch = order[i * self.size : (i + 1) * self.size]
            if i == whole:
                batch = batch[: len(batch) // self.world * self.world]
            yield from cut_up(self.indices[batch[self.rank :: self.world]], self.batch_size)


class TokenBatches:
    """Batch sampler: as many samples of like length a batch as fit into `batch_tokens`, padding included.

    Where a batch ends hangs on the lengths alone, which are sorted from long to short; the order among samples of the same
    length, and that of the batches, is a new one each epoch. A step has `size` batches, of which rank r takes every world-th,
    so that they don't depend on how they are dealt. The last step's may be smaller; fewer than `size` samples are left out.

    indices, lengths: as in `LengthBatches`. BadInput if the longest sample alone is longer than a batch.
    """

    def __init__(self, indices, lengths, batch_tokens, size, rank=0, world=1, seed=0):
        self.indices, self.lengths, self.size = indices, lengths[indices], size
        self.rank, self.world, self.seed = rank, world, seed
        rounded = np.sort(-self.lengths) // 8 * -8  # as `collate` rounds, from long to short
        if rounded[0] > batch_tokens:
            raise BadInput(f"the longest sample has {rounded[0]} tokens, over --batch_tokens {batch_tokens}: raise it")
        if size < world:
            raise BadInput(f"{world} processes can't share the {size} batches of a step: resume with at most {size}")
        self.cuts = [0]  # where each step's samples begin, and the last one's end
        while len(rounded) - self.cuts[-1] >= size:
            samples = min(batch_tokens // rounded[self.cuts[-1]], (len(rounded) - self.cuts[-1]) // size)
            self.cuts.append(self.cuts[-1] + int(samples) * size)
        self.begin(0)

    def begin(self, epoch, done=0):
        """Sets the epoch that is iterated next, and how many of its steps have been seen already."""
        self.epoch, self.done = epoch, done

    @property
    def steps(self):
        """Optimizer steps an epoch."""
        return len(self.cuts) - 1

    @property
    def parts(self):
        """Batches that this process yields for each step."""
        return len(range(self.rank, self.size, self.world))

    def __len__(self):
        return self.parts * self.steps

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.indices))
        order = self.indices[order[np.argsort(-self.lengths[order], kind="stable")]]
        for i in rng.permutation(self.steps)[self.done :]:
            step = order[self.cuts[i] : self.cuts[i + 1]]
            for batch in range(self.rank, self.size, self.world):
                yield step[batch :: self.size].tolist()


class SortedBatches:
    """Batch sampler for measuring: each sample once, in batches of like length; rank r takes every world-th batch."""

    def __init__(self, indices, lengths, batch_size, rank=0, world=1):
        batches = cut_up(indices[np.argsort(lengths[indices], kind="stable")], batch_size)
        self.batches = list(batches)[rank::world]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def cut_up(indices, size):
    """An array as lists of `size` of its numbers, the last one possibly shorter."""
    for begin in range(0, len(indices), size):
        yield indices[begin : begin + size].tolist()
