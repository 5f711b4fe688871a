"""The demo: starts the example site under real servers, sends bursts at every kind of view, and shows the caps hold.

What is admitted and how many were in flight is counted by the views themselves (example/gauge.py), not by the limiter.
Exit status: 0 if every cap held, was reached, and no slot is left; 1 if not, or if a server did not start; 130 on Ctrl-C.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
HOLD = 0.5  # seconds that a view takes
START_WITHIN = 20.0
LET_GO_WITHIN = 2.0
CLIENT_TIMEOUT = 20.0


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
    """AT_ONCE requests at one view, shared out among its cohorts. `status` is what a rejection answers."""

    kind: str
    path: str
    policy: str
    per: str
    cap: int
    cohorts: tuple[Cohort, ...]
    method: str = "GET"
    shadow: bool = False
    status: int = 429


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
    return Burst(kind, path, policy, per, found.max_concurrent, cohorts, method, not found.block, found.status)


def bursts(people: dict[str, dict[str, str]]) -> tuple[list[Burst], list[Burst]]:
    """The bursts for the WSGI and for the ASGI server. `people`: user name -> the headers of their session."""
    from reports import views

    def each(view: str) -> tuple[Cohort, ...]:
        return tuple(Cohort(f"{view}:{name}", headers) for name, headers in people.items())

    anybody = next(iter(people.values()))
    partners = tuple(Cohort(f"figures:{name}", {"X-Api-Key": key}) for key, name in views.PARTNERS.items())
    dashboard = (Cohort("dashboard", anybody),)
    cap = views.DASHBOARDS_AT_ONCE

    sync_page = table_burst("sync", "/report/", "user-reports", "user", each("report"))
    async_job = table_burst("async", "/export/", "exports", "user", each("export"), "POST")
    class_view = table_burst("class", "/figures/", "partners", "API key", partners)
    sync_stream = table_burst("sync stream", "/download/north/", "downloads", "region", (Cohort("download:north"),))
    async_stream = table_burst("async stream", "/feed/", "live-feeds", "session", each("feed"))
    decorated = Burst("decorator", "/dashboard/", "dashboard", "all", cap, dashboard)
    named = table_burst("policy=", "/rebuild/", "heavy-jobs", "all", (Cohort("rebuild", anybody),), "POST")
    shadow = table_burst("shadow", "/search/", "site-shadow", "address", (Cohort("search"),))
    return (
        [sync_page, async_job, class_view, sync_stream, decorated, named, shadow],
        [sync_page, async_job, class_view, async_stream, decorated, named, shadow],
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
def serving(name: str, title: str, processes: int, directory: Path) -> Iterator[Server]:
    """Run a server for the length of the block, on a port that was free a moment ago (and else on another)."""
    process: subprocess.Popen[bytes] | None = None
    try:
        for attempt in range(3):
            server = Server(title, free_port(), directory / f"{name}.gauge", directory / f"{name}-{attempt}.log")
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
        yield server
    finally:
        if process is not None:
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
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
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


def held(server: Server) -> list[str]:
    """The policies whose slots are held now, one entry a slot."""
    answer = ask(server.port, "GET", "/-/held/")
    if answer.status != 200:
        raise DemoError(f"/-/held/ answered {answer.status} {answer.reason}. Last words:\n{last_words(server)}")
    return [holder["policy"] for holder in json.loads(answer.body)["held"]]


def send(server: Server, burst: Burst) -> Outcome:
    """Send one burst, watch the store meanwhile, and wait until every slot is given back."""
    senders = [cohort for cohort in burst.cohorts for _ in range(AT_ONCE // len(burst.cohorts))]
    together = threading.Barrier(len(senders), timeout=CLIENT_TIMEOUT)
    answers: list[Answer] = []

    def client(cohort: Cohort) -> None:
        path = f"{burst.path}?seconds={HOLD}"
        answers.append(ask(server.port, burst.method, path, cohort.headers, together))

    threads = [threading.Thread(target=client, args=(cohort,), daemon=True) for cohort in senders]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads):
        seen = max(seen, held(server).count(burst.policy))
        time.sleep(0.05)
    deadline = time.monotonic() + LET_GO_WITHIN
    while (left := len(held(server))) and time.monotonic() < deadline:
        time.sleep(0.02)
    counted = gauge.read(server.gauge_file)
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


def next_steps() -> str:
    python = Path(sys.executable)
    command = str(python.relative_to(ROOT) if python.is_relative_to(ROOT) else python)
    manage = f"{escape(command)} example_project/manage.py"
    return "\n".join(
        (
            "[bold]What to try next[/]",
            "  change a number in [cyan]policies.example.yaml[/] and run [cyan]make demo[/] again",
            "  see it fail without the limits: [cyan]EXAMPLE_LIMITS_OFF=1 make demo[/]",
            "  in a browser, logged in as alice with the password demo:",
            *(f"    [cyan]{manage} {word}[/]" for word in ("migrate", "demo_users", "runserver")),
            "  in your own site: the middleware and ten lines of YAML, see [cyan]README.md[/]",
        )
    )


def run(console: Console, directory: Path) -> list[str]:
    """The whole demo. Returns what went wrong."""
    from django_concurrency_mw import conf

    prepare(directory)
    store = conf.current().backends["default"].backend
    processes = 1 if store == "memory" else 2  # what one process counts, another does not see
    console.print(f"store: [bold]{store}[/], {processes} process{'es' if processes > 1 else ''}\n")
    for_wsgi, for_asgi = bursts(log_in("alice", "bob"))
    utf8 = console.encoding.startswith("utf")
    marks = ("✓", "✗") if utf8 else ("ok", "NO")
    faults: list[str] = []
    example: Answer | None = None
    for name, title, sends in (
        ("gunicorn", f"gunicorn (WSGI, gthread, {THREADS} threads)", for_wsgi),
        ("uvicorn", "uvicorn (ASGI)", for_asgi),
    ):
        table = new_table(title)
        with serving(name, title, processes, directory) as server, growing(table, console):
            odd = False
            for burst in sends:
                outcome = send(server, burst)
                add(table, outcome, *marks)
                faults += [f"{name}: {fault}" for fault in outcome.faults()]
                odd = odd or any(answer.status not in (200, burst.status) for answer in outcome.answers)
                if example is None and outcome.rejected:
                    example = outcome.rejected[0]
        if odd:
            faults.append(f"the last words of {name}:\n{last_words(server)}")
    console.print("[dim]Counted by the views, not by the limiter; with two users or keys, for each.[/]\n")
    if example is not None:
        console.print(as_the_client_sees_it(example))
    return faults


def terminated(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def main() -> int:
    signal.signal(signal.SIGTERM, terminated)
    console = Console(highlight=False)
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="concurrency-demo-") as directory:
            faults = run(console, Path(directory))
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
    console.print(next_steps(), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
