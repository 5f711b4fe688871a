"""Hot reload: looks at the policy file again and again, and lets a new table take the place of the one in force.

A file is the same while its stat is (inode, size, times), or else its content. A new content that is good is in force at the
look that sees it. One that is bad changes nothing, and is logged once.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from hashlib import sha256
from time import time
from typing import Protocol

from .exceptions import ConfigurationError, Problem
from .keeper import keeper
from .loader import label_of, parse, read
from .policies import Policy, PolicyTable

logger = logging.getLogger("django_concurrency_mw")

#: Seconds after which a content that may be half written is looked at again.
AGAIN = 0.05
#: Seconds after a change of a file, from which on its stat alone says that nothing has changed: file systems count time in
#: steps of up to 2 seconds.
SETTLED = 3.0
#: Places that a message names of those that use a policy.
PLACES = 4

_used: dict[str, dict[str, None]] = {}
_asked: list[Callable[[PolicyTable], Sequence[Problem]]] = []


def used(name: str, place: str) -> None:
    """This policy of the table is used by name, at this place of the code: a reload that drops it is refused.

    Nothing is forgotten, so call it with names that stand in the code, or that are the table's.
    """
    places = _used.setdefault(name, {})
    if len(places) < PLACES:
        places[place] = None


def ask(problems: Callable[[PolicyTable], Sequence[Problem]]) -> None:
    """Ask for what is wrong with a new table before it is in force."""
    _asked.append(problems)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a table was read from: an absolute path, how messages call it, and the content's digest."""

    path: str
    label: str
    digest: bytes


def load(source: str | os.PathLike[str]) -> tuple[PolicyTable, Loaded]:
    """The table of a file, and what is needed to see that it has changed. Raises: ConfigurationError with every problem."""
    label = label_of(source)
    content = read(source, label)
    table = parse(content, label)
    return table, Loaded(os.path.abspath(os.fsdecode(source)), label, _digest(content))


class Owner(Protocol):
    """Whose table the file is."""

    def table(self) -> PolicyTable | None:
        """The one in force; None where it is not this owner's any more."""

    def problems(self, table: PolicyTable) -> Sequence[Problem]:
        """What the owner has against a table."""

    def switch(self, table: PolicyTable, loaded: Loaded) -> None:
        """The new table is in force."""


class Watch:
    """The looks at one file, in the keeper's thread, until they are stopped or the owner has gone. `lock` is the owner's."""

    def __init__(self, loaded: Loaded, interval: float, owner: Owner, lock: AbstractContextManager[object]) -> None:
        self._loaded, self._interval, self._owner, self._lock = loaded, interval, owner, lock
        self._stopped = False
        #: The file's stat, where that is enough to know that nothing has changed.
        self._settled: tuple[int, ...] | None = None
        #: A content that was seen once, and may not be whole yet.
        self._suspect: bytes | None = None
        #: Looks in a row that found nothing to read.
        self._misses = 0
        #: What was complained of since the last good content: digests, and errors of reading.
        self._refused: set[bytes | str] = set()

    def stop(self) -> None:
        """Look no more."""
        with self._lock:
            self._stopped = True
            keeper.cancel(self.look)

    def look(self) -> None:
        """Look now, and see to the next look."""
        with self._lock:
            table = None if self._stopped or keeper.exiting else self._owner.table()
            if table is None:
                return
            wait = self._interval
            try:
                wait = self._compare(table)
            finally:
                keeper.at(wait, self.look)

    def _compare(self, table: PolicyTable) -> float:
        """Do what the file asks for. Returns the seconds until the next look."""
        try:
            found = _stat(self._loaded)
            if (identity := _identity(found)) == self._settled:
                return self._interval
            content = read(self._loaded.path, self._loaded.label)
        except ConfigurationError as error:
            # Between `rm` and `mv` there is none for a moment.
            self._misses += 1
            if self._misses > 1:
                self._refuse(str(error), error.problems)
            return self._interval
        self._misses = 0
        if not self._settle(table, content, age=time() - found.st_mtime):
            return min(AGAIN, self._interval)
        self._settled = identity if time() - max(found.st_mtime, found.st_ctime) > SETTLED else None
        return self._interval

    def _settle(self, table: PolicyTable, content: bytes, age: float) -> bool:
        """Is it known now what this content means? Else it has to be looked at again, in a moment."""
        digest = _digest(content)
        if digest == self._loaded.digest:
            self._back()
            return True
        if digest in self._refused:
            return True
        if abs(age) < AGAIN and digest != self._suspect:  # somebody may just be writing it
            self._suspect = digest
            return False
        try:
            new = parse(content, self._loaded.label)
            problems = [*_dropped(table, new, self._loaded.label), *self._owner.problems(new)]
            problems += [problem for ask in _asked for problem in ask(new)]
        except ConfigurationError as error:
            problems = list(error.problems)
        except Exception as error:  # nothing that a file says may end the looks
            problems = [Problem(self._loaded.label, f"{type(error).__name__}: {error}")]
        if not problems:
            self._switch(table, new, digest)
        elif digest != self._suspect:
            self._suspect = digest
            return False
        else:
            self._refuse(digest, problems)
        return True

    def _switch(self, old: PolicyTable, new: PolicyTable, digest: bytes) -> None:
        self._loaded = Loaded(self._loaded.path, self._loaded.label, digest)
        self._owner.switch(new, self._loaded)
        self._suspect = None
        self._refused.clear()
        logger.info("%s: reloaded: %s", self._loaded.label, difference(old, new))

    def _refuse(self, what: bytes | str, problems: Sequence[Problem]) -> None:
        if what not in self._refused:
            self._refused.add(what)
            logger.error(
                "%s: not reloaded, the policies in force stay: %s", self._loaded.label, "; ".join(map(str, problems))
            )

    def _back(self) -> None:
        self._suspect = None
        if self._refused:
            self._refused.clear()
            logger.info("%s: says again what is in force", self._loaded.label)


def difference(old: PolicyTable, new: PolicyTable) -> str:
    """The names of the policies that were added, removed and changed, for the log."""
    parts = {
        "added": [policy.name for policy in new if old.get(policy.name) is None],
        "removed": [policy.name for policy in old if new.get(policy.name) is None],
        "changed": [policy.name for policy in new if not _same(old.get(policy.name), policy)],
    }
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names) or "no policy differs"


def _same(old: Policy | None, new: Policy) -> bool:
    """Do they say the same (wherever that is written)? A policy that is new is not compared."""
    names = [field.name for field in fields(Policy) if field.name != "place"]
    return old is None or all(getattr(old, name) == getattr(new, name) for name in names)


def _dropped(old: PolicyTable, new: PolicyTable, label: str) -> list[Problem]:
    return [
        Problem(label, f"policy {policy.name} is gone, but used by {', '.join(_used[policy.name])}")
        for policy in old
        if policy.name in _used and new.get(policy.name) is None
    ]


def _stat(loaded: Loaded) -> os.stat_result:
    try:
        found = os.stat(loaded.path)
    except OSError as error:
        raise ConfigurationError([Problem(loaded.label, f"cannot be read: {error.strerror or error}")]) from error
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would stop the keeper
        raise ConfigurationError([Problem(loaded.label, "cannot be read: not a file")])
    return found


def _identity(found: os.stat_result) -> tuple[int, ...]:
    # st_ctime too: whoever sets a file's mtime back cannot set that back.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _digest(content: bytes) -> bytes:
    return sha256(content).digest()
