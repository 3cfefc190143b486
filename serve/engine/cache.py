"""The paged KV cache's accounting: which block holds which tokens, and what may be shared.

Keys and values live in blocks of `block_size` tokens. Layers of one kind (full attention, or a
sliding window of some length) form a group with its own pool of block ids. A block that is full is
known by the hash of all ids up to its end, salted per tenant, and may be shared by any sequence
with the same beginning; it is never written again. Unused known blocks stay until room is needed,
least useful first. For a sliding window only its last blocks are held by a sequence; a beginning
counts as known when the window before its end is known too.

No tensors here (attention.py has them). Used by scheduler.py. check() proves the books.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from serve.engine.sequence import Sequence

_PLACES_TRIED = 64
_EXPECTED_TOKENS = 512  # an answer's usual length: room left behind a prompt for it

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Layers with one kind of attention. `window` None is full attention."""

    window: int | None
    layers: tuple[int, ...]
    blocks: int


@dataclass(slots=True)
class BlockTable:
    """One sequence's blocks in one group: column c holds tokens c*size .. (c+1)*size.

    `first` is the lowest column still held (columns below it left the window). `runs` lists
    neighbouring blocks as [column, block id, count], so that a reader may take them as one piece.
    """

    ids: Ids
    first: int = 0
    count: int = 0
    runs: list[list[int]] = field(default_factory=list)

    def append(self, block: int) -> None:
        self.ids[self.count] = block
        if self.runs and self.runs[-1][1] + self.runs[-1][2] == block:
            self.runs[-1][2] += 1
        else:
            self.runs.append([self.count, block, 1])
        self.count += 1

    def skip_to(self, column: int) -> None:
        """Start at a column (a beginning whose earlier blocks are outside the window)."""
        self.first = self.count = column

    def drop_first(self) -> int:
        block = int(self.ids[self.first])
        self.first += 1
        run = self.runs[0]
        run[0] += 1
        run[1] += 1
        run[2] -= 1
        if run[2] == 0:
            self.runs.pop(0)
        return block


class BlockPool:
    """One group's block ids: each is free, used (counted), or unused but known."""

    def __init__(self, blocks: int) -> None:
        self.size = blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._uses = [0] * blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known, least useful first
        self._released_at: dict[int, int] = {}
        self._clock = 0
        self._next_start = 0

    @property
    def available(self) -> int:
        return len(self._free) + len(self._unused)

    def known(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def is_unused(self, block: int) -> bool:
        return self._uses[block] == 0

    def take(self, after: int = -1, room: int = 1) -> int:
        """A block for writing; there must be one. Next to `after` if that one is free: neighbours
        are read as one piece. Else one with room behind it for `room` blocks. What is known is
        given up only when nothing is free."""
        block = after + 1
        if after < 0 or block not in self._free:
            block = self._apart(room) if self._free else self._unused_near(after)
        if block in self._free:
            del self._free[block]
        else:
            self._evict(block)
        self._uses[block] = 1
        return block

    def _apart(self, room: int) -> int:
        """A free block away from the last one given so."""
        for place in range(self._next_start, self._next_start + _PLACES_TRIED):
            block = place % self.size
            if block in self._free:
                self._next_start = (block + room) % self.size
                return block
        self._next_start = (self._next_start + _PLACES_TRIED) % self.size
        return next(iter(self._free))

    def _unused_near(self, after: int) -> int:
        """A known block that nobody will miss soon."""
        if after >= 0 and self._is_long_unused(after + 1):
            return after + 1
        return self._first_of_run(next(iter(self._unused)))

    def _is_long_unused(self, block: int) -> bool:
        """Whether it is known, unused and in the older half of those: nobody will miss it soon."""
        if block not in self._unused:
            return False
        oldest = self._released_at[next(iter(self._unused))]
        return self._released_at[block] - oldest <= (self._clock - oldest) // 2

    def _first_of_run(self, block: int) -> int:
        """The lowest of the long unused blocks that end in this one, so that what is written next
        finds neighbours."""
        for _ in range(_PLACES_TRIED):
            if not self._is_long_unused(block - 1):
                break
            block -= 1
        return block

    def _evict(self, block: int) -> None:
        del self._unused[block]
        del self._block_of[self._hash_of.pop(block)]

    def share(self, block: int) -> None:
        if self._uses[block] == 0:
            del self._unused[block]
        self._uses[block] += 1

    def release(self, block: int, is_useful: bool = True) -> None:
        """One use less. A known block then waits to be shared again, the useful ones longest."""
        self._uses[block] -= 1
        if self._uses[block]:
            return
        if block not in self._hash_of:
            self._free[block] = None
            self._free.move_to_end(block, last=False)
            return
        self._clock += 1
        self._released_at[block] = self._clock
        self._unused[block] = None
        if not is_useful:
            self._unused.move_to_end(block, last=False)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block known. Of two with the same content the first stays known."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def forget(self) -> None:
        """Drop every known block: what is in use becomes private, what is unused becomes free."""
        self._free.update(self._unused)
        self._unused.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def uses(self) -> list[int]:
        return list(self._uses)

    def check(self) -> None:
        used = {block for block, uses in enumerate(self._uses) if uses}
        free, unused = set(self._free), set(self._unused)
        assert min(self._uses, default=0) >= 0, "a block was released twice"
        assert not (used & free or used & unused or free & unused), "a block has two states"
        assert used | free | unused == set(range(self.size)), "a block is lost"
        assert unused <= set(self._hash_of), "an unused block is kept but unknown"
        assert not free & set(self._hash_of), "a free block is known"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hash maps disagree"


class KVCache:
    """All groups together. A sequence's tables are in step: each covers the same tokens."""

    def __init__(
        self,
        groups: tuple[GroupSpec, ...],
        block_size: int,
        max_tokens: int,
        *,
        seeded_apart: bool = False,
    ) -> None:
        """`seeded_apart`: requests with a seed are computed more precisely (as a CPU's compiled
        steps do), so that their blocks and those of requests without are not the same."""
        self._seeded_apart = seeded_apart
        self.groups = groups
        self.block_size = block_size
        self.columns = -(-max_tokens // block_size)
        self.pools = tuple(BlockPool(group.blocks) for group in groups)

    # -- asking ------------------------------------------------------------------------------------

    def blocks_needed(self, group: int, tokens: int, chunk: int) -> int:
        """Blocks a sequence of `tokens` holds at most, when computed `chunk` tokens at a time."""
        window = self.groups[group].window
        whole = -(-tokens // self.block_size)
        return whole if window is None else min(whole, -(-(window + chunk) // self.block_size) + 1)

    def can_admit(self, sequence: Sequence, chunk: int, running: list[Sequence]) -> bool:
        """Whether its ids fit beside what `running` hold and will need for theirs, with a block
        each to grow into, counting what it can share."""
        hits = self._match(sequence)
        for i, pool in enumerate(self.pools):
            columns = self._shared_columns(i, hits)
            shared = [pool.known(sequence.hashes[c]) for c in columns]
            reused = sum(1 for block in shared if block is not None and pool.is_unused(block))
            fresh = min(chunk, len(sequence.ids) - hits * self.block_size)
            need = self.blocks_needed(i, len(sequence.ids) + 1, fresh) - len(columns)
            promised = sum(self._outstanding(i, other, chunk) + 1 for other in running)
            if need + promised > pool.available - reused:
                return False
        return True

    def _outstanding(self, group: int, sequence: Sequence, chunk: int) -> int:
        table = sequence.tables[group]
        needed = self.blocks_needed(group, len(sequence.ids), min(chunk, sequence.uncomputed))
        return max(0, needed - (table.count - table.first))

    @property
    def free_blocks(self) -> int:
        return sum(pool.available for pool in self.pools)

    @property
    def total_blocks(self) -> int:
        return sum(pool.size for pool in self.pools)

    # -- doing -------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> int:
        """Give it tables that begin with the blocks it can share; returns their tokens."""
        hits = self._match(sequence)
        sequence.tables = tuple(BlockTable(np.zeros(self.columns, np.int32)) for _ in self.groups)
        for i, (pool, table) in enumerate(zip(self.pools, sequence.tables, strict=True)):
            columns = self._shared_columns(i, hits)
            table.skip_to(columns.start)
            for column in columns:
                block = pool.known(sequence.hashes[column])
                assert block is not None, "a matched block vanished"
                pool.share(block)
                table.append(block)
        sequence.computed = hits * self.block_size
        return sequence.computed

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for its first `tokens` tokens; False and nothing changed when there are none."""
        columns = -(-tokens // self.block_size)
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            if columns - table.count > pool.available:
                return False
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            while table.count < columns:
                is_first = table.count == table.first
                after = -1 if is_first else int(table.ids[table.count - 1])
                room = max(1, self._blocks_expected(sequence) - table.count)
                table.append(pool.take(after, room))
        return True

    def advance(self, sequence: Sequence, computed: int) -> None:
        """Its first `computed` tokens are in the cache: publish full blocks, leave the window."""
        size = self.block_size
        full_before, full_now = sequence.computed // size, computed // size
        sequence.computed = computed
        if full_now > full_before:
            self._hash_up_to(sequence, full_now)
            for pool, table in zip(self.pools, sequence.tables, strict=True):
                for column in range(max(full_before, table.first), full_now):
                    pool.publish(int(table.ids[column]), sequence.hashes[column])
        for i, group in enumerate(self.groups):
            if group.window is not None:
                self._leave_window(sequence, i, group.window)

    def release(self, sequence: Sequence) -> None:
        """Take all its blocks back; the full ones stay known. Deepest first, so that a chain is
        forgotten from its end."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for column in range(table.count - 1, table.first - 1, -1):
                pool.release(int(table.ids[column]))
        sequence.tables = ()
        sequence.computed = 0

    def forget(self) -> None:
        for pool in self.pools:
            pool.forget()

    def check(self, running: list[Sequence] | None = None) -> None:
        """The books balance: free + used + known = total, and uses are exactly the tables'."""
        for i, pool in enumerate(self.pools):
            pool.check()
            if running is None:
                continue
            uses = [0] * pool.size
            for sequence in running:
                table = sequence.tables[i]
                for block in table.ids[table.first : table.count]:
                    uses[int(block)] += 1
                held = [b + k for _, b, n in table.runs for k in range(n)]
                assert held == table.ids[table.first : table.count].tolist(), "runs disagree"
            assert uses == pool.uses(), "uses and tables disagree"

    # -- inside ------------------------------------------------------------------------------------

    def _leave_window(self, sequence: Sequence, group: int, window: int) -> None:
        """Give up blocks no later token can see. Those just before the prompt's end stay useful:
        the next turn of a chat often shares the prompt and not the answer."""
        size, table = self.block_size, sequence.tables[group]
        needed = (sequence.computed - window + 1) // size
        prompt_end = sequence.request.prompt_length // size
        snapshot = range(max(0, (prompt_end * size - window + 1) // size), prompt_end)
        while table.first < min(needed, table.count):
            column = table.first
            self.pools[group].release(table.drop_first(), is_useful=column in snapshot)

    def _blocks_expected(self, sequence: Sequence) -> int:
        most = sequence.request.prompt_length + min(sequence.request.limit, _EXPECTED_TOKENS)
        return -(-max(most, len(sequence.ids)) // self.block_size)

    def _match(self, sequence: Sequence) -> int:
        """How many leading blocks can be shared; at least one id is left to compute."""
        most = (len(sequence.ids) - 1) // self.block_size
        self._hash_up_to(sequence, most)
        hashes = sequence.hashes
        for pool, group in zip(self.pools, self.groups, strict=True):
            if group.window is None:
                most = next((c for c in range(most) if pool.known(hashes[c]) is None), most)
        while most and not self._windows_known(hashes, most):
            most -= 1
        return most

    def _windows_known(self, hashes: list[bytes], hits: int) -> bool:
        return all(
            self.pools[i].known(hashes[column]) is not None
            for i, group in enumerate(self.groups)
            if group.window is not None
            for column in reversed(self._shared_columns(i, hits))
        )

    def _shared_columns(self, group: int, hits: int) -> range:
        """The columns a sequence takes over when its first `hits` blocks are known."""
        window = self.groups[group].window
        if window is None:
            return range(hits)
        return range(max(0, (hits * self.block_size - window + 1) // self.block_size), hits)

    def _hash_up_to(self, sequence: Sequence, blocks: int) -> None:
        hashes, size = sequence.hashes, self.block_size
        for column in range(len(hashes), blocks):
            parent = hashes[-1] if hashes else self._root(sequence)
            first, end = column * size, (column + 1) * size
            ids = array("q", sequence.ids[first:end]).tobytes()
            salts = sequence.request.generation.prompt.salts
            ids += b"".join(salt for place, salt in salts if first <= place < end)
            hashes.append(hashlib.blake2b(parent + ids, digest_size=16).digest())

    def _root(self, sequence: Sequence) -> bytes:
        """Where a hash chain begins: one tenant's blocks are unknown to every other."""
        generation = sequence.request.generation
        tenant = generation.tenant.encode()
        salt = len(tenant).to_bytes(8, "little") + tenant + generation.prompt.salt
        if self._seeded_apart and sequence.request.is_seeded:
            salt += b"seeded"
        return hashlib.blake2b(salt, digest_size=16).digest()
