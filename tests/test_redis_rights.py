"""Redis users who may do little, and services that switch commands off: it works, or a check says what is missing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis.exceptions import NoPermissionError, ResponseError

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.errors import classed, passes
from django_concurrency_mw.backends.redis.greeting import Greeting
from django_concurrency_mw.backends.redis.leftovers import Work
from django_concurrency_mw.backends.redis.rights import LISTENING, PERMISSIONS
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import Keys
from django_concurrency_mw.exceptions import BackendError, PermanentBackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .redis_server import RedisServer
from .support import wait_until

#: The rules of the line that the docs and the cure have, but for the keys.
RULES = [word for word in PERMISSIONS.split() if word.startswith("+")]
#: What requests can do without, and the check that says that it is missing.
OPTIONAL = {
    **dict.fromkeys(("+script|load", "+zcount", "+zscan", "+scan", "+set", "+mget", "+zrangebyscore"), "W026"),
    "+client|info": "W007",
    "+client|kill": "W007",
}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Of these tests' own: users come and go."""
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture
def make(server: RedisServer, prefix: str) -> Iterator[Callable[..., RedisBackend]]:
    stores: list[RedisBackend] = []
    client = server.client()

    def made(*rules: str, database: int = 3, **options: str) -> RedisBackend:
        client.execute_command("ACL", "SETUSER", "app", "reset", "on", ">pw", "resetchannels", *rules)
        url = f"redis://app:pw@127.0.0.1:{server.port}/{database}"
        stores.append(RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 2, **options})))
        return stores[-1]

    yield made
    client.execute_command("ACL", "SETUSER", "app", "allkeys", "+@all")
    for store in stores:
        store.close()
    client.close()


Make = Callable[..., RedisBackend]


def rules(prefix: str, without: str = "") -> list[str]:
    return [f"~{{{prefix}}}*", *(rule for rule in RULES if rule != without)]


def slot(limit: int = 100) -> Slot:
    return Slot("p", make_key("k"), limit, 60.0, new_token())


def found(store: RedisBackend) -> list[str]:
    return [str(message.id).removeprefix("django_concurrency_mw.") for message in store.check()]


def works(store: RedisBackend) -> None:
    one = slot(limit=1)
    assert isinstance(store.take([one]), Taken)
    assert isinstance(store.take([slot(limit=1)]), Full)
    assert store.renew([(one, 60)]) == [True]
    store.give([one])

    async def main() -> None:
        assert isinstance(await store.atake([one]), Taken)
        await store.agive([one])

    asyncio.run(main())
    assert wait_until(lambda: isinstance(store.take([slot(limit=1)]), Taken))


def test_the_documented_line_is_enough(make: Make, prefix: str) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "redis.md").read_text()
    line, listening = re.findall(r"^ACL SETUSER app (.*)$", page, re.MULTILINE)
    assert listening.split("* ")[1] == LISTENING.split("* ")[1]
    assert [word for word in line.split() if word.startswith("+")] == RULES
    line = line.replace(">secret", ">pw").replace("~{concurrency}*", f"~{{{prefix}}}*")
    store = make(*line.split())
    assert found(store) == []
    works(store)
    assert len(store.snapshot()) == 1


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in OPTIONAL])
def test_what_requests_need_is_an_error_that_names_it(make: Make, prefix: str, rule: str) -> None:
    (message,) = make(*rules(prefix, without=rule)).check()
    assert message.id == "django_concurrency_mw.E005"
    assert f" {rule} " in str(message.hint)
    assert "pw" not in message.msg


def test_what_an_option_needs_beyond_them_is_named_too(make: Make, prefix: str) -> None:
    store = make(*rules(prefix), client_name="web")
    (message,) = store.check()
    assert message.id == "django_concurrency_mw.E005"
    assert " +client|kill +client|setname" in str(message.hint)
    assert found(make(*rules(prefix), "+client|setname", client_name="web")) == []


@pytest.mark.parametrize("rule", ["", *LISTENING.removeprefix("ACL SETUSER <user> ").split()])
def test_who_waits_can_be_told_by_the_second_line_and_all_of_it(make: Make, prefix: str, rule: str) -> None:
    line = LISTENING.removeprefix("ACL SETUSER <user> ").replace(rule, "") if rule else LISTENING.partition("> ")[2]
    store = make(*rules(prefix), *(line % f"{{{prefix}}}" if "%s" in line else line).split())
    messages = store.check_waiting()
    assert [message.id for message in messages] == (["django_concurrency_mw.W025"] if rule else [])
    assert all(f" &{{{prefix}}}:1:* +publish " in str(message.hint) for message in messages)


@pytest.mark.parametrize(("rule", "id"), OPTIONAL.items())
def test_what_requests_can_do_without_is_a_warning_that_names_it(
    make: Make, server: RedisServer, prefix: str, rule: str, id: str
) -> None:
    store = make(*rules(prefix, without=rule))
    (message,) = store.check()
    assert message.id == f"django_concurrency_mw.{id}"
    assert rule in str(message.hint)
    with server.client() as client:
        client.script_flush()  # as after a restart
    works(store)


def test_the_keys_of_another_prefix_are_an_error(make: Make, prefix: str) -> None:
    (message,) = make(*rules(prefix + "x")).check()
    assert message.id == "django_concurrency_mw.E005"
    assert f"~{{{prefix}}}:1:*" in str(message.hint)


def test_a_database_that_the_server_does_not_have(make: Make, prefix: str) -> None:
    store = make(*rules(prefix), database=99)
    (message,) = store.check()
    assert message.id == "django_concurrency_mw.E005"
    assert "correct the number at the end of LOCATION" in str(message.hint)

    async def main() -> None:
        await store.atake([slot()])

    with pytest.raises(PermanentBackendError, match="out of range") as raised:
        asyncio.run(main())
    assert "correct the number" in raised.value.cure


@pytest.mark.parametrize("command", ["CLIENT", "SCRIPT", "CONFIG", "INFO"])
def test_a_command_that_is_switched_off_and_that_requests_can_do_without(prefix: str, command: str) -> None:
    server = RedisServer("--rename-command", command, "")
    store = RedisBackend(BackendConfig("default", "redis", server.url, prefix, {"socket_timeout": 2}))
    try:
        assert found(store) == {"CLIENT": ["W007"], "SCRIPT": ["W026"]}.get(command, [])
        works(store)
    finally:
        store.close()
        server.stop()


#: How services put it, as redis-py hands it on.
SWITCHED_OFF = [
    "unknown command 'CLIENT', with args beginning with: 'INFO'",
    "unknown redis command 'client'",
    "Command is not available: 'CLIENT'. See the documentation",
    "command 'client' is not allowed",
    "command is not allowed in this mode",
    "forbidden command",
    "unsupported command 'CLIENT'",
    "operation not permitted",
    "This command is disabled",
]


@pytest.mark.parametrize("said", [*SWITCHED_OFF, "CLIENT was never heard of here"])
@pytest.mark.parametrize("code", ["", "ERR "])
def test_a_service_that_does_not_say_who_a_connection_is_in_whatever_words(code: str, said: str) -> None:
    """CLIENT INFO is refused, and the greeting goes on."""
    assert Greeting(Work([], [])).heard([ResponseError(code + said), "sha", "sha"]) == (None, [])


@pytest.mark.parametrize("said", SWITCHED_OFF)
@pytest.mark.parametrize("code", ["", "ERR "])
def test_what_is_switched_off_stays_so(code: str, said: str) -> None:
    error = classed(ResponseError(code + said), Keys("p"))
    assert isinstance(error, PermanentBackendError)
    assert "+evalsha" in error.cure
    assert not passes(ResponseError(code + said))


@pytest.mark.parametrize(
    "said",
    [
        "NOPERM this user has no permissions to run the 'zadd' command",
        "Error running script (call to f_1): @user_script:1: @user_script: 1: The user executing the script can't run this "
        "command or subcommand",
        "The user executing the script can't access at least one of the keys mentioned in the command arguments script: 1",
        "ACL failure in script: User app has no permissions to run the 'zadd' command script: on @user_script:1.",
        "ACL failure in script: No permissions to access a key script: on @user_script:1.",
    ],
)
def test_what_the_user_may_not_stays_so(said: str) -> None:
    """As Redis 6.2, 7.0, and later ones and Valkey put it, of a command that was sent and of one inside a script."""
    error = classed(ResponseError(said), Keys("p"))
    assert isinstance(error, PermanentBackendError)
    assert "ACL user" in error.cure
    assert not passes(ResponseError(said))


@pytest.mark.parametrize(
    "said",
    [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "command not allowed when used memory > 'maxmemory'.",
        "Error running script (call to f_1): @user_script:7: -OOM command not allowed when used memory > 'maxmemory'.",
        "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk. Commands that may "
        "modify the data set are disabled, because this instance is configured to report errors during writes",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    ],
)
def test_what_goes_by_is_not_taken_for_it(said: str) -> None:
    assert passes(ResponseError(said))
    error = classed(ResponseError(said), Keys("p"))
    assert isinstance(error, BackendError)
    assert not isinstance(error, PermanentBackendError)


def test_a_server_that_is_busy_greets_nobody() -> None:
    with pytest.raises(ResponseError, match="BUSY"):
        Greeting(Work([], [])).heard([ResponseError("BUSY Redis is busy running a script."), "sha", "sha"])
    assert Greeting(Work([], [])).heard([NoPermissionError("no permissions"), "sha", "sha"]) == (None, [])


@pytest.mark.parametrize("lacks", ["+evalsha", "+eval"])
def test_one_of_the_two_ways_to_run_a_script_is_not_enough(make: Make, prefix: str, lacks: str) -> None:
    """Takes go by the digest, rare calls by the text; whoever finds out says the line that is needed."""
    store = make(*rules(prefix, without=lacks))
    with pytest.raises(PermanentBackendError) as raised:
        store.probe()
    assert PERMISSIONS.split("+", 1)[1] in raised.value.cure
