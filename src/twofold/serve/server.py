"""The process that listens: uvicorn with a shutdown that lets running requests finish, or fails them cleanly.

Not here: routes (``app.py``), options of the command line (``serve_cli.py``).
"""

from __future__ import annotations

from types import FrameType

import uvicorn

from twofold.serve.app import create_app
from twofold.serve.service import Service

_MARGIN_SECONDS = 5  # for failed requests to be told, after the grace is over


class Server(uvicorn.Server):
    """uvicorn that tells the engine's thread when it is asked to stop."""

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info") -> None:
        self.service = service
        grace = service.config.grace_seconds
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=host,
                port=port,
                log_level=log_level,
                timeout_graceful_shutdown=int(grace) + _MARGIN_SECONDS,
                server_header=False,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop: no new requests; running ones have the grace to finish. A second Ctrl-C ends at once."""
        self.service.loop.drain(self.service.config.grace_seconds)
        super().handle_exit(sig, frame)  # takes should_exit, set already, for a second Ctrl-C

    def begin_shutdown(self) -> None:
        """The same without a signal, from any thread."""
        self.service.loop.drain(self.service.config.grace_seconds)
        self.should_exit = True
