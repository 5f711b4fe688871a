"""TLS to Redis: what is checked, what is wrong with it in words, and that it costs no request more than ON_BACKEND_ERROR says.

The tests end TLS before a plain server, so that they need none that was built with it.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trustme
from django.core.exceptions import ImproperlyConfigured
from redis.exceptions import ConnectionError as RedisConnectionError

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.errors import classed, is_final
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import Keys
from django_concurrency_mw.exceptions import PermanentBackendError
from django_concurrency_mw.keeper import keeper

from .proxy import Proxy
from .redis_server import RedisServer
from .support import works

LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


class Files:
    """A CA with a client's certificate, and another CA, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.stranger = trustme.CA(), trustme.CA()
        self.ca, self.strange_ca = str(folder / "ca.pem"), str(folder / "strange.pem")
        self.authority.cert_pem.write_to_path(self.ca)
        self.stranger.cert_pem.write_to_path(self.strange_ca)
        self.client, self.strange_client = self.of_a_client(self.authority), self.of_a_client(self.stranger)

    def of_a_client(self, authority: trustme.CA) -> dict[str, str]:
        issued = authority.issue_cert("app@example.org")
        number = len(list(self.folder.iterdir()))
        certificate, key = str(self.folder / f"{number}.crt"), str(self.folder / f"{number}.key")
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return {"ssl_certfile": certificate, "ssl_keyfile": key}

    def server(self, name: str = "127.0.0.1", wants: bool = False, **validity: Any) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(name, **validity).configure_cert(context)
        if wants:
            context.verify_mode = ssl.CERT_REQUIRED
            self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def serve(redis_server: RedisServer) -> Iterator[Callable[[ssl.SSLContext | None], Proxy]]:
    proxies: list[Proxy] = []

    def made(context: ssl.SSLContext | None) -> Proxy:
        proxies.append(Proxy(redis_server.port, tls=context))
        return proxies[-1]

    yield made
    hang_up()
    for proxy in proxies:
        proxy.stop()


Serve = Callable[[ssl.SSLContext | None], Proxy]


#: What a test has made.
_stores: list[RedisBackend] = []


def hang_up() -> None:
    """Nobody connects any more, which the end of a server would cut in the middle of a handshake: Python warns of that."""
    for store in _stores:
        store._leftovers.forget()
        store.close()
    with keeper._working:
        pass


@pytest.fixture
def make(prefix: str) -> Iterator[Callable[..., RedisBackend]]:
    _stores.clear()

    def made(at: Proxy | Handshakes | str, by: str = "rediss://", **options: Any) -> RedisBackend:
        options = {"socket_timeout": 5, **options}
        location = at if isinstance(at, str) else f"{by}127.0.0.1:{at.port}/0"
        _stores.append(RedisBackend(BackendConfig("default", "redis", location, prefix, options)))
        return _stores[-1]

    yield made
    hang_up()


Make = Callable[..., RedisBackend]


@pytest.mark.parametrize("protocol", [2, 3])
def test_with_certificates_of_both_ends(files: Files, serve: Serve, make: Make, protocol: int) -> None:
    proxy = serve(files.server(wants=True))
    works(make(proxy, ssl_ca_certs=files.ca, protocol=protocol, **files.client))


@pytest.mark.parametrize(
    "options", [{"ssl_check_hostname": False}, {"ssl_cert_reqs": "none"}, {"ssl_cert_reqs": ssl.CERT_NONE}]
)
def test_what_is_not_to_be_checked_is_not(files: Files, serve: Serve, make: Make, options: dict[str, Any]) -> None:
    works(make(serve(files.server("redis.example.org")), ssl_ca_certs=files.ca, **options))


class Handshakes:
    """A server that shakes hands and no more. Unlike asyncio it tells whom it refuses why."""

    def __init__(self, context: ssl.SSLContext) -> None:
        # From 1.3 on a server refuses when the client has begun to speak, and its words may get lost.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                connection.settimeout(10)
                with contextlib.suppress(OSError):
                    if connection.recv(1, socket.MSG_PEEK) == b"!":
                        return
                    self._shake(connection)

    def _shake(self, connection: socket.socket) -> None:
        received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = self._context.wrap_bio(received, to_send, server_side=True)
        shaking = True
        while shaking:
            try:
                secured.do_handshake()
                shaking = False
            except ssl.SSLWantReadError:
                connection.sendall(to_send.read())
                received.write(connection.recv(65536) or b"!")  # nonsense, where the other end has hung up
            except ssl.SSLError:
                shaking = False
        connection.sendall(to_send.read())
        # To close with something unread would be a reset, which takes the words back.
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    def stop(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as last:
            last.sendall(b"!")
            self._thread.join(10)
        self._listening.close()


#: What is wrong, and what its cure says of it.
WRONG: dict[str, str] = {
    "another CA": "OPTIONS['ssl_ca_certs'] has to name a file",
    "no CA": "OPTIONS['ssl_ca_certs'] has to name a file",
    "another name": "the server's certificate is for other names",
    "expired": "is not valid at this time",
    "no client certificate": "the server wants a client certificate",
    "a stranger's client certificate": "does not accept our client certificate",
}


@pytest.fixture
def wrong(files: Files, serve: Serve, make: Make) -> Iterator[Callable[[str], RedisBackend]]:
    servers: list[Handshakes] = []

    def made(what: str) -> RedisBackend:
        name = "redis.example.org" if what == "another name" else "127.0.0.1"
        validity = {"not_before": LONG_AGO, "not_after": LONG_AGO.replace(year=2021)} if what == "expired" else {}
        servers.append(Handshakes(files.server(name, wants="client" in what, **validity)))
        ca = {"another CA": files.strange_ca, "no CA": None}.get(what, files.ca)
        client = files.strange_client if "stranger" in what else {}
        return make(servers[-1], **({"ssl_ca_certs": ca} if ca else {}), **client)

    yield made
    hang_up()
    for server in servers:
        server.stop()


@pytest.mark.parametrize("half", ["threads", "loop"])
@pytest.mark.parametrize(("what", "cure"), WRONG.items(), ids=list(WRONG))
def test_what_is_wrong_is_said_with_its_cure(
    wrong: Callable[[str], RedisBackend], what: str, cure: str, half: str
) -> None:
    """At once, as another try would find the same; and so does `manage.py check`."""
    store = wrong(what)
    began = monotonic()
    with pytest.raises(PermanentBackendError) as raised:
        works(store, half)
    assert monotonic() - began < store.timeout
    assert cure in raised.value.cure
    assert is_final(raised.value)
    if half == "threads":
        (message,) = store.check()
        assert message.id == "django_concurrency_mw.E005"
        assert cure[1:] in str(message.hint)


@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "speaks no TLS"),
        ("[SSL: RECORD_LAYER_FAILURE] record layer failure", "speaks no TLS"),
        ("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required", "wants a client certificate"),
        ("[SSL: TLSV1_ALERT_PROTOCOL_VERSION] tlsv1 alert protocol version", "do not agree on TLS"),
    ],
)
def test_what_other_servers_say(reason: str, cure: str) -> None:
    error = RedisConnectionError("Error 1 connecting to redis:6379.")
    error.__cause__ = ssl.SSLError(1, reason)
    found = classed(error, Keys("p"))
    assert isinstance(found, PermanentBackendError)
    assert cure in found.cure


@pytest.mark.parametrize(("by", "other"), [("redis://", "rediss://"), ("rediss://", "redis://")])
def test_a_server_that_speaks_the_other_language_is_suspected(
    files: Files, serve: Serve, make: Make, by: str, other: str
) -> None:
    """It hangs up or is silent, and that may be for any reason."""
    proxy = serve(files.server() if by == "redis://" else None)
    (message,) = make(proxy, by, socket_timeout=0.3).check()
    assert message.id == "django_concurrency_mw.W006"
    assert f" {other} " in str(message.hint)


def test_a_cut_in_the_handshake_is_no_matter_of_certificates() -> None:
    error = ConnectionError("gone")
    error.__cause__ = ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
    assert not is_final(error)


@pytest.mark.parametrize(
    ("location", "options", "says"),
    [
        ("redis://a", {"ssl_ca_certs": "CA"}, "ssl_ca_certs is about TLS: write rediss://"),
        ("redis://a", {"ssl": True}, "write rediss://"),
        ("rediss://a", {"ssl_ca_certs": "/nowhere.pem"}, r"\['ssl_ca_certs'\]: no such file"),
        ("rediss://a?ssl_ca_certs=/nowhere.pem", {}, r"\['ssl_ca_certs'\]: no such file"),
        ("rediss://a", {"ssl_ca_path": "/nowhere"}, "no such folder"),
        ("rediss://a", {"ssl_ca_certs": __file__}, "no certificates in PEM"),
        ("rediss://a", {"ssl_certfile": "/nowhere.pem"}, r"\['ssl_certfile'\]: no such file"),
        ("rediss://a", {"ssl_certfile": "CLIENT"}, "belong together"),
        ("rediss://a", {"ssl_certfile": "CLIENT", "ssl_keyfile": "OTHER"}, "belong together"),
        ("rediss://a", {"ssl_keyfile": "OTHER"}, "needs its certificate: ssl_certfile"),
        ("rediss://a", {"ssl_cert_reqs": "maybe"}, "expected 'required', 'optional' or 'none', got 'maybe'"),
        ("rediss://a", {"ssl_cert_reqs": "none", "ssl_check_hostname": True}, "only checked with its certificate"),
        ("rediss://a", {"ssl_ca_cert": "CA"}, "did you mean 'ssl_ca_certs'"),
        ("rediss://a", {"ssl_validate_ocsp": True}, "for threads only"),
        ("rediss://a", {"ssl_check_hostname": None}, r"\['ssl_check_hostname'\]: expected True or False, got None"),
        ("rediss://a", {"ssl_check_hostname": "no"}, "expected True or False, got 'no'"),
        ("rediss://a", {"ssl_ca_certs": ["CA"]}, r"\['ssl_ca_certs'\]: no such file"),
        ("rediss://a", {"ssl_ciphers": "none"}, r"\['ssl_ciphers'\]: it cannot be used"),
        ("rediss://a", {"ssl_ca_data": "none"}, r"\['ssl_ca_data'\]: it cannot be used"),
        ("rediss://a", {"ssl_min_version": "TLSv1.2"}, r"\['ssl_min_version'\]: it cannot be used"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    files: Files, make: Make, location: str, options: dict[str, Any], says: str
) -> None:
    known = {"CA": files.ca, "CLIENT": files.client["ssl_certfile"], "OTHER": files.strange_client["ssl_keyfile"]}
    with pytest.raises(ImproperlyConfigured, match=says):
        make(location, **{name: known.get(str(value), value) for name, value in options.items()})
