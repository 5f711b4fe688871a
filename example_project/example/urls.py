"""The URLs of the example site."""

from __future__ import annotations

from django.contrib.auth.views import LoginView, LogoutView
from django.urls import include, path

from . import held

urlpatterns = [
    path("", include("reports.urls")),
    path("login/", LoginView.as_view(), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("-/held/", held.held, name="held"),
]
