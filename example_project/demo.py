"""The demo: starts the example site under real servers, sends bursts at every kind of view, and shows the caps hold.

With --redis: gunicorn and uvicorn at once, two worker processes each, on a Redis of the demo's own, every burst at both.

What is admitted and how many were in flight is counted by the views themselves (example/gauge.py), not by the limiter.
Exit status: 0 if every cap held, was reached, and no slot is left; 1 if not, or if a server did not start; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import django
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from example import gauge
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.json import JSON
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HOST = "127.0.0.1"

AT_ONCE = 24  # requests of one burst; below the threads of one gunicorn worker, so that they truly run at once
THREADS = 32
PROCESSES = 2  # of each server, and each of them may get any request
#: What a store counts, for the first line.
SAYS = {
    "host": "one count for all processes of this machine and nothing to install; ",
    "memory": "one count per process; ",
}
WAKE_EACH = 8  # requests for each process of a server, before any burst
HOLD = float(os.environ.get("EXAMPLE_HOLD", "0.5"))  # seconds that a view takes
START_WITHIN = 20.0
LET_GO_WITHIN = 2.0
CLIENT_TIMEOUT = 20.0
NO_REDIS = (
    "no Redis server was found: install redis-server (Debian: apt install redis-server; macOS: brew install redis) or "
    "valkey-server, or name the program in CONCURRENCY_TEST_REDIS_SERVER"
)


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


# -- the bursts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cohort:
    """Requests that share one key: what their client sends, and the gauge that counts them."""

    gauge: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Burst:
    """AT_ONCE requests at one view, shared out among its cohorts. Each takes so many `seconds` there. `status` is what a
    rejection answers. `waits`: who comes on top waits in line, and all are let in."""

    kind: str
    path: str
    policy: str
    per: str
    cap: int
    cohorts: tuple[Cohort, ...]
    method: str = "GET"
    shadow: bool = False
    status: int = 429
    waits: bool = False
    seconds: float = HOLD


@dataclass(frozen=True)
class Answer:
    """A response as the client got it; status 0: none came, and `reason` says why."""

    status: int
    reason: str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """What one burst came to. `seen` is the most slots of the policy that the store showed meanwhile."""

    burst: Burst
    answers: list[Answer]
    readings: list[gauge.Reading]
    seen: int
    left: int

    @property
    def rejected(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == self.burst.status]

    @property
    def longest_wait(self) -> float:
        """Seconds that one of them stood in line, as the view was told."""
        told = [value for answer in self.answers for name, value in answer.headers if name.lower() == "server-timing"]
        return max((float(value.partition("dur=")[2]) / 1000 for value in told), default=0.0)

    @property
    def admitted(self) -> int:
        return sum(reading.admitted for reading in self.readings)

    def faults(self) -> Iterator[str]:
        """Everything that is not as it should be."""
        burst = self.burst
        for cohort, reading in zip(burst.cohorts, self.readings, strict=True):
            if not burst.shadow and reading.most > burst.cap:
                yield f"cap {burst.cap} of {burst.policy} was broken: {reading.most} in flight for {cohort.gauge}"
            elif reading.most < burst.cap + burst.shadow:
                yield (
                    f"cap {burst.cap} of {burst.policy} was never {'passed' if burst.shadow else 'reached'}: "
                    f"{reading.most} in flight for {cohort.gauge}, of {AT_ONCE // len(burst.cohorts)} sent at once"
                )
            if reading.inside:
                yield f"{reading.inside} requests never left the view: {cohort.gauge}"
        if burst.shadow and self.rejected:
            yield f"{burst.policy} is a shadow, yet {len(self.rejected)} were rejected"
        if burst.waits and self.rejected:
            yield f"{len(self.rejected)} were rejected by {burst.policy}, where they may wait"
        if burst.waits and not self.longest_wait:
            yield f"nobody waited for {burst.policy}, although more were sent than it lets in at once"
        odd = [answer for answer in self.answers if answer.status not in (200, burst.status)]
        if odd:
            yield f"{len(odd)} unexpected answers under {burst.policy}, such as {odd[0].status} {odd[0].reason}"
        passed = sum(answer.status == 200 for answer in self.answers)
        if passed != self.admitted:
            yield f"{burst.policy}: {passed} answers of a view arrived, but the views counted {self.admitted}"
        if burst.cap and not self.seen:
            yield f"the store never showed a slot of {burst.policy}"
        if self.left:
            yield f"{self.left} slots were left after the burst at {burst.policy}"


def table_burst(kind: str, path: str, policy: str, per: str, cohorts: tuple[Cohort, ...], method: str = "GET") -> Burst:
    """A burst whose cap is what the policy table says."""
    from django_concurrency_mw import conf

    found = conf.current().table.get(policy)
    if found is None:
        raise DemoError(f"policies.example.yaml has no policy {policy!r}, which the demo sends requests at")
    assert isinstance(found.max_concurrent, int)
    waits = found.wait > 0
    seconds = HOLD / 2 if waits else HOLD
    return Burst(
        kind, path, policy, per, found.max_concurrent, cohorts, method, not found.block, found.status, waits, seconds
    )


def bursts(
    people: dict[str, dict[str, str]], programs: dict[str, dict[str, str]]
) -> tuple[list[Burst], list[Burst], list[Burst]]:
    """The bursts for the WSGI server, for the ASGI server, and for both at once.

    `people`: user name -> the headers of their session; `programs`: user name -> the headers with their token.
    """
    from reports import views

    def each(view: str, clients: dict[str, dict[str, str]] = people) -> tuple[Cohort, ...]:
        return tuple(Cohort(f"{view}:{name}", headers) for name, headers in clients.items())

    anybody = next(iter(people.values()))
    partners = tuple(Cohort(f"figures:{name}", {"X-Api-Key": key}) for key, name in views.PARTNERS.items())
    dashboard = (Cohort("dashboard", anybody),)
    cap = views.DASHBOARDS_AT_ONCE

    sync_page = table_burst("sync", "/report/", "user-reports", "user", each("report"))
    async_job = table_burst("async", "/export/", "exports", "user", each("export"), "POST")
    class_view = table_burst("class", "/figures/", "partners", "API key", partners)
    sync_stream = table_burst("sync stream", "/download/north/", "downloads", "region", (Cohort("download:north"),))
    async_stream = table_burst("async stream", "/feed/", "live-feeds", "session", each("feed"))
    api = table_burst("DRF, token", "/api/orders/", "api-users", "user", each("orders", programs))
    decorated = Burst("decorator", "/dashboard/", "dashboard", "all", cap, dashboard)
    named = table_burst("policy=", "/rebuild/", "heavy-jobs", "all", (Cohort("rebuild", anybody),), "POST")
    line = table_burst("in line", "/labels/", "labels", "user", each("labels"))
    shadow = table_burst("shadow", "/search/", "site-shadow", "address", (Cohort("search"),))
    return (
        [sync_page, async_job, class_view, sync_stream, api, decorated, named, shadow, line],
        [sync_page, async_job, class_view, async_stream, api, decorated, named, shadow, line],
        [sync_page, async_job, class_view, sync_stream, async_stream, api, decorated, named, shadow, line],
    )


# -- the people -------------------------------------------------------------------------------------------------------


def prepare(directory: Path) -> None:
    """Set Django up in this process, and the environment that the servers inherit, on a fresh database."""
    for name in [name for name in os.environ if name.startswith(("UVICORN_", "GUNICORN_"))]:
        del os.environ[name]
    os.environ.update(
        DJANGO_SETTINGS_MODULE="example.settings",
        EXAMPLE_DEBUG="0",
        EXAMPLE_SECRET_KEY=secrets.token_urlsafe(),
        EXAMPLE_DATABASE=str(directory / "db.sqlite3"),
        EXAMPLE_HELD="1",
    )
    django.setup()
    call_command("migrate", verbosity=0)


def log_in(*names: str) -> dict[str, dict[str, str]]:
    """Make users with a session each: name -> the headers that their browser would send."""
    from django.conf import settings
    from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
    from django.contrib.auth.models import User
    from django.contrib.sessions.backends.db import SessionStore

    people = {}
    for name in names:
        user = User.objects.create_user(name)
        session = SessionStore()
        session[SESSION_KEY] = str(user.pk)
        session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
        session[HASH_SESSION_KEY] = user.get_session_auth_hash()
        session.save()
        csrf = secrets.token_hex(16)
        cookie = f"{settings.SESSION_COOKIE_NAME}={session.session_key}; {settings.CSRF_COOKIE_NAME}={csrf}"
        people[name] = {"Cookie": cookie, "X-CSRFToken": csrf}
    return people


def tokens(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name -> the headers that a program of this user would send."""
    from django.contrib.auth.models import User
    from rest_framework.authtoken.models import Token

    made = {name: Token.objects.create(user=User.objects.get(username=name)) for name in names}
    return {name: {"Authorization": f"Token {token.key}"} for name, token in made.items()}


# -- the servers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server that runs the example site, and the file that its views count in."""

    title: str
    port: int
    gauge_file: Path
    log: Path


def gunicorn(port: int, processes: int) -> list[str]:
    options = ["--worker-class", "gthread", "--workers", str(processes), "--threads", str(THREADS)]
    place = ["--no-control-socket", "--chdir", str(HERE), "--bind", f"{HOST}:{port}"]
    return [sys.executable, "-m", "gunicorn", *options, *place, "example.wsgi"]


def uvicorn(port: int, processes: int) -> list[str]:
    options = ["--workers", str(processes), "--lifespan", "off", "--no-access-log"]
    place = ["--app-dir", str(HERE), "--host", HOST, "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", *options, *place, "example.asgi:application"]


COMMANDS = {"gunicorn": gunicorn, "uvicorn": uvicorn}


@contextmanager
def serving(name: str, title: str, processes: int, directory: Path, gauge_file: Path) -> Iterator[Server]:
    """Run a server for the length of the block, on a port that was free a moment ago (and else on another)."""
    process: subprocess.Popen[bytes] | None = None
    try:
        for attempt in range(3):
            server = Server(title, free_port(), gauge_file, directory / f"{name}-{attempt}.log")
            with server.log.open("wb") as log:
                process = subprocess.Popen(
                    COMMANDS[name](server.port, processes),
                    cwd=ROOT,
                    env={**os.environ, "EXAMPLE_GAUGE_FILE": str(server.gauge_file)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the demo, which then stops its servers
                )
            if started(process, server):
                break
            stop(process)
            if "in use" not in server.log.read_text(errors="replace"):
                raise DemoError(f"{title} did not start. Its last words:\n{last_words(server)}")
        else:
            raise DemoError(f"{title} found no free port. Its last words:\n{last_words(server)}")
        wake(server, processes)
        yield server
    finally:
        if process is not None:
            stop(process)


def redis_program() -> str:
    """Raises: DemoError that says what to install."""
    named = os.environ.get("CONCURRENCY_TEST_REDIS_SERVER")
    for name in (named,) if named else ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    raise DemoError(NO_REDIS)


@contextmanager
def a_redis(directory: Path) -> Iterator[str]:
    """A Redis on a free port for the length of the block, without persistence. Gives its URL."""
    import redis

    port = free_port()
    log = directory / "redis.log"
    options = ["--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no", "--dir", str(directory)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [redis_program(), *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_WITHIN
        with redis.Redis(host=HOST, port=port) as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.RedisError as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        words = log.read_text(errors="replace")[-2000:]
                        raise DemoError(f"the Redis did not start. Its last words:\n{words}") from error
                    time.sleep(0.02)
        yield f"redis://{HOST}:{port}/0"
    finally:
        stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def started(process: subprocess.Popen[bytes], server: Server) -> bool:
    """Wait until it answers: this server, and not another program that was quicker to take the port."""
    deadline = time.monotonic() + START_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        answer = ask(server.port, "GET", "/-/held/")
        if answer.status == 200:
            try:
                return os.getpgid(json.loads(answer.body)["pid"]) == process.pid
            except (ValueError, KeyError, TypeError, ProcessLookupError):
                return False
        if answer.status:
            return False
        time.sleep(0.05)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session, so these are its own processes only
    process.wait()


def last_words(server: Server) -> str:
    lines = server.log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-15:]) or "(none)"


# -- the client -------------------------------------------------------------------------------------------------------


def ask(
    port: int, method: str, path: str, headers: dict[str, str] | None = None, together: threading.Barrier | None = None
) -> Answer:
    """One request on a connection of its own, sent when all of `together` have connected."""
    connection = http.client.HTTPConnection(HOST, port, timeout=CLIENT_TIMEOUT)
    try:
        connection.connect()
        if together is not None:
            together.wait()
        connection.request(method, path, headers={"Connection": "close", **(headers or {})})
        response = connection.getresponse()
        return Answer(response.status, response.reason, response.getheaders(), response.read())
    except (OSError, http.client.HTTPException, threading.BrokenBarrierError) as error:
        if together is not None:
            together.abort()
        return Answer(0, f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def wake(server: Server, processes: int) -> None:
    """Ask so many at once that every process has some: the first request of each loads the site, which may take a second."""
    together = threading.Barrier(WAKE_EACH * processes, timeout=CLIENT_TIMEOUT)
    asked = (server.port, "GET", "/-/held/", None, together)
    threads = [threading.Thread(target=ask, args=asked, daemon=True) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def held(server: Server) -> list[str]:
    """The policies whose slots are held now, one entry a slot."""
    answer = ask(server.port, "GET", "/-/held/")
    if answer.status != 200:
        raise DemoError(f"/-/held/ answered {answer.status} {answer.reason}. Last words:\n{last_words(server)}")
    return [holder["policy"] for holder in json.loads(answer.body)["held"]]


def send(servers: Sequence[Server], burst: Burst) -> Outcome:
    """Send one burst, watch the store meanwhile, and wait until every slot is given back.

    Several servers get a share of every cohort; they have one store and one gauge.
    """
    each = AT_ONCE // len(burst.cohorts)
    senders = [(cohort, servers[number % len(servers)]) for cohort in burst.cohorts for number in range(each)]
    together = threading.Barrier(len(senders), timeout=CLIENT_TIMEOUT)
    answers: list[Answer] = []

    def client(cohort: Cohort, server: Server) -> None:
        path = f"{burst.path}?seconds={burst.seconds}"
        answers.append(ask(server.port, burst.method, path, cohort.headers, together))

    threads = [threading.Thread(target=client, args=sender, daemon=True) for sender in senders]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads):
        seen = max(seen, held(servers[0]).count(burst.policy))
        time.sleep(0.05)
    deadline = time.monotonic() + LET_GO_WITHIN
    while (left := len(held(servers[0]))) and time.monotonic() < deadline:
        time.sleep(0.02)
    counted = gauge.read(servers[0].gauge_file)
    readings = [counted.get(cohort.gauge, gauge.Reading()) for cohort in burst.cohorts]
    return Outcome(burst, answers, readings, seen, left)


# -- what a person sees -----------------------------------------------------------------------------------------------


def new_table(title: str) -> Table:
    """Fits 80 columns."""
    table = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("view", "policy", "cap"):
        table.add_column(heading, no_wrap=True)
    for heading in ("sent", "admitted", "rejected", "most in\nflight", "held\nat end"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def add(table: Table, outcome: Outcome, tick: str, cross: str) -> None:
    burst = outcome.burst
    table.add_row(
        burst.kind,
        burst.policy,
        f"{burst.cap}/{burst.per}" if burst.per != "all" else f"{burst.cap} in all",
        str(len(outcome.answers)),
        str(outcome.admitted),
        "[dim]shadow[/]" if burst.shadow and not outcome.rejected else str(len(outcome.rejected)),
        ", ".join(str(reading.most) for reading in outcome.readings),
        str(outcome.left),
        f"[bold red]{cross}[/]" if any(outcome.faults()) else f"[green]{tick}[/]",
    )


def say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line)


def told_of_the_line(outcome: Outcome) -> str:
    burst, seconds = outcome.burst, f"{outcome.longest_wait:.2f} s"
    return (
        f"{burst.policy}: {burst.cap} at a time for each {burst.per}, the others waited in line, {seconds} at most.\n"
    )


@contextmanager
def growing(table: Table, console: Console) -> Iterator[None]:
    """Show the table: on a terminal row by row as the bursts end, elsewhere once at the end."""
    if console.is_terminal:
        with Live(table, console=console):
            yield
    else:
        yield
        console.print(table)
    console.print()


def as_the_client_sees_it(answer: Answer) -> Panel:
    head = Text(f"HTTP/1.1 {answer.status} {answer.reason}\n", style="bold red")
    for name, value in answer.headers:
        head.append(f"{name}: ", style="cyan").append(f"{value}\n", style="default")
    text = answer.body.decode(errors="replace")
    try:
        body = JSON(text).text
        body.no_wrap = False
    except ValueError:
        body = Text(text)
    return Panel(Group(head, body), title="one rejection, as the client sees it", title_align="left")


def next_steps(both: bool) -> str:
    python = Path(sys.executable)
    command = str(python.relative_to(ROOT) if python.is_relative_to(ROOT) else python)
    manage = f"{escape(command)} example_project/manage.py"
    make = "make demo-redis" if both else "make demo"
    other = (
        "  all of it on a Redis of yours: [cyan]EXAMPLE_REDIS_URL=redis://127.0.0.1:6379/0 make demo[/]"
        if both
        else "  one cap over two servers and four processes: [cyan]make demo-redis[/] (it needs redis-server)"
    )
    return "\n".join(
        (
            "[bold]What to try next[/]",
            f"  change a number in [cyan]policies.example.yaml[/] and run [cyan]{make}[/] again",
            f"  see it fail without the limits: [cyan]EXAMPLE_LIMITS_OFF=1 {make}[/]",
            other,
            "  in a browser, logged in as alice with the password demo:",
            *(f"    [cyan]{manage} {word}[/]" for word in ("migrate", "demo_users", "runserver")),
            "  in your own site: the middleware and ten lines of YAML, see [cyan]README.md[/]",
        )
    )


@dataclass(frozen=True)
class Section:
    """One table of the demo: the bursts, and the servers (name -> title) that get each of them together."""

    title: str
    servers: dict[str, str]
    sends: list[Burst]


def sections(both: bool, processes: int) -> list[Section]:
    """What there is to see: each server on its own, or both at once."""
    people = log_in("alice", "bob")
    for_wsgi, for_asgi, for_both = bursts(people, tokens(people))
    if both:
        title = f"gunicorn {processes}x{THREADS} and uvicorn x{processes}, one Redis"
        return [Section(title, {"gunicorn": "gunicorn", "uvicorn": "uvicorn"}, for_both)]
    wsgi, asgi = f"gunicorn (WSGI, gthread, {processes} x {THREADS} threads)", f"uvicorn (ASGI, {processes} processes)"
    return [Section(wsgi, {"gunicorn": wsgi}, for_wsgi), Section(asgi, {"uvicorn": asgi}, for_asgi)]


def run(console: Console, directory: Path, both: bool) -> list[str]:
    """The whole demo. Returns what went wrong."""
    from django_concurrency_mw import conf

    prepare(directory)
    store = conf.current().backends["default"].backend
    processes = 1 if store == "memory" else PROCESSES  # what one process counts, another does not see
    number = f"{processes} process{'es' if processes > 1 else ''}"
    console.print(f"store: [bold]{store}[/], {SAYS.get(store, '')}{number} of each server\n")
    utf8 = console.encoding.startswith("utf")
    marks = ("✓", "✗") if utf8 else ("ok", "NO")
    faults: list[str] = []
    example: Answer | None = None
    for section in sections(both, processes):
        table = new_table(section.title)
        label = " and ".join(section.servers)
        gauge_file = directory / f"{'-'.join(section.servers)}.gauge"
        with ExitStack() as stack:
            servers = [
                stack.enter_context(serving(name, title, processes, directory, gauge_file))
                for name, title in section.servers.items()
            ]
            lines: list[str] = []
            stack.callback(say, console, lines)
            stack.enter_context(growing(table, console))
            odd = False
            for burst in section.sends:
                outcome = send(servers, burst)
                add(table, outcome, *marks)
                if burst.waits:
                    lines.append(told_of_the_line(outcome))
                faults += [f"{label}: {fault}" for fault in outcome.faults()]
                odd = odd or any(answer.status not in (200, burst.status) for answer in outcome.answers)
                if example is None and outcome.rejected:
                    example = outcome.rejected[0]
        if odd:
            faults += [f"the last words of {server.title}:\n{last_words(server)}" for server in servers]
    console.print("[dim]Counted by the views, not by the limiter; with two users or keys, for each.[/]\n")
    if example is not None:
        console.print(as_the_client_sees_it(example))
    return faults


def terminated(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(description="Shows the caps of the example site hold under real servers.")
    parser.add_argument("--redis", action="store_true", help="gunicorn and uvicorn at once, on one Redis of its own")
    both: bool = parser.parse_args().redis
    signal.signal(signal.SIGTERM, terminated)
    console = Console(highlight=False)
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="concurrency-demo-") as name, ExitStack() as stack:
            directory = Path(name)
            if both:
                os.environ["EXAMPLE_REDIS_URL"] = stack.enter_context(a_redis(directory))
            faults = run(console, directory, both)
    except KeyboardInterrupt:
        console.print("\nstopped")
        return 130
    except (DemoError, ImproperlyConfigured) as error:
        console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
        return 1
    for fault in faults:
        console.print(f"[bold red]{escape(fault)}[/]", soft_wrap=True)
    if faults:
        return 1
    console.print(f"\n[bold green]Every cap held.[/] {time.monotonic() - begun:.0f} seconds\n")
    console.print(next_steps(both), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
