"""Several processes that work at one thing, started by `torchrun` or `accelerate`: who is who, and sums over all.

There is no transport of ours: PyTorch's process group with gloo, on one machine or several.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from bitfold.errors import UsageError

__all__ = ["Team", "alone", "gathered"]


class Team(Protocol):
    """The processes of a run; the first one, of rank 0, leads."""

    rank: int
    size: int

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each becomes its sum over all processes, with the same bits in every one."""
        ...

    def told(self, value: Any) -> Any:
        """What the first process says; `value` counts there only."""
        ...

    def collected(self, value: Any) -> list[Any]:
        """What each process says, in their order."""
        ...


class _Alone:
    rank, size = 0, 1

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """They are sums already."""

    def told(self, value: Any) -> Any:
        """There is no other."""
        return value

    def collected(self, value: Any) -> list[Any]:
        """There is no other."""
        return [value]


class _Group:
    """Processes that PyTorch has brought together."""

    def __init__(self) -> None:
        import torch.distributed as group

        self._group: Any = group
        self.rank, self.size = group.get_rank(), group.get_world_size()

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """See `Team`: small tensors travel together, and are summed in float32 or wider."""
        together: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            together.setdefault(tensor.dtype, []).append(tensor)
        for found in together.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in found])
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            self._group.all_reduce(flat)
            for tensor, part in zip(found, torch.split(flat, [t.numel() for t in found]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def told(self, value: Any) -> Any:
        """See `Team`."""
        box = [value if self.rank == 0 else None]
        self._group.broadcast_object_list(box, src=0)
        return box[0]

    def collected(self, value: Any) -> list[Any]:
        """See `Team`."""
        found: list[Any] = [None] * self.size
        self._group.all_gather_object(found, value)
        return found


def alone() -> Team:
    """One process."""
    return _Alone()


def gathered() -> Team:
    """The processes that `torchrun` started with this one, once all of them are here; this one alone without it.

    Raises:
        UsageError: they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return _Alone()
    import torch.distributed as group

    if not group.is_available():
        raise UsageError("this PyTorch cannot join processes", where="WORLD_SIZE", hint="start one process")
    if not group.is_initialized():
        try:
            group.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            what = f"the processes do not find each other: {str(error).splitlines()[0]}"
            raise UsageError(what, where="torchrun", hint="start it with the same address on every machine") from error
    return _Group()
