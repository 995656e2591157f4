"""What records a device's work once and repeats it: CUDA's graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import torch

from dyndepth.common.errors import UserError


class Recorder(Protocol):
    """Records what is done between ``begin`` and ``end``, with the tensors that it is done to.

    Nothing is computed in between; what ``end`` returns computes it, each time anew and in the same
    memory. Recordings of one recorder share memory: they are repeated one after the other.
    """

    def session(self) -> AbstractContextManager[None]:
        """Around recordings that belong together; what is done in it and not recorded is done.
        Raises RuntimeError where the host waits for the device."""
        ...

    def begin(self) -> None:
        """Record from here on."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """What is recorded inside need not be waited for by what is recorded after it. Its tensors
        must last as long as the recording."""
        ...

    def end(self) -> Callable[[], None]:
        """What repeats all that was done since ``begin``."""
        ...

    def abandon(self) -> None:
        """Let go of a recording that failed."""
        ...


@cache
def _streams(device: torch.device) -> tuple[Any, Any]:
    """Streams to record on, the same for all: libraries keep memory for each that they see."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class CudaRecorder:
    """``Recorder`` on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UserError(f"graphs need a CUDA device, and the model is on {device.type}")
        self._device = device
        self._stream, self._other = _streams(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: Any = None
        self._forked = False

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``Recorder``. Kernels that compile by shape are left out."""
        torch.cuda.synchronize(self._device)
        gc.collect()
        collecting, compiling = gc.isenabled(), torch.backends.cuda.cudnn_sdp_enabled()
        watching = torch.cuda.get_sync_debug_mode()
        gc.disable()
        torch.backends.cuda.enable_cudnn_sdp(False)
        # So that a wait is refused before anything is recorded: a failed capture is hard to undo.
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(watching)
            torch.cuda.synchronize(self._device)  # nothing of the session is under way behind it
            torch.backends.cuda.enable_cudnn_sdp(compiling)
            if collecting:
                gc.enable()

    def begin(self) -> None:
        """See ``Recorder``."""
        self._graph, self._forked = torch.cuda.CUDAGraph(), False
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """See ``Recorder``; outside of a recording it is done in turn."""
        if self._graph is None:
            yield
            return
        self._forked = True
        self._other.wait_stream(self._stream)
        with torch.cuda.stream(self._other):
            yield

    def end(self) -> Callable[[], None]:
        """See ``Recorder``."""
        if self._forked:
            self._stream.wait_stream(self._other)
        self._graph.capture_end()
        graph, self._graph = self._graph, None
        return graph.replay

    def abandon(self) -> None:
        """See ``Recorder``. What was recorded before stays."""
        if self._graph is None:
            return
        try:
            self._graph.capture_end()
        except RuntimeError:
            # It leaves the memory pool open, which then takes no other recording.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
            self._pool = torch.cuda.graph_pool_handle()
        self._graph = None
