"""Many browsers on one server: sessions that tick as the browser's own page does.

`python -m benchmarks.sessions PORT PAGE QUERY SESSIONS TICKS` prints JSON: milliseconds of every
tick, and the bytes that a session is sent in one. A program of its own, so that the server's clock
is not the driver's.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field

import websockets
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

PERIOD_S = 1.0


@dataclass
class Session:
    """One browser tab: its open page and what it has been told."""

    port: int
    page: str
    query: str
    times_ms: list[float] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)
    fragments: list[str] = field(default_factory=list)
    page_hash: str = ""

    async def run(self, start: float, n_ticks: int, period_s: float = PERIOD_S) -> None:
        """Open the page, then ask for each of its live parts once a second."""
        url = f"ws://127.0.0.1:{self.port}/_stcore/stream"
        protocols = [websockets.Subprotocol("streamlit")]
        async with websockets.connect(url, subprotocols=protocols, max_size=None) as socket:
            await self._open(socket)
            for tick in range(n_ticks):
                await asyncio.sleep(max(0.0, start + tick * period_s - time.perf_counter()))
                before = time.perf_counter()
                n_bytes = 0
                for fragment in list(self.fragments):
                    await self._ask(socket, fragment)
                    n_bytes += await self._until_done(socket)
                self.n_bytes.append(n_bytes)
                self.times_ms.append(1000 * (time.perf_counter() - before))

    async def _open(self, socket: websockets.ClientConnection) -> None:
        await self._ask(socket, "")
        await self._until_done(socket)
        if self.page:
            self.fragments.clear()
            await self._ask(socket, "", page=self.page)
            await self._until_done(socket)
        if not self.fragments:
            raise SystemExit("the page has no live part")

    async def _ask(
        self, socket: websockets.ClientConnection, fragment: str, page: str = ""
    ) -> None:
        message = BackMsg()
        message.rerun_script.query_string = self.query
        message.rerun_script.fragment_id = fragment
        message.rerun_script.page_script_hash = "" if page else self.page_hash
        message.rerun_script.page_name = page
        message.rerun_script.is_auto_rerun = bool(fragment)
        await socket.send(message.SerializeToString())

    async def _until_done(self, socket: websockets.ClientConnection) -> int:
        n_bytes = 0
        while True:
            data = await socket.recv()
            assert isinstance(data, bytes)
            n_bytes += len(data)
            message = ForwardMsg.FromString(data)
            if message.HasField("auto_rerun"):
                fragment = message.auto_rerun.fragment_id
                if fragment not in self.fragments:
                    self.fragments.append(fragment)
            if message.HasField("new_session"):
                self.page_hash = message.new_session.page_script_hash
            if message.HasField("delta") and "exception" in str(message.delta)[:40]:
                raise SystemExit(f"the page says: {message.delta}")
            if message.HasField("script_finished"):
                return n_bytes


async def measure(port: int, page: str, query: str, n_sessions: int, n_ticks: int) -> str:
    """Milliseconds of every tick of every session and median bytes, as JSON."""
    sessions = [Session(port, page, query) for _ in range(n_sessions)]
    start = time.perf_counter() + 2 + n_sessions / 10
    # Spread over the second, as people's clicks are.
    runs = [
        session.run(start + PERIOD_S * i / n_sessions, n_ticks)
        for i, session in enumerate(sessions)
    ]
    await asyncio.gather(*runs)
    times = [t for session in sessions for t in session.times_ms]
    n_bytes = sorted(n for session in sessions for n in session.n_bytes)
    return json.dumps({"ms": times, "bytes": n_bytes[len(n_bytes) // 2]})


if __name__ == "__main__":
    port, page, query, n_sessions, n_ticks = sys.argv[1:]
    answer = asyncio.run(measure(int(port), page, query, int(n_sessions), int(n_ticks)))
    sys.stdout.write(answer + "\n")
