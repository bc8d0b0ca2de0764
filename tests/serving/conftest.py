"""A server in this process, with a small model behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import tiny_lm


@dataclass
class Running:
    """Where it listens, and what it works with."""

    url: str
    service: Any
    server: Any

    def stop(self) -> None:
        self.server.should_exit = True


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Start a server; its options are those of `ServerOptions`, or a decoder in place of the model's."""
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    import uvicorn

    from bitfold.serving.app import make_app
    from bitfold.serving.scheduler import Scheduler
    from bitfold.serving.server import ServerOptions, _listen, open_service

    folder = tiny_lm.folder(tmp_path_factory.mktemp("serving") / "tiny", tiny_lm.model())
    started: list[tuple[Running, threading.Thread, Any]] = []

    def start(decoder: Any = None, **options: Any) -> Running:
        asked = ServerOptions(port=0, dtype="float32", **options)
        listening = _listen(asked.host, asked.port)
        service, ready = open_service(folder, asked, listening.getsockname())
        if decoder is not None:
            service.scheduler.close()
            service.scheduler = Scheduler(decoder, service.metrics, asked.queue)
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        running = Running(ready.url.removesuffix("/v1"), service, server)
        started.append((running, thread, listening))
        return running

    yield start
    for running, thread, listening in started:
        running.service.scheduler.close()
        running.stop()
        thread.join(20)
        listening.close()


@pytest.fixture(scope="session")
def server(serve: Callable[..., Running]) -> Running:
    """One for all the tests that leave it as it is."""
    return serve(context=120, sequences=3)
