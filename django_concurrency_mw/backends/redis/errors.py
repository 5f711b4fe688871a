"""What an error of Redis means: does it go by, is another try of use, does it need somebody to change something, and is it
this key's alone."""

from __future__ import annotations

import re
import socket
import ssl

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    MasterDownError,
    NoPermissionError,
    ReadOnlyError,
    ResponseError,
)

from ...exceptions import BackendError, PermanentBackendError
from . import tls
from .redirects import Moved, code, tries_again
from .rights import permitted
from .wire import Keys

#: What services say of a command that they have switched off, each in its own words.
DISABLED = (
    r"command\b.{0,60}\b(not (allowed|available|supported|permitted)|disallowed|forbidden|unsupported|disabled|blocked)"
    r"|(unsupported|forbidden|disallowed|disabled|blocked|restricted) command|operation not permitted"
)

#: What servers say where a script asks for a command or a key that the user may not have: Redis up to 7.0; later ones, Valkey.
FORBIDDEN = r"can't (run this command|access at least one of the keys)|ACL failure in script"

#: How errors begin that are about the server's state, whatever is asked.
STATES = r"-?(BUSY|LOADING|OOM|MISCONF|READONLY|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|NOAUTH|UNKILLABLE)\b"


class SentinelRefused(ResponseError):
    """Sentinels are there, but will not say it until somebody changes something; `cure` says what."""

    def __init__(self, text: str, cure: str) -> None:
        super().__init__(text)
        self.cure = cure


def passes(reply: object) -> bool:
    """Is this reply an error that goes by: busy, short of memory or disk, loading? What is forbidden or nonsense stays so."""
    if not isinstance(reply, ResponseError) or isinstance(reply, NoPermissionError):
        return False
    text = str(reply)
    if code(reply) in ("WRONGTYPE", "NOPERM", "CROSSSLOT"):
        return False
    return not _is_forbidden(text) and not _is_disabled(text)


def is_of_the_command(reply: object) -> bool:
    """Is this reply an error about the command alone, in words of the server's or of a managed service's own? Those that are
    about the server's state have a code."""
    return type(reply) is ResponseError and re.match(STATES, str(reply)) is None


def is_demoted(error: BaseException | None) -> bool:
    """Does a server say that it is no master (any more)? Redis 6.2 says it inside a script's error."""
    return isinstance(error, (ReadOnlyError, MasterDownError)) or (
        isinstance(error, ResponseError) and "-READONLY " in str(error)
    )


def is_final(error: BaseException | None) -> bool:
    """Would another try within milliseconds find the same? Nobody listens, a certificate or a password is wrong, ...

    Not where another try asks another server."""
    if getattr(error, "elsewhere", False):
        return False
    if isinstance(error, (AuthenticationError, BusyLoadingError, ResponseError)):
        return True
    while error is not None and (error.__cause__ is not None or error.__context__ is not None):
        error = error.__cause__ or error.__context__
    return isinstance(
        error, (ConnectionRefusedError, FileNotFoundError, PermissionError, socket.gaierror, ssl.SSLError)
    ) and not isinstance(error, tls.CUT)


def classed(error: Exception, keys: Keys) -> BackendError:
    """The error of this package for one of redis-py's, or of whatever an option of the project's raised."""
    text = str(error) or type(error).__name__
    # Event loops know why they cannot connect by the cause alone, whose words they repeat. That a slot has moved needs no cure
    # where it is followed, and there was no time left.
    cause = None if isinstance(error, Moved) else error.__cause__
    cure = tls.cure(error) or _cure(cause, str(cause), keys) or _cure(error, text, keys)
    if cure:
        # A key of another type is in the way of its own semaphore alone.
        return PermanentBackendError(text, cure=cure, whole=not _is(text, "WRONGTYPE"))
    # Some of a command's keys are moving to another node of a Cluster: those of other commands are not.
    return BackendError(text, whole=not tries_again(error))


def _cure(error: BaseException | None, text: str, keys: Keys) -> str:
    if isinstance(error, SentinelRefused):
        return error.cure
    prefix = keys.prefix.decode()
    permissions = permitted(keys) + _beyond(text, permitted(keys))
    if isinstance(error, NoPermissionError) or _is_forbidden(text):
        return "the ACL user of LOCATION may not do what the store needs: " + permissions
    if isinstance(error, (AuthenticationError, AuthorizationError)) or _is(text, "NOAUTH", "WRONGPASS"):
        return "put the right user and password into LOCATION, or into OPTIONS as `username` and `password`"
    if "DB index is out of range" in text or "invalid DB index" in text:
        return (
            "the server has fewer databases (16 unless its `databases` says otherwise, 1 on many managed services): "
            "correct the number at the end of LOCATION, or `db` in OPTIONS"
        )
    if _is_disabled(text):
        return "use Redis 6.2 or newer, or Valkey 7.2 or newer, and do not rename the commands: " + permissions
    if _is(text, "WRONGTYPE"):
        return f"another program keeps a key of its own under {prefix}: choose another KEY_PREFIX, and remove that key"
    if error is not None and code(error) == "MOVED":
        return (
            "LOCATION is a node of a Redis Cluster, and another one serves this alias: put `cluster: True` into OPTIONS, and "
            "better the URLs of several nodes into LOCATION, as a list"
        )
    if "cluster support disabled" in text:
        return "LOCATION is a single server and no node of a Redis Cluster: take `cluster` out of OPTIONS"
    if error is not None and code(error) == "CROSSSLOT":
        return "this is a Redis Cluster, and something between it and us changes the names of keys"
    return ""


def _beyond(text: str, permissions: str) -> str:
    """The rule for a command that an option of the project's needs and the store does not, such as `client_name`."""
    refused = re.search(r"run the '([a-z|]+)' command", text)
    return f" +{refused[1]}" if refused and f" +{refused[1]}" not in permissions else ""


def is_replica(error: BaseException | None) -> bool:
    """Did the server, whatever was made of it since, say that it is no master?"""
    while error is not None and not is_demoted(error):
        error = error.__cause__
    return error is not None


def _is_forbidden(text: str) -> bool:
    """By the ACL: of a command that was sent, or of one inside a script."""
    return _is(text, "NOPERM") or re.search(FORBIDDEN, text) is not None


def _is_disabled(text: str) -> bool:
    """An unknown command, or what managed services say of one that nobody may use. Not OOM's `command not allowed when
    used memory > 'maxmemory'`."""
    return re.search(r"unknown (redis )?command", text, re.IGNORECASE) is not None or (
        re.search(DISABLED, text, re.IGNORECASE) is not None
        and re.search(r"used memory|data set|^-?(?!ERR)[A-Z]{2,} ", text) is None
    )


def _is(text: str, *codes: str) -> bool:
    """A script's error repeats the code inside."""
    return any(text.startswith(code) or f" {code} " in text for code in codes)
