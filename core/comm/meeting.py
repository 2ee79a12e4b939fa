"""Ranks meet in a key-value store before a rare collective, so that a rank that comes alone sends nothing.

Each keeps one note there, of where it is. A rank that waits for the others reads theirs: in a meeting, until all have
come or one is elsewhere; in a collective that takes long, to learn whether one is in a meeting instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, final

import torch

FIRST_NAP_S, LONGEST_NAP_S = 1e-3, 0.1  # between two looks at the notes of those who are not there
PROBE_S = 2.0  # between two looks at whether those still live
PROBE_TAG = 0x5AEF  # of messages that nobody sends
REMEDY = (
    "All ranks must come to the same, at the same point of the training loop: do it on every rank, and not under "
    "`if rank == 0`"
)


@final
class NotTogether(RuntimeError):
    """A rank is where others are not, and it says who, where, and what to do."""


class Note(NamedTuple):
    """Where a rank is.

    Attributes:
        meeting: the number of the meeting that it came to last; 0: to none yet.
        place: how many collectives it had called by then.
        what: its name; or what the rank does instead.
        over: whether it raises an error there, and does not wait any more.
    """

    meeting: int = 0
    place: int = 0
    what: str = ""
    over: bool = False


@final
class Meetings:
    """Where the ranks of a group meet, over and over.

    Args:
        store: for these ranks and this purpose alone; it keeps one key a rank. None for a single rank.
        rank, size: of this process.
        timeout: how long a rank waits for the others.
        gloo: a gloo group of the same ranks, or None: its connections tell who has died.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, gloo: Any) -> None:
        self._store, self._rank, self._size, self._timeout, self._gloo = store, rank, size, timeout, gloo
        self._others = [r for r in range(size) if r != rank]

    def meet(self, what: str, place: int = 0) -> None:
        """Return when all ranks have come to this meeting.

        Raises:
            NotTogether: if one does not come in time, or goes elsewhere. This rank may come to the same again.
            RuntimeError: if one has died, or the store is gone.
        """
        if self._size == 1:
            return
        last = self._read([self._rank])[self._rank]
        mine = Note(last.meeting + (not last.over), place, what)
        before = self._read(self._others) if last.over else {}
        stale = {r: note for r, note in before.items() if note.over}  # of the attempt that failed
        self._write(mine)
        try:
            self._wait(mine, stale)
        except BaseException:
            with suppress(RuntimeError):  # the store may be gone
                self._write(mine._replace(over=True))
            raise

    def _wait(self, mine: Note, stale: Mapping[int, Note]) -> None:
        """Until nobody is absent."""
        absent, nap, now = self._others, FIRST_NAP_S, time.monotonic()
        end, probe = now + self._timeout.total_seconds(), now + PROBE_S
        while True:
            notes = {r: note for r, note in self._read(absent).items() if note != stale.get(r)}
            if any(n.over or (n.meeting == mine.meeting and n.what != mine.what) for n in notes.values()):
                raise self._apart(mine, "has not come yet")
            absent = [r for r in absent if r not in notes or notes[r].meeting < mine.meeting]
            if not absent:
                return
            now = time.monotonic()
            if now > end:
                seconds = f"{self._timeout.total_seconds():g} s"
                raise self._apart(mine, f"did not come within {seconds}, the process group's timeout")
            if now > probe:
                self._probe(absent, mine.what)
                probe = now + PROBE_S
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP_S)

    def check(self, what: str, place: int) -> None:
        """For a rank that waits in its collective number `place`: raise if another cannot come there.

        Raises:
            NotTogether: if a rank has come to a meeting before that collective, or has raised.
        """
        notes = self._read([self._rank, *self._others])
        last = notes.pop(self._rank)
        mine = Note(last.meeting + (not last.over), place, what, over=True)
        if any(n.over or (n.meeting >= mine.meeting and n.place < place) for n in notes.values()):
            self._write(mine)
            raise self._apart(mine)

    def _probe(self, ranks: Sequence[int], what: str) -> None:
        """Raise RuntimeError if the connection to one of them is closed."""
        for r in ranks if self._gloo is not None else ():
            try:
                self._gloo.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], r, PROBE_TAG)  # never waited for
            except RuntimeError as error:
                if self._read([r])[r].over:  # it closed its connections when it raised
                    return
                raise RuntimeError(f'rank {r} did not come to "{what}" and has ended: {error}') from error

    def _apart(self, mine: Note, absent: str = "") -> NotTogether:
        """What to raise. absent: said of ranks that are not known to be anywhere; empty: they are not named."""
        notes = self._read(self._others)
        found: dict[str, list[int]] = {}
        for r, note in notes.items():
            if not note.over and note.meeting < mine.meeting:
                where = absent
            elif note.what != mine.what:
                where = f'at "{note.what}"'
            else:  # in a collective, that is no news
                where = "gave up waiting there" if note.over and absent else ""
            found.setdefault(where, []).append(r)
        found.pop("", None)
        others = ", ".join(f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))} ({where})" for where, r in found.items())
        return NotTogether(f'rank {self._rank} of {self._size} is at "{mine.what}", but not {others}. {REMEDY}')

    def _read(self, ranks: Sequence[int]) -> dict[int, Note]:
        there = ranks if self._store.check([*map(str, ranks)]) else [r for r in ranks if self._store.check([str(r)])]
        values = self._store.multi_get([*map(str, there)]) if there else []
        return dict.fromkeys(ranks, Note()) | {r: Note(*json.loads(v)) for r, v in zip(there, values, strict=True)}

    def _write(self, note: Note) -> None:
        self._store.set(str(self._rank), json.dumps(note))
