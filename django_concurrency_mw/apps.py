"""The app: registers the system checks."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register


class ConcurrencyConfig(AppConfig):
    """`django_concurrency_mw` in INSTALLED_APPS: the checks, and the templates of a rejection."""

    name = "django_concurrency_mw"
    label = "django_concurrency_mw"
    verbose_name = "Concurrency limits"

    def ready(self) -> None:
        from . import checks

        register(checks.check_settings, checks.TAG)
        register(checks.check_policies, checks.TAG)
        register(checks.check_decorators, checks.TAG)
        register(checks.check_stores, checks.TAG)
        register(checks.check_default_store, checks.TAG)
        register(checks.check_deployed_store, checks.TAG, deploy=True)
        register(checks.check_middleware, checks.TAG)
        register(checks.check_api_views, checks.TAG)
        register(checks.check_addresses, checks.TAG, deploy=True)
