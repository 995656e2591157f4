"""What records a device's work once and repeats it: CUDA's graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from dyndepth.common.errors import UserError


class Recorder(Protocol):
    """Records what is done between ``begin`` and ``end``, with the tensors that it is done to.

    Nothing is computed in between; what ``end`` returns computes it, each time anew and in the same
    memory. Recordings of one recorder share memory: they are repeated one after the other.
    """

    def session(self) -> AbstractContextManager[None]:
        """Around recordings that belong together; what is done in it and not recorded is done."""
        ...

    def begin(self) -> None:
        """Record from here on."""
        ...

    def end(self) -> Callable[[], None]:
        """What repeats all that was done since ``begin``."""
        ...


class CudaRecorder:
    """``Recorder`` on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UserError(f"graphs need a CUDA device, and the model is on {device.type}")
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``Recorder``. Kernels that compile by shape are left out."""
        current = torch.cuda.current_stream(self._device)
        torch.cuda.synchronize(self._device)
        gc.collect()
        collecting, compiling = gc.isenabled(), torch.backends.cuda.cudnn_sdp_enabled()
        gc.disable()
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)
            torch.cuda.synchronize(self._device)  # nothing of the session is under way behind it
            torch.backends.cuda.enable_cudnn_sdp(compiling)
            if collecting:
                gc.enable()

    def begin(self) -> None:
        """See ``Recorder``."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        """See ``Recorder``."""
        self._graph.capture_end()
        return self._graph.replay
