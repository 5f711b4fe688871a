"""Hot reload: looks at the policy file again and again, and lets a new table take the place of the one in force.

A file is the same while its stat is (inode, size, times), or else its content. A new content that is good is in force at the
look that sees it. One that is bad changes nothing, and is logged once. What cannot be parsed is bad for good; whatever else is
wrong may be mended elsewhere (a module arrives, a decorator goes), so it is asked about again at each look.
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
#: Different things that the log says of one content: a text with a time or an address in it is another at each look.
TEXTS = 10

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
        #: The content that was refused for what may be mended elsewhere, and its table.
        self._waiting: tuple[bytes, PolicyTable] | None = None
        #: The contents that cannot be parsed, since the last good one.
        self._broken: set[bytes] = set()
        #: What was logged since the last good content, of each; None: of one that cannot be read.
        self._refused: dict[bytes | None, set[str]] = {}

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
                if self._waiting is not None:
                    self._try(table, *self._waiting)
                return self._interval
            content = read(self._loaded.path, self._loaded.label)
        except ConfigurationError as error:
            # Between `rm` and `mv` there is none for a moment.
            self._misses += 1
            if self._misses > 1:
                self._refuse(None, error.problems)
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
        if self._waiting is not None and digest == self._waiting[0]:
            return self._try(table, *self._waiting)
        self._waiting = None
        if digest in self._broken:
            return True
        if abs(age) < AGAIN and digest != self._suspect:  # somebody may just be writing it
            self._suspect = digest
            return False
        try:
            new = parse(content, self._loaded.label)
        except ConfigurationError as error:
            if not self._complain(digest, error.problems):
                return False
            self._broken.add(digest)
            return True
        except (Exception, SystemExit) as error:  # nothing that a file says may end the looks
            return self._complain(digest, [self._failure(error)])
        return self._try(table, digest, new)

    def _try(self, table: PolicyTable, digest: bytes, new: PolicyTable) -> bool:
        """Switch to this table if there is nothing against it (any more). Returns what `_settle` does."""
        try:
            problems = [*_dropped(table, new, self._loaded.label), *self._owner.problems(new)]
            problems += [problem for ask in _asked for problem in ask(new)]
        except ConfigurationError as error:
            problems = list(error.problems)
        except (Exception, SystemExit) as error:  # a module of the project's may even want to end the process
            problems = [self._failure(error)]
        if not problems:
            self._switch(table, new, digest)
            return True
        self._waiting = (digest, new)
        return self._complain(digest, problems)

    def _failure(self, error: BaseException) -> Problem:
        return Problem(self._loaded.label, f"{type(error).__name__}: {error}")

    def _complain(self, digest: bytes, problems: Sequence[Problem]) -> bool:
        """Refuse the content, but not at the first sight of it. Returns what `_settle` does."""
        if digest != self._suspect:
            self._suspect = digest
            return False
        self._refuse(digest, problems)
        return True

    def _switch(self, old: PolicyTable, new: PolicyTable, digest: bytes) -> None:
        self._loaded = Loaded(self._loaded.path, self._loaded.label, digest)
        self._owner.switch(new, self._loaded)
        self._forget()
        logger.info("%s: reloaded: %s", self._loaded.label, difference(old, new))

    def _refuse(self, digest: bytes | None, problems: Sequence[Problem]) -> None:
        text = "; ".join(map(str, problems))
        said = self._refused.setdefault(digest, set())
        if text not in said and len(said) < TEXTS:
            said.add(text)
            logger.error("%s: not reloaded, the policies in force stay: %s", self._loaded.label, text)

    def _back(self) -> None:
        refused = bool(self._refused)
        self._forget()
        if refused:
            logger.info("%s: says again what is in force", self._loaded.label)

    def _forget(self) -> None:
        """The content is good."""
        self._suspect = self._waiting = None
        self._broken.clear()
        self._refused.clear()


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
