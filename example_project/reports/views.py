"""The views of the reports: one of each kind, each slow enough to meet its limit.

None of them knows of the limits but the two decorated ones; the rest is `policies.example.yaml`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator

from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.template.response import TemplateResponse
from django.views import View
from django.views.decorators.http import require_http_methods, require_POST, require_safe
from example import gauge
from rest_framework.request import Request

from django_concurrency_mw import concurrency_limit

REGIONS = {"north": ("Oslo", "Tromsø", "Umeå"), "south": ("Cádiz", "Lecce", "Valletta")}
PARTNERS = {"demo-key-adventure": "adventure", "demo-key-contoso": "contoso"}

#: Dashboards drawn at once, whoever looks.
DASHBOARDS_AT_ONCE = 6
LONGEST = 5.0
STREAM_PARTS = 10


def seconds(request: HttpRequest | Request) -> float:
    """How long the view takes: `?seconds=`, else EXAMPLE_SECONDS; from 0 to 5."""
    try:
        wanted = float(request.GET["seconds"])
    except (KeyError, ValueError):
        wanted = math.nan
    return min(max(wanted if math.isfinite(wanted) else settings.EXAMPLE_SECONDS, 0.0), LONGEST)


@require_safe
def home(request: HttpRequest) -> HttpResponse:
    """What there is to see."""
    return render(request, "reports/home.html", {"regions": REGIONS, "partner_key": next(iter(PARTNERS))})


@login_required
@require_safe
def report(request: HttpRequest) -> HttpResponse:
    """A slow page (sync)."""
    duration = seconds(request)
    with gauge.inside(f"report:{request.user.get_username()}"):
        time.sleep(duration)
    return render(request, "reports/report.html", {"duration": duration, "regions": REGIONS})


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
async def export(request: HttpRequest) -> HttpResponse:
    """A slow job (async): GET shows the form, POST exports."""
    user = await request.auser()
    if request.method != "POST":
        return render(request, "reports/export.html", {"user": user})
    duration = seconds(request)
    with gauge.inside(f"export:{user.get_username()}"):
        await asyncio.sleep(duration)
    return JsonResponse({"exported": sum(map(len, REGIONS.values())), "seconds": duration})


@require_safe
def export_status(request: HttpRequest) -> JsonResponse:
    """Asked every second by an impatient page, so not limited."""
    return JsonResponse({"ready": True})


@require_safe
def download(request: HttpRequest, region: str) -> StreamingHttpResponse:
    """A CSV that is written while it is sent (sync stream). The slot is held until its last line."""
    lines = _csv(region, seconds(request))
    response = StreamingHttpResponse(lines, content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="{region}.csv"'
    return response


def _csv(region: str, duration: float) -> Iterator[str]:
    with gauge.inside(f"download:{region}"):
        yield "place,orders\n"
        for number in range(STREAM_PARTS):
            time.sleep(duration / STREAM_PARTS)
            places = REGIONS.get(region, ("nowhere",))
            yield f"{places[number % len(places)]},{number * 7}\n"


@login_required
@require_safe
async def feed(request: HttpRequest) -> StreamingHttpResponse:
    """Orders as they come in (async stream, for ASGI servers)."""
    user = await request.auser()
    events = _events(user.get_username(), seconds(request))
    return StreamingHttpResponse(events, content_type="text/event-stream")


async def _events(username: str, duration: float) -> AsyncIterator[str]:
    with gauge.inside(f"feed:{username}"):
        for number in range(STREAM_PARTS):
            await asyncio.sleep(duration / STREAM_PARTS)
            yield f"data: order {number}\n\n"


class FiguresView(View):
    """The figures for a partner's own program, which says who it is by X-Api-Key (class-based)."""

    def get(self, request: HttpRequest) -> JsonResponse:
        partner = PARTNERS.get(request.headers.get("X-Api-Key", ""))
        if partner is None:
            return JsonResponse({"error": "unknown X-Api-Key"}, status=403)
        with gauge.inside(f"figures:{partner}"):
            time.sleep(seconds(request))
        return JsonResponse({"partner": partner, "orders": 4711})


@login_required
@require_safe
@concurrency_limit(name="dashboard", key="global", max_concurrent=DASHBOARDS_AT_ONCE)
def dashboard(request: HttpRequest) -> TemplateResponse:
    """Limited by the decorator, behind the login: who is sent to log in has taken no slot."""
    duration = seconds(request)
    with gauge.inside("dashboard"):
        time.sleep(duration)
    return TemplateResponse(request, "reports/dashboard.html", {"duration": duration, "regions": REGIONS})


@login_required
@require_POST
@concurrency_limit(policy="heavy-jobs")
def rebuild(request: HttpRequest) -> JsonResponse:
    """Asks for a policy of the table by its name."""
    duration = seconds(request)
    with gauge.inside("rebuild"):
        time.sleep(duration)
    return JsonResponse({"rebuilt": True, "seconds": duration})


@login_required
@require_safe
def labels(request: HttpRequest) -> JsonResponse:
    """Who comes on top waits in line. How long that was stands in a field that a browser's developer tools show."""
    duration = seconds(request)
    with gauge.inside(f"labels:{request.user.get_username()}"):
        time.sleep(duration)
    waited = request.concurrency.waited  # type: ignore[attr-defined]  # set by the middleware
    return JsonResponse({"labels": 12, "seconds": duration}, headers={"Server-Timing": f"line;dur={waited * 1000:.0f}"})


@require_safe
def search(request: HttpRequest) -> HttpResponse:
    """Under the shadow policy only: it is counted and never turned away."""
    wanted = request.GET.get("q", "").casefold()
    with gauge.inside("search"):
        time.sleep(seconds(request))
    found = [place for places in REGIONS.values() for place in places if wanted in place.casefold()]
    return JsonResponse({"found": found})


@require_safe
def status(request: HttpRequest) -> HttpResponse:
    """For the monitoring: excluded from every limit."""
    return HttpResponse("ok\n", content_type="text/plain")
