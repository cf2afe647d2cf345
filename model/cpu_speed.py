"""A model that answers on a CPU, smaller or faster: weights in 8 bits, and rows multiplied by the kernel fastest there."""

import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from .errors import BadInput


def quantize(model, device):
    """Puts PyTorch's dynamically quantised layer in place of each linear one: weights in 8 bits, with one scale a row."""
    if device.type != "cpu":
        raise BadInput(f"--quantize int8 is for CPUs, and the model is on {device}: use --device cpu")
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError:
        raise BadInput(
            f"PyTorch {torch.__version__} has no torch.ao.quantization any more: install the version of requirements.txt"
        ) from None
    for parameter in model.parameters():  # a single float32 tensor left would keep the file it is mapped from in memory
        parameter.data = parameter.data.clone()
    # it warns that torchao is to take its place one day; that is slower on a CPU now (tests/benchmarks/LOG.md)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def matvec(x, weight):
    """x (1, 1, in) times weight (out, in) -> (1, 1, out), as a matrix times a vector."""
    return torch.mv(weight, x.flatten())[None, None]


def sliced_bmm(x, weight, slices=8):
    """The same by slices of the matrix, all in one batched product."""
    column = x.view(1, -1).t().expand(slices, -1, 1)  # (slices, in, 1), with strides that take the fast path
    return torch.bmm(weight.view(slices, -1, weight.shape[1]), column).view(1, 1, -1)


class RowLinear(nn.Linear):
    """`nn.Linear` that multiplies a single row, as in decoding, by the kernel that is fastest on this CPU.

    The numbers are the same but for rounding. Which kernel runs on one core alone, and which reads memory at a third of its
    speed, differs with the CPU's maker and the precision (tests/benchmarks/LOG.md), so all are tried when a model is loaded.
    """

    def forward(self, x):
        return self.kernel(x, self.weight) if x.numel() == self.in_features else super().forward(x)

    @classmethod
    @torch.inference_mode()
    def install(cls, model):
        """Makes the linear layers of a model these, but for those with a bias or an odd width, if that is faster."""
        layers = [module for module in model.modules() if type(module) is nn.Linear]
        layers = [layer for layer in layers if layer.bias is None and layer.out_features % 8 == 0]
        rows = [layer.weight.new_ones(1, 1, layer.in_features) for layer in layers]

        def seconds(kernel):
            """To multiply all matrices once."""
            begun = time.perf_counter()
            for layer, row in zip(layers, rows, strict=True):
                kernel(row, layer.weight)
            return time.perf_counter() - begun

        times = {kernel: min(seconds(kernel) for _ in range(4)) for kernel in (F.linear, matvec, sliced_bmm)}
        fastest = min(times, key=times.get)
        if times[fastest] < 0.8 * times[F.linear]:  # a choice by less would hang on chance, and so would rounding
            for layer in layers:
                layer.__class__, layer.kernel = cls, fastest
