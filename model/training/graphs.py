"""Forward and backward of a training step as CUDA graphs: about a thousand kernels that the host starts as one.

The kernels of so small a model are shorter than the time the host takes to start them: on an H100 a step of 64 captions, 512+8,
has 12 ms of work and took 47 ms (tests/benchmarks/LOG.md).
"""

import torch

MAX_GRAPHS = 64


class GraphedForwardBackward:
    """Calls `forward_backward(batch, answers)`, which returns a loss and adds its gradients to those of the parameters.

    A batch whose shapes were met before is captured as a graph, and replayed from then on; other shapes run kernel by kernel.
    A graph reads and writes fixed memory, so `.grad` of every parameter must exist and stay where it is.
    """

    def __init__(self, forward_backward, device):
        self.forward_backward = forward_backward
        self.graphs, self.met, self.buffers = {}, set(), {}
        self.answers = torch.zeros((), device=device)
        self.pool = torch.cuda.graph_pool_handle()  # graphs run one after the other, so they share their memory

    def __call__(self, batch, answers):
        shapes = tuple((name, tuple(x.shape)) for name, x in batch.items() if x is not None)
        if shapes not in self.graphs:
            if shapes not in self.met or len(self.graphs) == MAX_GRAPHS:
                self.met.add(shapes)
                return self.forward_backward(batch, answers)
            self.graphs[shapes] = self.capture(batch)
        inputs, graph, loss = self.graphs[shapes]
        for name, x in inputs.items():
            if x is not None:
                x.copy_(batch[name], non_blocking=True)
        self.answers.fill_(answers)
        graph.replay()
        return loss

    def capture(self, batch):
        """(inputs, graph, loss): what a batch of this shape is copied into, what is replayed, where its loss then stands."""
        inputs = {name: None if x is None else self.buffer(name, x) for name, x in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins batches goes on meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.forward_backward(inputs, self.answers)
        return inputs, graph, loss

    def buffer(self, name, x):
        """Memory on the device for an input; inputs of the same name and shape share it."""
        key = name, tuple(x.shape), x.dtype
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(x, device=self.answers.device)
        return self.buffers[key]
