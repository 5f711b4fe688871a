"""The wire format: slots to packed commands, and replies back to outcomes. No I/O.

A semaphore is the sorted set `{prefix}:1:policy:digest`; the braces put all of an alias into one hash slot of a Cluster, 1 is
the version of the format. A holder's member has four lines: its token, then for people only: since when (ms by the client's
clock), the key's text and the path, each cut to a bound. It is complete before the take is sent, as the release has to name it
whole. The number of members is the count: a holder of cost c says so behind its `since` (`1764103040123x5`), and has c - 1
members more of two lines, its token and a number from 2 on, which the scripts make and remove with it.
Names that begin with `!` after the version are reserved, as no policy can be called so: `!evicted`, see `evict.lua`; `!peaks`,
a sorted set of policies with the most that were in flight as score; `!process:` and a process's part of its tokens, a string
of two lines, its host's name and its pid. And for those who wait, see `lines.lua`:

- `!queue:policy:digest`, the line of a semaphore: a sorted set of tokens, by the microsecond of the server's clock at which
  each joined, or one more than the last. It expires a while after the last question of anybody in it.
- `!waiter:token`, what others have to know of one who waits to let it in: a string of fields, each as its length, a colon and
  itself. First the channel of its process, or nothing where that hears nothing; then five for each slot that it wants: key,
  limit, lease in ms, how it is asked for (the third argument of `take.lua`), holder. It expires when its owner has not asked
  for long, and with it all its places; and after a grant when its owner asks, so until then it can be taken back.
- `!place:policy:digest:token`, the number of one whose process did not listen, who was taken out of the line for that, for as
  long as it may ask again: then it has its place back, and until then nobody walks along it.
- `!waits:policy`, a mark: somebody who may wait has used this policy within a lease; so releases of whoever shares its
  semaphores wake, also of those who took before the line was there. One for all keys, so that a client leaves none behind.
  `!waits` says the same of any policy, and is there for longer than each of them.
- `!looked:policy:digest`, for a second: a line that seemed full was looked through for who is not there any more.
- `!nothing`, and `!nothing:1` and `:2`, which there never are: by them a node of a Cluster says that its slot is moving.
- `!wake:` and a process's part of its tokens is no key but a channel: each message is the token of one who has to ask.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from time import monotonic
from typing import Final, TypeVar

from ...outcomes import Full, LineFull, Queued, QueueReply, Slot, Taken, TakeReply
from ...tokens import process_of
from ..base import ASK_AGAIN, ASK_AGAIN_AFTER, PLACE_FOR, Holder, Waiter
from .leftovers import Release

FORMAT = "1"
#: Characters of a key's text and of a path that a member carries.
TEXT_LIMIT = 120
#: Parts a member's fields; tokens and numbers have none, and the two texts lose theirs.
SEPARATOR = b"\n"
#: Seconds that peaks stay after the last note of any process, and that a process stays after its own.
PEAKS_FOR, PROCESS_FOR = 30 * 86_400.0, 600.0
#: Seconds after which one whose process hears nothing asks again, and for which it keeps its place without that.
ASK_OFTEN, DEAF_PLACE_FOR = 0.05, 1.0
#: Seconds for which one who was let in holds until it asks, as in `lines.lua`.
GRANT = 5.0
#: Ways to ask for a slot that are kept packed.
MOST_TERMS = 1024
#: In a slot's memo, behind its names: somebody who may wait has used its policy.
WAITED_FOR: Final = "waited for"


class Script:
    """A Lua script of this package: its text and the digest that EVALSHA names it by."""

    def __init__(self, *names: str, before: Sequence[str] = ()) -> None:
        names = (*before, "members", *names)
        texts = [(files(__package__) / "scripts" / f"{each}.lua").read_bytes() for each in names]
        lines = [line.strip() for text in texts for line in text.splitlines()]
        self.text = b"\n".join([line for line in lines if line and not line.startswith(b"--")])
        self.sha = hashlib.sha1(self.text).hexdigest().encode()
        self.load = pack(b"SCRIPT", b"LOAD", self.text)
        self._heads = {False: b"$7\r\nEVALSHA\r\n" + bulk(self.sha), True: b"$4\r\nEVAL\r\n" + bulk(self.text)}
        #: What the call that nearly all are begins with: for one key, with four arguments.
        self.head_of_one = b"*%d\r\n%b%b" % (3 + 1 + 4, self._heads[False], bulk(b"1"))

    def call(self, keys: Sequence[bytes], arguments: Sequence[bytes], count: int, *, whole: bool) -> bytes:
        """The packed call; `whole` sends the text itself. Keys are packed, arguments too, `count` of them in all."""
        number = bulk(b"%d" % len(keys))
        return b"*%d\r\n%b%b%b%b" % (
            3 + len(keys) + count,
            self._heads[whole],
            number,
            b"".join(keys),
            b"".join(arguments),
        )


def bulk(value: bytes) -> bytes:
    """One argument, packed."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def pack(*arguments: bytes) -> bytes:
    """One whole command, packed."""
    return b"*%d\r\n%b" % (len(arguments), b"".join(map(bulk, arguments)))


TAKE = Script("lines", "take", before=["quick"])
RENEW = Script("renew")
#: Nobody waits for its reply. Where the script is not loaded it is left over, for a connection that has loaded it.
WAKE = Script("lines", "wake")
WAIT = Script("lines", "wait")
#: Rare, so they are always sent whole. A release, which nobody waits for, cannot do with a script that is not loaded.
GIVE = Script("give")
RESTORE = Script("restore")
CLAIM = Script("claim")
EVICT = Script("lines", "evict")
BACK = Script("lines", "back")
COUNT = Script("count")
NOTE = Script("note")
TIME = pack(b"TIME")


class Keys:
    """The names of one alias: its prefix, and a packed head per policy (there are few of them). `of_a_cluster`: they are asked
    for at the nodes of one, which takes more rights."""

    def __init__(self, prefix: str, *, of_a_cluster: bool = False) -> None:
        self.of_a_cluster = of_a_cluster
        self.prefix = f"{{{prefix}}}:{FORMAT}:".encode()
        #: For SCAN: every semaphore of the alias, and nothing else of its keys.
        self.pattern = exactly(self.prefix) + b"[-A-Za-z0-9_.]*:*"
        #: For SCAN: every line.
        self.lines_pattern = exactly(self.prefix) + b"!queue:*"
        #: The tokens of those who were evicted, until their leases would have ended.
        self.tombstones = self.prefix + b"!evicted"
        self.peaks = self.prefix + b"!peaks"
        self._heads: dict[str, bytes] = {}
        self._packed: dict[tuple[int, float, bool, int, bool], bytes] = {}

    def semaphore(self, slot: Slot) -> bytes:
        """The packed key of a slot's semaphore."""
        head = self._heads.get(slot.policy)
        if head is None:
            name = b"%b%b:" % (self.prefix, slot.policy.encode())
            head = self._heads[slot.policy] = b"$%d\r\n%b" % (len(name) + 32, name)
        return b"%b%b\r\n" % (head, slot.key.digest.hex().encode())

    def take(self, slots: Sequence[Slot], *, whole: bool = False) -> bytes:
        """The one command that takes all of them."""
        if len(slots) == 1 and not whole:
            slot = slots[0]
            key, holder = self._names(slot)
            return b"%b%b%b%b" % (TAKE.head_of_one, key, self._terms(slot), holder)
        keys, arguments = [], []
        for slot in slots:
            key, holder = self._names(slot)
            keys.append(key)
            arguments.append(self._terms(slot) + holder)
        return TAKE.call(keys, arguments, 4 * len(keys), whole=whole)

    def _terms(self, slot: Slot) -> bytes:
        """What `take` has to know of it, but for its holder: packed, and mostly packed before."""
        terms = slot.limit, slot.ttl, slot.block, slot.cost, slot.waits
        packed = self._packed.get(terms)
        if packed is None:
            if len(self._packed) >= MOST_TERMS:  # the limits of a callable
                self._packed.clear()
            numbers = b"%d" % slot.limit, b"%d" % milliseconds(slot.ttl), _asked(slot)
            packed = self._packed[terms] = b"".join(map(bulk, numbers))
        return packed

    def renew(self, slots: Sequence[tuple[Slot, float]], *, whole: bool = False) -> bytes:
        """The one command that renews all of them."""
        names = [self._names(slot) for slot, _ in slots]
        keys = [key for key, _ in names]
        arguments = [
            b"%b%b" % (bulk(b"%d" % milliseconds(seconds)), holder)
            for (_, seconds), (_, holder) in zip(slots, names, strict=True)
        ]
        return RENEW.call(keys, arguments, 2 * len(keys), whole=whole)

    def restore(self, holders: Sequence[tuple[Slot, float, int]], within: int) -> bytes:
        """The one command that counts all of them again: each for so many seconds, and not after that ms of the server's clock;
        nobody after the ms `within`."""
        names = [self._names(slot) for slot, _, _ in holders]
        arguments = [
            b"%b%b%b%b" % (bulk(b"%d" % until), bulk(b"%d" % milliseconds(seconds)), holder, bulk(slot.token.encode()))
            for (slot, seconds, until), (_, holder) in zip(holders, names, strict=True)
        ]
        keys = [*[key for key, _ in names], bulk(self.tombstones)]
        return RESTORE.call(keys, [*arguments, bulk(b"%d" % within)], 4 * len(names) + 1, whole=True)

    def claim(self, slots: Sequence[tuple[Slot, Slot]]) -> bytes:
        """The one command that puts each second one in the place of the first."""
        keys, arguments = [], []
        for old, new in slots:
            key, holder = self._names(new)
            keys.append(key)
            arguments.append(b"%b%b%b" % (bulk(b"%d" % milliseconds(new.ttl)), self._names(old)[1], holder))
        return CLAIM.call(keys, arguments, 3 * len(keys), whole=True)

    def count(self, slots: Sequence[Slot]) -> bytes:
        """The one command that counts on each one's semaphore."""
        return COUNT.call([self.semaphore(slot) for slot in slots], (), 0, whole=True)

    def note(self, peaks: Mapping[str, int], process: str, host: str, pid: int) -> bytes:
        """The one command that notes peaks, and who notes them."""
        arguments = [b"%b\n%d" % (_text(host), pid), b"%d" % milliseconds(PROCESS_FOR), b"%d" % milliseconds(PEAKS_FOR)]
        for policy, most in peaks.items():
            arguments += [policy.encode(), b"%d" % most]
        keys = [bulk(self.peaks), bulk(self.process(process))]
        return NOTE.call(keys, [bulk(each) for each in arguments], len(arguments), whole=True)

    def process(self, process: str) -> bytes:
        """The key of a process, by what its tokens begin with."""
        return b"%b!process:%b" % (self.prefix, process.encode("utf-8", "replace"))

    def give(self, slots: Sequence[Slot]) -> list[Release]:
        """One command each, whose reply is an integer, and which is of use until the lease has ended by itself; and one more
        for all that somebody may wait for."""
        now = monotonic()
        if len(slots) == 1:
            slot = slots[0]
            if not slot.waits and len(slot.memo) < 2:  # as nearly always
                return [Release(self._release(slot), now + slot.ttl)]
        releases = [Release(self._release(slot), now + slot.ttl) for slot in slots]
        waited = [slot for slot in slots if slot.waits or len(slot.memo) > 1]
        if waited:
            tokens = [bulk(slot.token.encode()) for slot in waited]
            packed = WAKE.call([self._names(slot)[0] for slot in waited], tokens, len(tokens), whole=False)
            releases.append(Release(packed, now + max(slot.ttl for slot in waited)))
        return releases

    def queue(self, slots: Sequence[Slot], most: Sequence[int | None], channel: bytes, *, whole: bool = False) -> bytes:
        """The one command that takes all of them, or stands in line. `channel` is where its process listens, if it does."""
        token, keys, fields = slots[0].token.encode(), [], [channel]
        for slot in slots:
            key, holder = self._names(slot)
            keys.append(key)
            limit, lease = b"%d" % slot.limit, b"%d" % milliseconds(slot.ttl)
            fields += [_bare(key), limit, lease, _asked(slot), _bare(holder)]
        record = b"".join(b"%d:%b" % (len(field), field) for field in fields)
        kept = milliseconds(PLACE_FOR if channel else DEAF_PLACE_FOR)
        arguments = [token, record, b"%d" % kept, *(b"-1" if some is None else b"%d" % some for some in most)]
        return WAIT.call(keys, [bulk(each) for each in arguments], len(arguments), whole=whole)

    def back(self, token: bytes) -> Release:
        """One command that takes back what was granted to one who is not there any more."""
        packed = BACK.call([bulk(self.waiter(token))], [bulk(token)], 1, whole=True)
        return Release(packed, monotonic() + GRANT)

    def channel(self, process: str) -> bytes:
        """Where a process listens for the tokens of those who have been let in, or have to ask."""
        return b"%b!wake:%b" % (self.prefix, process.encode())

    def waiter(self, token: bytes) -> bytes:
        """The key of what others have to know of one who waits."""
        return b"%b!waiter:%b" % (self.prefix, token)

    def _release(self, slot: Slot) -> bytes:
        names = self._names(slot)
        if slot.cost == 1:
            return b"*3\r\n$4\r\nZREM\r\n%b%b" % names
        return GIVE.call(names[:1], names[1:], 1, whole=True)

    def _names(self, slot: Slot) -> tuple[bytes, bytes]:
        """The packed names of a slot's semaphore and of its holder; kept with the slot, as the release needs them again."""
        if slot.memo:
            return slot.memo[0]  # type: ignore[no-any-return]  # as below
        names = self.semaphore(slot), bulk(member(slot))
        slot.memo.append(names)
        return names


def member(slot: Slot) -> bytes:
    """The name of this holder in the sorted set. One that is made anew from what a slot says is the same."""
    cost = "" if slot.cost == 1 else f"x{slot.cost}"
    text, path = slot.key.text[:TEXT_LIMIT].replace("\n", " "), slot.path[:TEXT_LIMIT].replace("\n", " ")
    return f"{slot.token}\n{int(slot.since * 1000)}{cost}\n{text}\n{path}".encode("utf-8", "replace")


def _asked(slot: Slot) -> bytes:
    """What a script has to know of how it is asked for, in one number: see `take.lua`."""
    return b"%d" % (slot.block + 2 * (slot.cost - 1) + 4096 * slot.waits)


def _bare(packed: bytes) -> bytes:
    """One argument, as it was before it was packed."""
    return packed[packed.index(b"\r\n") + 2 : -2]


def exactly(text: bytes) -> bytes:
    """A pattern that matches this text alone."""
    return re.sub(rb"([\\*?\[\]])", rb"\\\1", text)


def milliseconds(seconds: float) -> int:
    """At least 1: Redis takes no expiry of 0."""
    return max(1, round(seconds * 1000))


def _text(value: str) -> bytes:
    encoded = value[:TEXT_LIMIT].encode("utf-8", "replace")
    return encoded.replace(SEPARATOR, b" ")


def taken(reply: int | Sequence[int], slots: Sequence[Slot]) -> TakeReply:
    """The reply to a take of these slots. Those that somebody may wait for are marked: see `Keys.give`."""
    if isinstance(reply, int):
        if reply < 0:
            slots[0].memo.append(WAITED_FOR)
            reply = ~reply
        count, has_room = reply >> 1, reply & 1 == 1
        return Taken((has_room,), (count,)) if has_room or not slots[0].block else Full((True,), (count,))
    if min(reply) < 0:
        for slot, each in zip(slots, reply, strict=True):
            if each < 0:
                slot.memo.append(WAITED_FOR)
        reply = [~each if each < 0 else each for each in reply]
    room = tuple([each & 1 == 1 for each in reply])
    counts = tuple([each >> 1 for each in reply])
    full = [slot.block and not has_room for slot, has_room in zip(slots, room, strict=True)]
    return Full(tuple(full), counts) if True in full else Taken(room, counts)


def claimed(reply: int, slots: Sequence[Slot]) -> bool:
    """The reply to a claim by these slots. What others knew of who may wait is lost: they are marked on suspicion."""
    if reply == 2:
        for slot in slots:
            slot.memo.append(WAITED_FOR)
    return reply > 0


def queued(reply: Sequence[int], slots: Sequence[Slot], *, hears: bool) -> QueueReply:
    """The reply to `queue`. Who hears nothing has to ask often."""
    verdict, told = reply[0], reply[1 : 1 + len(slots)]
    counts = tuple([each >> 1 for each in told])
    if verdict == 0:
        return Taken(tuple([each & 1 == 1 for each in told]), counts)
    full = tuple([slot.block and each & 1 == 0 for slot, each in zip(slots, told, strict=True)])
    if verdict == 3:
        ahead, again = reply[-2:]
        latest = ASK_AGAIN if hears else ASK_OFTEN
        return Queued(full, counts, ahead, max(ASK_AGAIN_AFTER, min(latest, again / 1000)))
    return Full(full, counts) if verdict == 1 else LineFull(full, counts)


def stands_still(reply: Sequence[int], slots: Sequence[Slot]) -> bool:
    """Whoever got this reply to `queue` is not waited for any more, and may stand in line all the same."""
    return reply[0] == 1 and len(reply) > 1 + len(slots)


def waiting(line: bytes, prefix: bytes, place: int, joined: float, now: float, record: bytes) -> Waiter:
    """One who waits as people see it, in this line; `joined` and `now` in microseconds of the server's clock."""
    key = prefix + line.removeprefix(prefix).removeprefix(b"!queue:")
    fields = _fields(record)
    stored = next(holder for name, holder in zip(fields[1::5], fields[5::5], strict=True) if name == key)
    one = holder(key, prefix, stored, 0.0, 0.0)
    age = max(0.0, (now - joined) / 1e6)
    return Waiter(one.policy, one.key, one.token, place, age, one.path, cost=one.cost)


def _fields(record: bytes) -> list[bytes]:
    found = []
    while record:
        length, _, record = record.partition(b":")
        found.append(record[: int(length)])
        record = record[int(length) :]
    return found


Told = TypeVar("Told", Holder, Waiter)


def with_process(one: Told, known: Mapping[str, bytes | None]) -> Told:
    """The holder, or who waits, with the host and the pid of its process, if that is among those known."""
    host, _, pid = (known.get(process_of(one.token)) or b"").partition(SEPARATOR)
    if not pid.isdigit():
        return one
    return replace(one, host=host.decode("utf-8", "replace"), pid=int(pid))


def is_filler(stored: bytes) -> bool:
    """Is this member one of those that a cost of more than 1 needs beside the holder's own?"""
    return stored.count(SEPARATOR) == 1


def holder(key: bytes, prefix: bytes, stored: bytes, ends: float, now: float) -> Holder:
    """A member as people see it; `ends` and `now` in ms of the server's clock, its age by the client's word."""
    token, since, text, path = (stored.split(SEPARATOR, 3) + [b""] * 3)[:4]
    policy = key.removeprefix(prefix).rpartition(b":")[0]
    since, _, cost = since.partition(b"x")
    began = int(since) if since.isdigit() else now
    return Holder(
        policy.decode(),
        text.decode("utf-8", "replace"),
        token.decode("utf-8", "replace"),
        max(0.0, (now - began) / 1000),
        (ends - now) / 1000,
        path.decode("utf-8", "replace"),
        cost=int(cost) if cost.isdigit() else 1,
    )
