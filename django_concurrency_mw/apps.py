"""The app: registers the system checks, and tells runserver of the policy file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import register
from django.utils.autoreload import autoreload_started


class ConcurrencyConfig(AppConfig):
    """`django_concurrency_mw` in INSTALLED_APPS: the checks, and the templates of a rejection."""

    name = "django_concurrency_mw"
    label = "django_concurrency_mw"
    verbose_name = "Concurrency limits"

    def ready(self) -> None:
        from . import checks

        for function, deploy in checks.registered().items():
            register(function, checks.TAG, deploy=deploy)
        autoreload_started.connect(watch_policy_file, dispatch_uid="django_concurrency_mw")


def watch_policy_file(sender: Any, **kwargs: Any) -> None:
    """`runserver` starts anew when the policy file changes, as it does for a module."""
    setting = getattr(settings, "CONCURRENCY_LIMIT", None)
    source = setting.get("POLICIES") if isinstance(setting, Mapping) else None
    if isinstance(source, (str, os.PathLike)):
        sender.extra_files.add(Path(os.path.abspath(os.fsdecode(source))))
