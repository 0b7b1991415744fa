"""uvicorn with this server's two signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn

from .engine import Engine


class Drained(uvicorn.Server):
    """The first SIGINT or SIGTERM lets what runs finish, and takes nothing more; the second ends
    the process at once, with status 128 + the signal's number.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: str):
        """ready: what is told once it listens, with {port}."""
        super().__init__(config)
        self._engine, self._ready = engine, ready
        self._arrived = 0

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"glmlora serve: {self._ready.format(port=port)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Our handlers, while the server runs."""
        old = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, before in old.items():
                signal.signal(number, before)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """What a signal does."""
        self._arrived += 1
        if self._arrived > 1:
            os._exit(128 + sig)
        print(
            "glmlora serve: ending: what runs is finished; once more to end at once",
            file=sys.stderr,
            flush=True,
        )
        self._engine.drain()
        self.should_exit = True
