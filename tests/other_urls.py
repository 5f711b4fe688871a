"""The URLconf of another host: the same paths with names of their own."""

from __future__ import annotations

from django.urls import path

from . import views

urlpatterns = [path("told/", views.told, name="told-elsewhere")]
