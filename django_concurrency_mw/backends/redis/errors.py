"""What an error of Redis means: does it go by, does it need somebody to change something, and is it this key's alone."""

from __future__ import annotations

import re

from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, ReadOnlyError

from ...exceptions import BackendError, PermanentBackendError
from .redirects import code, tries_again
from .wire import Keys

#: What an ACL user needs; `%s` is the prefix of its keys.
PERMISSIONS = (
    "ACL SETUSER <user> ~%s* +eval +evalsha +script|load +zadd +zcard +zcount +zscore +zrem +zrangebyscore +zremrangebyscore "
    "+zscan +scan +set +mget +pexpire +pttl +time +select +client|info +client|kill"
)
#: And on a Cluster.
OF_A_CLUSTER = " +cluster|slots +asking"


def classed(error: Exception, keys: Keys) -> BackendError:
    """The error of this package for one of redis-py's, or of whatever an option of the project's raised."""
    text = str(error) or type(error).__name__
    # Event loops know why they cannot connect by the cause alone.
    cure = _cure(error, text, keys) or _cure(error.__cause__, str(error.__cause__), keys)
    if cure:
        # A key of another type is in the way of its own semaphore alone.
        return PermanentBackendError(text, cure=cure, whole=not _is(text, "WRONGTYPE"))
    # Some of a command's keys are moving to another node of a Cluster: those of other commands are not.
    return BackendError(text, whole=not tries_again(error))


def _cure(error: BaseException | None, text: str, keys: Keys) -> str:
    prefix = keys.prefix.decode()
    permissions = PERMISSIONS % re.sub(r"([\\*?\[\]])", r"\\\1", prefix)
    if "cluster" in text.lower() or "asking" in text.lower():
        permissions += OF_A_CLUSTER
    if isinstance(error, NoPermissionError) or _is(text, "NOPERM") or "can't run this command" in text:
        return "the ACL user of LOCATION may not do what the store needs: " + permissions
    if isinstance(error, (AuthenticationError, AuthorizationError)) or _is(text, "NOAUTH", "WRONGPASS"):
        return "put the right user and password into LOCATION, or into OPTIONS as `username` and `password`"
    if "unknown command" in text.lower() or "unknown redis command" in text.lower():
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
    if _is(text, "CROSSSLOT"):
        return "this is a Redis Cluster, and something between it and us changes the names of keys"
    return ""


def is_replica(error: BaseException | None) -> bool:
    """Did the server say that it is read only? Redis 6.2 says it from inside the script."""
    while error is not None and not isinstance(error, ReadOnlyError) and "READONLY" not in str(error):
        error = error.__cause__
    return error is not None


def _is(text: str, *codes: str) -> bool:
    """A script's error repeats the code inside."""
    return any(text.startswith(code) or f" {code} " in text for code in codes)
