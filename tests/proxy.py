"""A TCP proxy that makes a network as bad as a test wants it: slow, deaf, cut, or refusing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any

Delay = Callable[[], float]
#: Seconds that its own thread may take for something.
SOON = 30.0


def between(low: float, high: float) -> Delay:
    """Seconds at random."""
    return lambda: random.uniform(low, high)


class Proxy:
    """Runs in a thread of its own. Every setting may be changed while connections are open.

    `delay`: seconds that each packet takes, in both directions, in order. `black_hole`: nothing arrives before it is over
    (then all of it does, as TCP sends again). `target_port` may be turned to another server. `drop_replies`: what the server
    answers is lost, and with it the connection after `cut`. `refuse`: new connections are closed at once. `tls`: it
    terminates TLS. `cut()` closes all connections, with what is under way lost.
    """

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target_port, self.tls = target_port, tls
        self.delay: Delay = lambda: 0.0
        self.black_hole = self.drop_replies = self.refuse = False
        self.connections = 0
        self.sent: list[bytes] = []
        self.record = False
        self._loop = asyncio.new_event_loop()
        self._clients: set[asyncio.StreamWriter] = set()
        #: All that there were: one that is closed with something still to send stays open, when its writer is long gone.
        self._ever: set[asyncio.WriteTransport] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(SOON)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(SOON)

    def cut_clients(self) -> None:
        """Close the clients' side alone: what they have sent still arrives, when its delay is over."""
        asyncio.run_coroutine_threadsafe(self._cut_clients(), self._loop).result(SOON)

    def shut(self) -> None:
        """Nobody listens at the port any more, and all connections are cut."""

        asyncio.run_coroutine_threadsafe(self._close_server(), self._loop).result(SOON)
        self.cut()

    def open(self) -> None:
        """Listen again, at the same port."""
        asyncio.run_coroutine_threadsafe(self._listen(self.port), self._loop).result(SOON)

    def stop(self) -> None:
        self.cut()
        asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result(SOON)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SOON)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)

        self._loop.run_until_complete(self._listen(0))
        self._ready.set()
        self._loop.run_forever()

    async def _listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not a coroutine: cancelled before its first step it would know nothing of the connection.
        self.connections += 1
        self._ever.add(writer.transport)
        self._keep(self._connect(reader, writer))

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except BaseException as error:  # a stop comes as a cancel
            writer.transport.abort()
            if not isinstance(error, OSError):
                raise
            return
        self._ever.add(upstream_writer.transport)
        self._clients.add(writer)
        self._keep(self._pump(reader, upstream_writer, False))
        self._keep(self._pump(upstream_reader, writer, True))

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replies: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                wait = due - self._loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                if not data:
                    break
                while self.black_hole:
                    await asyncio.sleep(0.002)
                if replies and self.drop_replies:
                    continue
                writer.write(data)
                with contextlib.suppress(OSError):
                    await writer.drain()

        delivering = self._loop.create_task(deliver())
        last = 0.0
        try:
            while True:
                data = await reader.read(65536)
                if self.record and not replies and data:
                    self.sent.append(data)
                last = max(last, self._loop.time() + self.delay())  # packets do not overtake
                queue.put_nowait((last, data))
                if not data:
                    break
            await delivering
        except (OSError, asyncio.CancelledError):
            delivering.cancel()
        finally:
            writer.close()

    async def _cut_clients(self) -> None:
        clients, self._clients = self._clients, set()
        for writer in clients:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _close_server(self) -> None:
        # asyncio forgets the socket of whoever it has accepted, but not yet made a transport for, when the server closes.
        for listening in self._server.sockets:
            self._loop.remove_reader(listening.fileno())
        await asyncio.sleep(0.02)
        self._server.close()

    async def _wind_up(self) -> None:
        await self._close_server()
        for _ in range(3):  # a task that is cancelled, or whoever was accepted meanwhile, may leave something to do
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for transport in self._ever:
                transport.abort()
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # for the transports to close

    async def _cut(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for transport in self._ever:
            transport.abort()
        await asyncio.sleep(0)
