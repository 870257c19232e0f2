"""Several processes, started by ``torchrun``. The only place that knows ``torch.distributed``.

One gradient synchronisation per step, by DistributedDataParallel around the whole loss (``Outer``). Buffers are not
broadcast: a broadcast would throw away the other processes' stores; BatchNorm's statistics are averaged before they
are looked at or saved."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustlab.outer import Outer
from robustlab.types import Alone, UserError, World


class Processes:
    """The world of several processes."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def mean_(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Average over the processes, in place, as one flat message per data type."""
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            flat.div_(self.size)
            for t, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(part.view_as(t))
        return tensors

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The processes that ``torchrun`` started, or a world of one.

    Raises:
        UserError: another process has ended, so that this one cannot go on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield Processes()
    except RuntimeError as error:
        if not _broken(error):
            raise
        raise _another_ended() from error
    finally:
        _leave()


@contextlib.contextmanager
def side_by_side() -> Iterator[World]:
    """The processes that ``torchrun`` started, each on work of its own, or a world of one.

    They only wait for each other, however long: gloo carries that, whatever they compute on. The first that fails says why; the
    others end without a word.

    Raises:
        UserError: what this process raised, or that another has ended; without a line where another process has said it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    store, rank, size = next(iter(dist.rendezvous("env://")))
    failures = dist.PrefixStore("failures", store)
    try:
        own = dist.PrefixStore("processes", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=datetime.timedelta(days=7))
        yield Processes()
    except (UserError, RuntimeError) as error:
        ended = not isinstance(error, UserError)
        if ended and not _broken(error):
            raise
        try:
            first = failures.add("count", 1) == 1
        except RuntimeError:  # the process that keeps the count has ended
            first = True
        if not first:
            raise UserError() from error
        raise (_another_ended() if ended else error) from error
    finally:
        _leave()


def _broken(error: RuntimeError) -> bool:
    """Whether the error says that another process has gone: both backends raise RuntimeError, or a subclass, for it."""
    return "onnection" in str(error) or isinstance(error, dist.DistError)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _another_ended() -> UserError:
    return UserError(f"process {os.environ.get('RANK')}: another process of this run has ended; see what it said")


def local_device(device: torch.device) -> torch.device:
    """This process's device: ``cuda`` becomes the one of its local rank."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def wrap(outer: Outer) -> None:
    """Send the losses that are differentiated through DistributedDataParallel, if there are several processes."""
    if outer.loss.world.size > 1:
        known = inspect.signature(DistributedDataParallel).parameters  # newer releases have another name for it
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        outer.loss.wrapped = DistributedDataParallel(outer, **{option: False})


def average_buffers(f: nn.Module, world: World) -> None:
    """Average the floating-point buffers (BatchNorm's statistics) over the processes."""
    if world.size > 1:
        world.mean_([b for b in f.buffers() if b.is_floating_point()])


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
