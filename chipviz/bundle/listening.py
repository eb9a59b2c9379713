"""A web server that answers whoever got through to it before it ends."""

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

LAST_WORDS_S = 0.3
"""Seconds that accepted connections have to send their request when the server ends."""
BACKLOG = 2_048
"""Connections that may wait to be accepted."""
ATTEMPTS = 400
"""Times that the line is looked at before it is closed all the same."""


def run(app: FastAPI, host: str, port: int) -> None:
    """Answer until a signal ends it; what was accepted before is answered first."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", backlog=BACKLOG)
    _Server(config).run(sockets=[config.bind_socket()])


class _Server(uvicorn.Server):
    """A server that loses nobody who got through to it."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or []:
            await _let_nobody_in(listener)
            for server in self.servers:
                server.close()
        await asyncio.sleep(LAST_WORDS_S)  # a connection without a request yet would be dropped
        await super().shutdown(sockets)


async def _let_nobody_in(listener: socket.socket) -> None:
    """Wait for a moment in which nobody stands in the line of a listening socket.

    Who stands there when it is closed is cut off. So the line is made one place long, and that
    place is taken by a connection of our own: then all others were accepted, and new ones are
    refused. No other part of the loop may run between here and the closing.
    """
    listener.listen(0)
    for _ in range(ATTEMPTS):
        ours = socket.socket(listener.family)
        ours.settimeout(0.002)
        try:
            ours.connect(listener.getsockname())
        except OSError:
            ours.close()
            await asyncio.sleep(0.005)  # whoever has the place is accepted
        else:
            ours.detach()  # closed with the process
            return
