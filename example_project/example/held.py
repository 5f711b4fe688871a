"""A look into the store from outside: which slots are held now."""

from __future__ import annotations

import os

from django.conf import settings
from django.http import Http404, HttpRequest, JsonResponse

from django_concurrency_mw import conf
from django_concurrency_mw.backends import get_backend, snapshot_all


def held(request: HttpRequest) -> JsonResponse:
    """`{"pid": ..., "held": [{"policy": ..., "key": ...}, ...]}`; 404 unless the settings allow it, as keys are private."""
    if not settings.EXAMPLE_HELD:
        raise Http404
    get_backend("default", conf.current().backends)  # a process that has limited nothing yet has not opened its store
    holders = [{"policy": holder.policy, "key": holder.key} for holder in snapshot_all()]
    return JsonResponse({"pid": os.getpid(), "held": holders})
