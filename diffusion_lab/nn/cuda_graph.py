r"""A network's forward pass as a CUDA graph: launched as one, not kernel by kernel.

A U-Net launches some hundred kernels a call. Where they are short (small images, small batches)
the GPU waits for the host to launch them, and a sampler makes the same call again and again. A
graph records the kernels of one call and their memory; a replay reads its inputs from the places
that the recorded call had them in, and writes its output where that one did. So inputs are copied
to these places, and the output is copied from there before another call overwrites it.

Recorded is what sampling repeats: a call without a graph of derivatives, at its second time with
inputs of the same shapes. Everything else is the plain call.
"""

__all__ = ["Graphed"]

from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2  # calls before the recorded one: what libraries allocate or choose once is not in it


class Graphed:
    """Takes the place of a network's forward: `Graphed(network)`; names and weights stay.

    A replay reads the weights from where they were: a network may be moved, cast or compiled
    before its second call, and not afterwards. It has no side effects to lose, and no randomness
    (dropout is off): it is in evaluation mode.

    Arguments:
        network: Maps (x, index) or (x, index, label), tensors of shape (B, *), to a tensor. One
            with a number `classes` above 0 gets that as the label where none is given.
    """

    def __init__(self, network: nn.Module) -> None:
        self.plain = network.forward
        self.classes = getattr(network, "classes", 0)
        self.records: dict[tuple, Any] = {}  # None after the first call of its shapes
        self.pool: Any = None  # graphs never run at once: they share their memory
        network.forward = self

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
            return self.plain(*inputs)
        if self.classes and len(inputs) == 2:  # a number would be copied from the host each time
            inputs = (*inputs, torch.full((len(x),), self.classes, device=x.device))
        key = tuple((value.shape, value.dtype, value.device) for value in inputs)
        if key not in self.records:
            self.records[key] = None
            return self.plain(*inputs)
        if self.records[key] is None:
            self.records[key] = self._record(inputs)
        graph, places, output = self.records[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return output.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...], Tensor]:
        """The graph, the places of its inputs, and that of its output."""
        places = tuple(value.clone() for value in inputs)
        with torch.cuda.device(places[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.plain(*places)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                output = self.plain(*places)
        self.pool = self.pool or graph.pool()
        return graph, places, output
