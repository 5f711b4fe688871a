"""A slot alone: the take and the release that nearly all are, in as few steps as may be.

One slot is asked for that fits, or given back that is held, nobody waits for it, and its semaphore's entry stands where it is
looked for first: what `Ours` does with `Table` and `Index` for any number of slots is then known from the start, and is
written here in one piece, word by word and in the same order. Whatever else there is goes the long way, as nothing has been
changed by then.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from ...outcomes import Slot, Taken, TakeReply
from .layout import CELL, FREE, HELD, PATH_ROOM, TOKEN_ROOM, WEIGHT_MASK, Cell, Entry, Header, named
from .table import Place, Table

#: One holder of one semaphore: token, policy, digest.
Known = tuple[str, str, bytes]

# As names of this module, which are looked up faster than those of a class.
_DIRTY, _LAST, _HINT, _HIGH = Header.DIRTY, Header.TICKET, Header.HINT, Header.HIGH
_LO, _TOTAL, _WAITING, _ENTRY, _CELL_SIZE = Entry.LO, Entry.TOTAL, Entry.WAITING, Entry.WORDS, CELL.size
_pack = CELL.pack_into
#: The words of a cell up to the end of its lease: semaphore, ticket, owner and weight, since when, until when.
_begins = struct.Struct("@6Q").unpack_from
assert (Cell.HI, Cell.LO, Cell.TICKET, Cell.OWNER, Cell.EXPIRES) == (0, 1, 2, 3, 5)


@lru_cache(1024)
def _taken(total: int) -> Taken:
    return Taken((True,), (total,))


class Alone:
    """The ways of one slot; and where this process holds and waits, by whom."""

    places: dict[Known, Place]

    def take(self, table: Table, slots: Sequence[Slot], now: int) -> TakeReply:
        words, mapped, states_at, cells_at, index, mask, most = table.parts
        places = self.places
        if len(slots) == 1 and len(places) < most:
            slot = slots[0]
            token, policy, key, limit, cost = slot.token, slot.policy, slot.key, slot.limit, slot.cost
            digest = key.digest
            known, (hi, lo, texts) = (token, policy, digest), named(policy, digest, key.text)
            entry = index + (hi & mask) * _ENTRY
            found = words[entry]
            if not found:
                total = cost
            elif found == hi and words[entry + _LO] == lo and not words[entry + _WAITING]:
                total = words[entry + _TOTAL] + cost
            else:  # its entry stands further on, or somebody waits for it
                return self._take_any(table, slots, now)
            at = states_at + words[_HINT]
            if mapped[at]:  # that one is in use, or there is no such cell
                at = mapped.find(b"\0", at, cells_at)
                if at < 0:
                    return self._take_any(table, slots, now)
            if total <= limit and at < cells_at and known not in places:
                cell, ticket, ttl = at - states_at, words[_LAST] + 1, int(slot.ttl * 1e9)
                try:
                    raw_token, raw_path = token.encode(), slot.path.encode()
                    if len(raw_token) > TOKEN_ROOM or len(raw_path) > PATH_ROOM:
                        return self._take_any(table, slots, now)
                    # Not one store but many, as nobody reads a cell that is FREE.
                    where, weighs = cells_at + cell * _CELL_SIZE, table.number << 32 | cost
                    _pack(mapped, where, hi, lo, ticket, weighs, now, now + ttl, limit, ttl, raw_token, texts, raw_path)
                except (UnicodeEncodeError, struct.error):  # no UTF-8, or a number that a word does not take
                    return self._take_any(table, slots, now)
                words[_LAST] = ticket
                # Known before it counts: whatever comes in between, giving back finds it.
                places[known] = (cell, ticket)
                words[_DIRTY] = 1
                mapped[at] = HELD
                if not found:
                    words[entry + _LO] = lo
                    words[entry] = hi
                words[entry + _TOTAL] = total
                # Cells are taken from the lowest free one on, so all below this one are in use.
                cell += 1
                words[_HINT] = cell
                if cell > words[_HIGH]:
                    words[_HIGH] = cell
                words[_DIRTY] = 0
                return _taken(total)
        return self._take_any(table, slots, now)

    def give(self, table: Table, slots: Sequence[Slot], now: int) -> list[bool]:
        words, mapped, states_at, cells_at, index, mask, _ = table.parts
        if len(slots) == 1:
            slot, places = slots[0], self.places
            known = (slot.token, slot.policy, slot.key.digest)
            place = places.get(known)
            if place is not None:
                cell, ticket = place
                at = states_at + cell
                hi, lo, its, owner, _, until = _begins(mapped, cells_at + cell * _CELL_SIZE)
                if its == ticket and mapped[at] == HELD:
                    entry = index + (hi & mask) * _ENTRY
                    left = words[entry + _TOTAL] - (owner & WEIGHT_MASK)
                    long = words[entry + _WAITING] or (not left and words[index + (hi + 1 & mask) * _ENTRY])
                    if not long and left >= 0 and words[entry] == hi and words[entry + _LO] == lo:
                        words[_DIRTY] = 1
                        # Before anything else: from here on the slot is free, whatever comes.
                        mapped[at] = FREE
                        words[entry + _TOTAL] = left
                        if not left:  # nobody stands behind the entry, and all its other words are 0
                            words[entry] = 0
                            words[entry + _LO] = 0
                        if cell < words[_HINT]:
                            words[_HINT] = cell
                        words[_DIRTY] = 0
                        # After that: whoever is thrown out before it gives back once more.
                        del places[known]
                        return [until > now]
        return self._give_any(table, slots, now)

    def _take_any(self, table: Table, slots: Sequence[Slot], now: int) -> TakeReply:
        raise NotImplementedError

    def _give_any(self, table: Table, slots: Sequence[Slot], now: int) -> list[bool]:
        raise NotImplementedError
