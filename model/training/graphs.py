"""Forward and backward of a training step as CUDA graphs: about a thousand kernels that the host launches as one.

The kernels of so small a model take less time to run than the host takes to launch them: on an H100 with a slow host, a
step of 64 captions, 512+8, has 12 ms of work and took 47 ms (tests/benchmarks/LOG.md).
"""

import torch

MAX_GRAPHS = 64  # bounds the time and the memory that captures take


class GraphedForwardBackward:
    """Runs `forward_backward(batch, answer_tokens)`, which adds to `.grad` and returns a loss (), as a CUDA graph.

    The first batch of a shape runs eagerly, kernel by kernel. At the second a graph is captured, which that batch and
    all later ones replay. Beyond MAX_GRAPHS, new shapes always run eagerly. A graph reads and writes fixed memory, so
    `.grad` of every parameter must exist and stay in place, and its next replay overwrites the returned loss.
    """

    def __init__(self, forward_backward, device):
        self.forward_backward = forward_backward
        self.graphs = {}  # shapes -> (inputs, graph, loss)
        self.seen_shapes = set()
        self.buffers = {}
        self.answer_tokens = torch.zeros((), device=device)
        self.pool = torch.cuda.graph_pool_handle()  # graphs run one after the other, so they share their memory

    def __call__(self, batch, answer_tokens):
        shapes = tuple((name, tuple(x.shape)) for name, x in batch.items() if x is not None)
        if shapes not in self.graphs:
            # the eager run also sets up what must not be set up during capture
            if shapes not in self.seen_shapes or len(self.graphs) == MAX_GRAPHS:
                self.seen_shapes.add(shapes)
                return self.forward_backward(batch, answer_tokens)
            self.graphs[shapes] = self.capture(batch)

        # copy the batch to where the graph reads it, then launch all kernels at once
        inputs, graph, loss = self.graphs[shapes]
        for name, x in inputs.items():
            if x is not None:
                x.copy_(batch[name], non_blocking=True)
        self.answer_tokens.fill_(answer_tokens)
        graph.replay()
        return loss

    def capture(self, batch):
        """(inputs, graph, loss): buffers for batches of this shape, the graph, and the tensor () that gets its loss.

        Capturing runs no kernel. `torch.cuda.graph` syncs with the device and empties the allocator's caches first.
        """
        inputs = {name: None if x is None else self.buffer(name, x) for name, x in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # thread_local: the DataLoader's thread may continue to pin memory, which a stricter mode treats as an error
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.forward_backward(inputs, self.answer_tokens)
        return inputs, graph, loss

    def buffer(self, name, x):
        """Memory on the device for an input. Inputs of the same name, shape and dtype share it."""
        key = name, tuple(x.shape), x.dtype
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(x, device=self.answer_tokens.device)
        return self.buffers[key]
