"""What every subcommand asks first: the configuration in force, and the stores that policies and decorators use."""

from __future__ import annotations

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError

from .. import conf
from ..backends import BaseBackend
from ..decorated import stores_in_use


def configuration() -> conf.Config:
    """The configuration in force. Raises: CommandError with everything that is wrong with it."""
    try:
        return conf.current()
    except ImproperlyConfigured as error:
        raise CommandError(str(error)) from error


def notes(config: conf.Config) -> list[str]:
    """What this process does not see of the stores."""
    return [f"backend {store.config.alias}: {blind}" for store in stores(config) if (blind := store.blind_spot())]


def stores(config: conf.Config) -> list[BaseBackend]:
    """Those that policies and decorators use, each once. Raises: CommandError for one that cannot be used."""
    found: list[BaseBackend] = []
    for store in stores_in_use(config):
        if isinstance(store, Exception):
            raise CommandError(str(store) or repr(store)) from store
        found.append(store)
    return found
