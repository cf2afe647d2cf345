"""Smaller and faster answers on a CPU: weights in 8 bits, and the fastest kernel for a single row."""

import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from .errors import BadInput


def quantize(model, device):
    """Replaces each linear layer by PyTorch's dynamically quantised one: weights in 8 bits, with one scale per row."""
    if device.type != "cpu":
        raise BadInput(f"--quantize int8 is for CPUs, and the model is on {device}: use --device cpu")
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError:
        raise BadInput(
            f"PyTorch {torch.__version__} has no torch.ao.quantization: install the version in requirements.txt"
        ) from None
    # tensors loaded from a file are mapped from it: a single one left as it is would keep the whole file in memory
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    # PyTorch warns that torchao will replace this; torchao is slower on a CPU today (tests/benchmarks/LOG.md)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def matvec(x, weight):
    """x, a row of `in` numbers, times weight (out, in) -> (out,), as a matrix-vector product."""
    return torch.mv(weight, x.flatten())


def sliced_bmm(x, weight, slices=8):
    """The same as one batched matmul over slices of the matrix."""
    column = x.view(1, -1).t().expand(slices, -1, 1)  # (slices, in, 1), with strides that take the fast path
    return torch.bmm(weight.view(slices, -1, weight.shape[1]), column).flatten()


class RowLinear(nn.Linear):
    """`nn.Linear` that multiplies a single row, as in decoding, by the kernel that is fastest on this CPU.

    Same result up to rounding. Which kernel is fastest depends on the CPU and the dtype (tests/benchmarks/LOG.md), so all
    are timed when a model is loaded.
    """

    def forward(self, x):
        if x.numel() != self.in_features:
            return super().forward(x)
        return self.kernel(x, self.weight).view(*x.shape[:-1], -1)

    @classmethod
    @torch.inference_mode()
    def install(cls, model):
        """Turns a model's linear layers into this class if that is faster, except those with a bias, or whose output width is not a multiple of 8."""
        layers = [module for module in model.modules() if type(module) is nn.Linear]
        layers = [layer for layer in layers if layer.bias is None and layer.out_features % 8 == 0]
        rows = [layer.weight.new_ones(1, 1, layer.in_features) for layer in layers]

        def seconds(kernel):
            """Time to multiply every matrix by a row once."""
            started = time.perf_counter()
            for layer, row in zip(layers, rows, strict=True):
                kernel(row, layer.weight)
            return time.perf_counter() - started

        times = {kernel: min(seconds(kernel) for _ in range(4)) for kernel in (F.linear, matvec, sliced_bmm)}
        fastest = min(times, key=times.get)
        # require a clear win: otherwise noise would decide, and with it how answers are rounded
        if times[fastest] < 0.8 * times[F.linear]:
            for layer in layers:
                # change the class in place: names, weights and references to the layers stay as they are
                layer.__class__ = cls
                layer.kernel = fastest
