"""The app of the example site."""

from __future__ import annotations

from django.apps import AppConfig


class ReportsConfig(AppConfig):
    """Northwind reports: slow pages that people like to ask for twice."""

    name = "reports"
