"""The URL configuration of the servers under load: a bare view, the two raw trips and those with a limit, each found equally
fast."""

from __future__ import annotations

from .site import ROUTES

NAMES = ("bare", "redis-raw2", "redis-peer", "redis-view-1", "redis-mw-1")
urlpatterns = [ROUTES[beginning + name] for name in NAMES for beginning in ("", "a-") if name in ROUTES]
