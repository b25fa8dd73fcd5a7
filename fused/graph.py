"""A training step as one CUDA graph."""

import warnings

import torch


class NoGraph(RuntimeError):
    """Why a step cannot be a CUDA graph, in one sentence."""


class GraphedStep:
    """A training step as one CUDA graph: thousands of kernel launches become one.

    step(images, labels) -> tuple of tensors; it may ask nothing of the GPU, must drop the gradients
    (zero_grad(set_to_none=True)) and update the weights itself, at a learning rate that is a tensor on the GPU where it
    is to change (optimizers with fused=True take one). The first `warm` batches, and batches of
    another shape, run as they are: they compile kernels and create the optimizer's state. The returned
    tensors are overwritten by the next call. Poisson draws go on from the default generator as without. Raises
    `NoGraph`.
    """

    def __init__(self, step, warm=3):
        self.step, self.warm, self.side = step, warm, None
        self.graph, self.inputs, self.outputs = None, None, None

    def __call__(self, images, labels):
        if self.warm > 0 or (self.graph and images.shape != self.inputs[0].shape):
            self.warm = max(0, self.warm - 1)
            self.side = self.side or torch.cuda.Stream()  # capturing wants the state to come from a side stream
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*capturable=True")  # of an optimizer: it will be captured
                outputs = self.step(images, labels)
            torch.cuda.current_stream().wait_stream(self.side)
            return outputs
        if self.graph is None:
            self.inputs, graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self.outputs = self.step(*self.inputs)
            except RuntimeError as error:
                cause = error
                while isinstance(cause.__context__, RuntimeError):  # the end of the capture fails for it too
                    cause = cause.__context__
                if isinstance(cause, torch.OutOfMemoryError):
                    raise
                reason = " ".join(str(cause).split())[:200]
                raise NoGraph(f"the step asks something of the GPU, so it cannot be a graph: {reason}") from error
            self.graph = graph
        for kept, new in zip(self.inputs, (images, labels), strict=True):
            kept.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.outputs
