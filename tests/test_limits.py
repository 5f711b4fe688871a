"""Limits that vary: per key, by callable, never full, by cost, and who is left out. One suite for both halves, all stores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from django_concurrency_mw import concurrency_limit, conf, drivers, signals
from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.effects import Steps
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keys import digest_text
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.limiter import decide, store_of
from django_concurrency_mw.outcomes import Concurrency, Rejection, Verdict
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.rejection import respond

from .support import Limits, backend_entry, wait_until


@pytest.fixture(params=["threads", "loop"])
def drive(request: pytest.FixtureRequest) -> Iterator[Callable[[Steps[Any]], Any]]:
    """Runs steps in this thread, or all of a test's on one event loop."""
    if request.param == "threads":
        yield drivers.run
        return
    with asyncio.Runner() as runner:
        yield lambda steps: runner.run(drivers.arun(steps))


@pytest.fixture(params=["memory", "host", "redis"])
def backend(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
    """An entry of BACKENDS."""
    return backend_entry(request.param, request, prefix, tmp_path)


class Site:
    """Requests that take what the table's policies say, and give it back when they are told to."""

    def __init__(self, drive: Callable[[Steps[Any]], Any], limits: Limits, backend: dict[str, Any]) -> None:
        self.drive, self._limits, self._backend = drive, limits, backend
        self.leases: list[Lease] = []

    def table(self, policies: dict[str, Any], **settings: Any) -> None:
        self._limits({"policies": policies}, BACKENDS={"default": self._backend}, **settings)

    def ask(self, user: int | None = None, address: str = "203.0.113.9", **headers: str) -> Concurrency:
        return self.verdict(user, address, **headers).concurrency

    def verdict(self, user: int | None = None, address: str = "203.0.113.9", **headers: str) -> Verdict:
        request = RequestFactory().get("/", REMOTE_ADDR=address, headers=headers)
        request.user = SimpleNamespace(pk=user, is_authenticated=user is not None)  # type: ignore[assignment]  # all that is read
        lease, config = Lease(request), conf.current()
        self.leases.append(lease)
        try:
            verdict: Verdict | None = self.drive(decide(request, lease, config.table.policies, {}, config))
        except BaseException:
            self.end(lease)
            raise
        if verdict is None:
            return Verdict(Concurrency())
        if verdict.rejected_by is not None:
            self.end(lease)
        return verdict

    def refused(self, *args: Any, **headers: str) -> Rejection:
        rejection = self.ask(*args, **headers).rejection
        assert rejection is not None
        return rejection

    def end(self, lease: Lease | None = None) -> None:
        """The last one, or this one."""
        self.drive((lease or self.leases[-1]).steps_to_give())

    @property
    def store(self) -> BaseBackend:
        config = conf.current()
        return store_of(config.table.policies[0], config)

    def held(self) -> list[str]:
        return sorted(holder.policy for holder in self.store.snapshot())


@pytest.fixture
def site(drive: Callable[[Steps[Any]], Any], limits: Limits, backend: dict[str, Any]) -> Iterator[Site]:
    site = Site(drive, limits, backend)
    yield site
    for lease in site.leases:
        site.end(lease)
    assert wait_until(lambda: site.held() == [])


def admitted(found: Concurrency) -> bool:
    return found.rejection is None


class TestPerKey:
    def test_a_key_has_its_own_limit(self, site: Site) -> None:
        site.table({"p": {"key": "user", "max_concurrent": 1, "per_key": {"user:2": 3, "user:3": 0, "user:4": None}}})
        for user, limit in ((1, 1), (2, 3)):
            for number in range(1, limit + 1):
                (result,) = site.ask(user).policies
                assert (result.state, result.in_flight, result.limit) == ("held", number, limit)
            assert site.refused(user).limit == limit
        assert site.refused(3).retry_after is None
        assert all(admitted(site.ask(4)) for _ in range(10))
        (result,) = site.ask(4).policies
        assert (result.in_flight, result.limit) == (11, None)

    @pytest.mark.parametrize("key", ["header:X-Api-Key", "{header.X-Api-Key}", "key={header.X-Api-Key};"])
    def test_a_header_is_written_as_it_is_sent_or_as_it_is_shown(self, site: Site, key: str) -> None:
        def written(value: str) -> str:
            return f"header:X-Api-Key:{value}" if key.startswith("header:") else key.format(header=_Header(value))

        own = {written("gold"): 3, written(digest_text("silver")): 2}
        site.table({"p": {"key": key, "max_concurrent": 1, "per_key": own}})
        for value, limit in (("gold", 3), ("silver", 2), ("tin", 1)):
            for _ in range(limit):
                assert admitted(site.ask(None, **{"X-Api-Key": value}))
            assert site.refused(None, **{"X-Api-Key": value}).limit == limit

    def test_a_digest_that_was_sent_is_no_way_to_the_limit_of_another(self, site: Site) -> None:
        site.table(
            {"p": {"key": "header:X-Api-Key", "max_concurrent": 1, "per_key": {"header:X-Api-Key:gold": 3}}},
        )
        assert admitted(site.ask(None, **{"X-Api-Key": digest_text("gold")}))
        assert site.refused(None, **{"X-Api-Key": digest_text("gold")}).limit == 1

    def test_it_goes_before_the_callable_which_is_not_asked(self, site: Site) -> None:
        asked.clear()
        site.table({"p": {"key": "user", "max_concurrent": f"{__name__}.of_user", "per_key": {"user:9": 1}}})
        assert admitted(site.ask(9))
        assert site.refused(9).limit == 1
        assert asked == []
        assert admitted(site.ask(8))
        assert asked == [8]


class _Header:
    """For `str.format` with a template of ours."""

    def __init__(self, value: str) -> None:
        vars(self)["X-Api-Key"] = value

    def __getattr__(self, name: str) -> str:
        return str(vars(self)[name])


asked: list[int] = []


def of_user(request: HttpRequest) -> int | None:
    """As many as the number of the user, and user 7 without end."""
    pk = int(request.user.pk)
    asked.append(pk)
    return None if pk == 7 else pk


async def aof_user(request: HttpRequest) -> int | None:
    await asyncio.sleep(0)
    return of_user(request)


def text(request: HttpRequest) -> Any:
    return "5"


def minus(request: HttpRequest) -> int:
    return -1


def yes(request: HttpRequest) -> bool:
    return True


def nothing(request: HttpRequest) -> None:
    return None


def breaks(request: HttpRequest) -> int:
    raise LookupError("as the project's code does")


class TestCallables:
    @pytest.mark.parametrize("name", ["of_user", "aof_user"])
    def test_the_limit_of_each_request(self, site: Site, name: str) -> None:
        site.table({"p": {"key": "user", "max_concurrent": f"{__name__}.{name}"}})
        for user in (1, 3):
            for _ in range(user):
                (result,) = site.ask(user).policies
                assert result.limit == user
            assert site.refused(user).limit == user
        for number in range(1, 12):
            (result,) = site.ask(7).policies
            assert (result.in_flight, result.limit) == (number, None)

    @pytest.mark.parametrize("name", ["of_user", "aof_user"])
    def test_the_cost_of_each_request(self, site: Site, name: str) -> None:
        site.table({"p": {"key": "global", "max_concurrent": 6, "cost": f"{__name__}.{name}"}})
        for user, in_flight in ((3, 3), (2, 5), (1, 6)):
            (result,) = site.ask(user).policies
            assert result.in_flight == in_flight
        assert site.refused(1).in_flight == 6

    @pytest.mark.parametrize("field", ["max_concurrent", "cost"])
    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("text", TypeError),
            ("minus", TypeError),
            ("yes", TypeError),
            ("breaks", LookupError),
            ("gone", ImproperlyConfigured),
        ],
    )
    def test_what_is_wrong_with_one_is_raised_and_nothing_is_held(
        self, site: Site, field: str, name: str, error: type[Exception]
    ) -> None:
        bad = {"key": "global", "max_concurrent": 5, field: f"{__name__}.{name}"}
        site.table({"first": {"key": "global", "max_concurrent": 5}, "p": bad})
        with pytest.raises(error) as caught:
            site.ask()
        if error is TypeError:
            assert f"policy p: the {field} callable" in str(caught.value)
        assert site.held() == []

    def test_no_cost_is_wrong_too(self, site: Site) -> None:
        site.table({"p": {"key": "global", "max_concurrent": 5, "cost": f"{__name__}.nothing"}})
        with pytest.raises(TypeError, match="from 1 to 1000, got null"):
            site.ask()


class TestNeverFull:
    def test_it_is_counted(self, site: Site) -> None:
        site.table({"p": {"key": "global", "max_concurrent": None}, "q": {"key": "global", "max_concurrent": 50}})
        for number in range(1, 31):
            verdict = site.verdict()
            p, _ = verdict.concurrency.policies
            assert (p.state, p.in_flight, p.limit) == ("held", number, None)
            assert verdict.fields == (("q", 50, 50 - number),), "a limit that there is not is not told"
        assert site.held().count("p") == 30

    def test_its_signals_say_so(self, site: Site) -> None:
        told: list[tuple[str, Any]] = []

        def hear(signal: Any, name: str) -> Any:
            def receiver(**arguments: Any) -> None:
                told.append((name, arguments["limit"]))

            signal.connect(receiver)
            return receiver

        receivers = [hear(signals.slot_acquired, "acquired"), hear(signals.slot_released, "released")]
        site.table({"p": {"key": "global", "max_concurrent": None}})
        site.ask()
        site.end()
        assert told == [("acquired", None), ("released", None)]
        del receivers


class TestCost:
    def test_one_request_takes_several(self, site: Site) -> None:
        site.table({"p": {"key": "global", "max_concurrent": 5, "cost": 2}})
        first = site.verdict()
        assert first.concurrency.policies[0].in_flight == 2
        assert first.fields == (("p", 5, 3),)
        assert site.verdict().fields == (("p", 5, 1),)
        refused = site.refused()
        assert (refused.reason, refused.in_flight, refused.limit) == ("full", 4, 5)
        site.end(site.leases[0])
        assert wait_until(lambda: len(site.held()) == 1)
        assert site.ask().policies[0].in_flight == 4
        assert [holder.cost for holder in site.store.snapshot()] == [2, 2]

    def test_all_or_nothing(self, site: Site) -> None:
        site.table(
            {
                "large": {"key": "global", "max_concurrent": 100, "cost": 30},
                "small": {"key": "global", "max_concurrent": 2},
            }
        )
        assert [result.in_flight for result in site.ask().policies] == [30, 1]
        assert [result.in_flight for result in site.ask().policies] == [60, 2]
        assert site.refused().violated == ("small",)
        assert sorted(holder.cost for holder in site.store.snapshot()) == [1, 1, 30, 30]

    def test_more_than_there_is(self, site: Site) -> None:
        """Rejected at once: the store is not asked, and no Retry-After could help."""
        site.table(
            {
                "wide": {"key": "global", "max_concurrent": 100, "cost": 50},
                "p": {"key": "user", "max_concurrent": 5, "cost": 6, "per_key": {"user:1": 6, "user:2": 0}},
            }
        )
        verdict = site.verdict(3)
        refused = verdict.concurrency.rejection
        assert refused is not None
        assert (refused.reason, refused.policy, refused.limit, refused.in_flight) == ("cost_above_limit", "p", 5, None)
        assert (refused.retry_after, refused.status, refused.violated) == (None, 429, ("p",))
        request = RequestFactory().get("/")
        response = site.drive(respond(request, verdict, verdict.fields, "always"))
        assert response.status_code == 429
        assert not {"Retry-After", "RateLimit"} & set(response.headers)
        assert b'"reason": "cost_above_limit"' in response.content
        assert site.held() == []
        assert admitted(site.ask(1))
        assert site.refused(2).reason == "full", "a limit of 0 admits nobody, whatever the cost"

    def test_in_the_shadow_it_counts_as_over(self, site: Site) -> None:
        reasons: list[tuple[str, bool]] = []

        def receiver(**arguments: Any) -> None:
            reasons.append((arguments["reason"], arguments["shadow"]))

        signals.request_rejected.connect(receiver)
        site.table({"p": {"key": "global", "max_concurrent": 5, "cost": 6, "block": False}})
        (result,) = site.ask().policies
        assert (result.state, result.in_flight) == ("over", None)
        assert reasons == [("cost_above_limit", True)]
        assert site.held() == []

    def test_while_the_store_fails_it_is_counted_here(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        site.table({"p": {"key": "global", "max_concurrent": 5, "cost": 2}})
        assert site.ask().policies[0].state == "held"

        def fails(*args: Any) -> Any:
            raise BackendError("down", whole=False)

        async def afails(*args: Any) -> Any:
            raise BackendError("down", whole=False)

        with monkeypatch.context() as broken:
            broken.setattr(site.store, "take", fails)
            broken.setattr(site.store, "atake", afails)
            (result,) = site.ask().policies
            assert (result.state, result.in_flight) == ("local", 4)
            refused = site.refused()
            assert (refused.reason, refused.in_flight) == ("full", 4)
        # Back again: what the stand-in holds counts too, whether or not it has been registered by now.
        assert site.refused().reason == "full"


class TestLeftOut:
    def test_networks(self, site: Site) -> None:
        site.table(
            {"p": {"key": "global", "max_concurrent": 1, "except_ips": ["10.0.0.0/8", "2001:db8::7/128"]}},
        )
        for address in ("10.1.2.3", "2001:db8::7", "::ffff:10.9.9.9"):
            assert not site.ask(None, address).limited, address
        assert site.held() == []
        assert admitted(site.ask(None, "2001:db8::8"))
        assert site.refused(None, "11.1.2.3").limit == 1

    def test_a_spoofed_address_is_none(self, site: Site) -> None:
        site.table({"p": {"key": "global", "max_concurrent": 0, "except_ips": ["10.0.0.0/8"]}})
        assert site.refused(None, "203.0.113.9", **{"X-Forwarded-For": "10.0.0.1"}).limit == 0
        site.table(
            {"p": {"key": "global", "max_concurrent": 0, "except_ips": ["10.0.0.0/8"]}},
            TRUSTED_PROXIES=["203.0.113.0/24"],
        )
        assert not site.ask(None, "203.0.113.9", **{"X-Forwarded-For": "10.0.0.1"}).limited

    def test_users(self, site: Site) -> None:
        site.table({"p": {"key": "global", "max_concurrent": 1, "except_users": [1, "7"]}})
        assert not site.ask(1).limited
        assert not site.ask(7).limited
        assert admitted(site.ask(17))
        assert site.refused(None).limit == 1
        assert site.refused(2).limit == 1

    def test_the_user_is_not_touched_where_the_address_decides(self, site: Site) -> None:
        site.table({"p": {"key": "user", "max_concurrent": 1, "except_ips": ["10.0.0.0/8"], "except_users": [1]}})

        class Nobody:
            def __getattr__(self, name: str) -> Any:
                raise AssertionError(f"request.user.{name} was read")

        request = RequestFactory().get("/", REMOTE_ADDR="10.0.0.1")
        request.user = Nobody()  # type: ignore[assignment]  # whoever reads it
        config = conf.current()
        assert site.drive(decide(request, Lease(request), config.table.policies, {}, config)) is None


class TestDecorator:
    def test_any_of_it_by_keyword(self, limits: Limits) -> None:
        limits()
        seen: list[Any] = []

        @concurrency_limit(
            key="user",
            max_concurrent=of_user,
            cost=lambda request: 2,
            per_key={"user:8": None},
            except_users=[1],
            name="varies",
        )
        def view(request: Any) -> HttpResponse:
            seen.append(request.concurrency)
            return HttpResponse()

        def ask(pk: int) -> int:
            request = RequestFactory().get("/")
            request.user = SimpleNamespace(pk=pk, is_authenticated=True)  # type: ignore[assignment]  # all that is read
            return int(view(request).status_code)

        assert [ask(1), ask(4), ask(8)] == [200, 200, 200]
        assert [(found.limited, [(one.limit, one.in_flight) for one in found.policies]) for found in seen] == [
            (False, []),
            (True, [(4, 2)]),
            (True, [(None, 2)]),
        ]

    def test_a_decorator_that_starts_from_the_table_keeps_it(self, limits: Limits) -> None:
        table = {
            "p": {"key": "user", "max_concurrent": 3, "cost": 2, "per_key": {"user:8": 9}, "except_ips": ["10.0.0.0/8"]}
        }
        limits({"policies": table})
        made: list[Policy] = []

        @concurrency_limit(policy="p", max_concurrent=4)
        def view(request: Any) -> HttpResponse:
            (result,) = request.concurrency.policies
            made.append(result)
            return HttpResponse()

        request = RequestFactory().get("/", REMOTE_ADDR="203.0.113.9")
        request.user = SimpleNamespace(pk=8, is_authenticated=True)  # type: ignore[assignment]  # all that is read
        assert view(request).status_code == 200
        request = RequestFactory().get("/", REMOTE_ADDR="203.0.113.9")
        request.user = SimpleNamespace(pk=1, is_authenticated=True)  # type: ignore[assignment]  # all that is read
        assert view(request).status_code == 200
        assert [(one.limit, one.in_flight) for one in made] == [(9, 2), (4, 2)]  # type: ignore[attr-defined]  # results
