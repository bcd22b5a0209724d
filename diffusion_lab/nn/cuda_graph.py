r"""CUDA graph capture of a network's forward pass, for sampling.

A U-Net launches some hundred kernels per call. With small images or batches, the GPU waits for the
host to launch them, and a sampler repeats the same call many times. A CUDA graph records the
kernels of one call with the addresses of its memory, and launches them at once. Inputs are copied
to the recorded addresses, and the output is copied before another call overwrites it.

A call is recorded if gradients are disabled and inputs of the same shapes occur the second time.
All other calls run as usual.
"""

__all__ = ["capture"]

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WARM_UP = 2  # calls before the recorded one, in which libraries allocate and select kernels


class _Recording(NamedTuple):
    """A recorded call: the graph and the memory of its inputs and its output."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class _CapturedForward:
    """Replacement of a network's forward; see `capture`."""

    def __init__(self, network: nn.Module) -> None:
        self.plain = network.forward
        self.classes: Any = getattr(network, "classes", 0)
        self.recordings: dict[Any, _Recording | None] = {}  # None: the shapes occurred once
        self.pool: Any = None  # graphs never run concurrently, so that they can share memory

    def __call__(self, *inputs: Any) -> Tensor:
        x = inputs[0]
        if (
            x.device.type != "cuda"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cuda")
            or torch.compiler.is_compiling()
            or torch.cuda.is_current_stream_capturing()
            or not all(isinstance(value, Tensor) for value in inputs)
        ):
            return self._plain(*inputs)
        if self.classes and len(inputs) == 2:  # a constant would be copied from the host each time
            inputs = (*inputs, torch.full((len(x),), self.classes, device=x.device))
        key = tuple((value.shape, value.dtype, value.device) for value in inputs)
        if key not in self.recordings:
            self.recordings[key] = None
            return self._plain(*inputs)
        recording = self.recordings[key]
        if recording is None:
            recording = self.recordings[key] = self._record(inputs)
        for target, value in zip(recording.inputs, inputs, strict=True):
            target.copy_(value)
        recording.graph.replay()
        return recording.output.clone()

    def _plain(self, *inputs: Any) -> Tensor:
        output: Tensor = self.plain(*inputs)
        return output

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        """Records a call."""
        places = tuple(value.clone() for value in inputs)
        with torch.cuda.device(places[0].device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # by torch
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.plain(*places)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                output = self.plain(*places)
        self.pool = self.pool or graph.pool()
        return _Recording(graph, places, output)


def capture(network: nn.Module) -> None:
    """Makes a network replay CUDA graphs in its forward pass; names and weights stay.

    A replay reads the weights from their recorded addresses: the network may be moved, cast or
    compiled before its second call, but not afterwards. The network must be in evaluation mode,
    since a replay repeats neither side effects nor random numbers (dropout).

    Arguments:
        network: Maps (x, index) or (x, index, label), tensors of shape (B, *), to a tensor. If it
            has an attribute `classes` > 0, that number is the label of a call without one.
    """
    network.forward = _CapturedForward(network)
