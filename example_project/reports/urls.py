"""The URLs of the reports. Their names are what the policies match."""

from __future__ import annotations

from django.urls import path

from . import api, views

app_name = "reports"
urlpatterns = [
    path("", views.home, name="home"),
    path("report/", views.report, name="report"),
    path("export/", views.export, name="export"),
    path("export/status/", views.export_status, name="export-status"),
    path("download/<slug:region>/", views.download, name="download"),
    path("feed/", views.feed, name="feed"),
    path("figures/", views.FiguresView.as_view(), name="figures"),
    path("dashboard/", views.dashboard, name="dashboard"),
    path("rebuild/", views.rebuild, name="rebuild"),
    path("labels/", views.labels, name="labels"),
    path("search/", views.search, name="search"),
    path("status/", views.status, name="status"),
    path("api/orders/", api.OrdersView.as_view(), name="api-orders"),
]
