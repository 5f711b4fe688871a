"""`manage.py demo_users`: people to log in as."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError
from rest_framework.authtoken.models import Token

NAMES = ("alice", "bob")
PASSWORD = "demo"


class Command(BaseCommand):
    help = (
        f"Creates the users {', '.join(NAMES)}, password {PASSWORD!r}, and tells their tokens. Only with EXAMPLE_DEBUG."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.DEBUG:
            raise CommandError("not without EXAMPLE_DEBUG: their password is known to everybody")
        for name in NAMES:
            user, made = get_user_model().objects.get_or_create(username=name)
            if made:
                user.set_password(PASSWORD)
                user.save()
            token, _ = Token.objects.get_or_create(user=user)
            known = f"password: {PASSWORD}" if made else "there already"
            self.stdout.write(f"{name} ({known}; for the API: Authorization: Token {token.key})")
