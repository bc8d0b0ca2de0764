"""On the machines of a Ray cluster (`pip install bitfold[ray]`), by nothing but Ray's public interface.

Ray places tasks by the cores and the memory that they need, tries those again that die with their process or machine,
and takes in machines that join. Nothing of a run's data goes through it: all machines see its folders.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any

from bitfold.errors import BitfoldError, ResourceError, UsageError
from bitfold.executors.processes import cores
from bitfold.executors.protocol import TRIES, Executor, Task, carried_out, died

_HOST_PORT = re.compile(r"(?:ray://)?([^:/]+):(\d+)")
_PATIENCE = 10.0  # seconds
_INSTALL = "pip install 'bitfold[ray]'"
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_task_oom_retries": str(TRIES - 1)}


def check_installed() -> None:
    """UsageError where Ray is not there."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("Ray is not installed", where="--executor ray", hint=_INSTALL)


class RayCluster:
    """Of one cluster.

    Args:
        address: of its head, `host:port`; None: Ray is started on this machine, and ended when this is left.

    Raises:
        UsageError: Ray is not installed.
        ResourceError: there is no cluster at that address, or one of its machines has no bitfold.
    """

    here = False

    def __init__(self, address: str | None) -> None:
        check_installed()
        import torch

        self._ray: Any = _connected(address)
        largest = max((int(node["Resources"].get("CPU", 0)) for node in self._nodes()), default=1)
        self.threads = max(1, min(torch.get_num_threads(), largest) if address else 1)
        self._running: dict[Any, Task] = {}
        try:
            self._check_machines()
        except BaseException:
            self._ray.shutdown()
            raise

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    @property
    def workers(self) -> int:
        """See `Executor`: on the machines that are there now."""
        return max(1, sum(int(node["Resources"].get("CPU", 0)) // self.threads for node in self._nodes()))

    def everywhere(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """What a function answers on each machine that has cores, by name of the machine. It is carried along, and may
        import what is there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        function.__module__ = "__main__"  # carried by value: where bitfold is missing, it could not be imported
        remote = self._ray.remote(num_cpus=0, max_retries=TRIES)(function)
        found = {}
        for node in self._nodes():
            if node["Resources"].get("CPU", 0) >= 1:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                name = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
                found[name] = remote.options(scheduling_strategy=there).remote(*arguments)
        return {name: self._ray.get(answer) for name, answer in found.items()}

    def blind(self, paths: Sequence[str]) -> list[str]:
        """See `Executor`."""

        def sees(names: list[str]) -> bool:
            import os

            return all(os.path.exists(name) for name in names)  # noqa: PTH110

        return [name for name, there in self.everywhere(sees, list(paths)).items() if not there]

    def _check_machines(self) -> None:
        def has_it() -> bool:
            import importlib.util

            return importlib.util.find_spec("bitfold") is not None

        without = [name for name, there in self.everywhere(has_it).items() if not there]
        if without:
            what = f"bitfold is not installed on {', '.join(without)}"
            raise ResourceError(what, where="--executor ray", hint="the same version everywhere, see docs/scaling.md")

    def submit(self, task: Task) -> None:
        """See `Executor`."""
        needs = task.needs
        fitting = [
            node
            for node in self._nodes()
            if node["Resources"].get("CPU", 0) >= needs.cores and node["Resources"].get("memory", 0) >= needs.memory
        ]
        if not fitting:  # Ray would wait for such a machine for ever
            what = f"no machine of the cluster has {needs.cores} cores and {needs.memory} bytes of memory"
            raise ResourceError(what, where=task.name, hint="add one, or choose a method that needs less")
        options = {"num_cpus": needs.cores, "memory": needs.memory, "max_retries": TRIES - 1, "name": task.name}
        remote = self._ray.remote(**options)(_call)
        self._running[remote.remote(task.function, task.arguments, self.threads)] = task

    def wait(self) -> tuple[Task, Any]:
        """See `Executor`."""
        from ray.exceptions import RayError, RayTaskError

        (ready, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        task = self._running.pop(ready)
        try:
            return task, self._ray.get(ready)
        except RayTaskError as error:
            cause: Any = error.cause
            if isinstance(cause, OSError):
                raise died(task, TRIES, f"{type(cause).__name__}: {cause}") from error
            if isinstance(cause, BitfoldError):
                raise cause from error
            if isinstance(cause, ImportError):
                hint = "the same bitfold on every machine, see docs/scaling.md"
                raise ResourceError(f"cannot be begun: {cause}", where=task.name, hint=hint) from error
            raise
        except RayError as error:
            raise died(task, TRIES, " ".join(str(error).split())) from error

    def cancel(self) -> None:
        """See `Executor`."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._ray.shutdown()


def _connected(address: str | None) -> Any:
    """Ray, connected to the cluster. Nothing is told to anybody: usage statistics are off."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    try:
        if address is not None and (found := _HOST_PORT.fullmatch(address)) is not None:
            socket.create_connection((found[1], int(found[2])), _PATIENCE).close()  # Ray would try for minutes
        if address is None:
            ray.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"--executor ray:{address}" if address else "--executor ray"
        hint = "`ray start --head` begins one, see docs/scaling.md"
        raise ResourceError(f"Ray cannot be reached: {error}", where=where, hint=hint) from error
    return ray


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> Any:
    """What runs over there; errors say where that is."""
    import torch

    torch.set_num_threads(threads)
    here = platform.node()
    try:
        return carried_out(function, arguments)
    except BitfoldError as error:
        raise type(error)(f"on {here}: {error.what}", where=error.where, hint=error.hint) from error
    except OSError as error:
        raise OSError(error.errno, f"on {here}: {error}") from error
