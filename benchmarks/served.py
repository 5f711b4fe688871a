"""The URL configuration of the servers under load: a bare view and those with a limit, few enough to be found equally fast."""

from __future__ import annotations

from .site import ROUTES

urlpatterns = [ROUTES[beginning + name] for name in ("bare", "redis-view-1", "redis-mw-1") for beginning in ("", "a-")]
