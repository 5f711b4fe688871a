"""`manage.py demo_users`: people to log in as."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError

NAMES = ("alice", "bob")
PASSWORD = "demo"


class Command(BaseCommand):
    help = f"Creates the users {', '.join(NAMES)} with the password {PASSWORD!r}. Only with EXAMPLE_DEBUG on."

    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.DEBUG:
            raise CommandError("not without EXAMPLE_DEBUG: their password is known to everybody")
        for name in NAMES:
            user, made = get_user_model().objects.get_or_create(username=name)
            if made:
                user.set_password(PASSWORD)
                user.save()
            self.stdout.write(f"{name} (password: {PASSWORD})" if made else f"{name} is there already")
