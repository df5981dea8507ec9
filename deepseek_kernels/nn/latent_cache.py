"""A paged cache of latent rows, shared by all layers of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..shapes import FP8_CACHE_ROW, ceil_div


class CacheFull(RuntimeError):
    """More tokens than there are pages, or than a sequence may hold."""


@dataclass(frozen=True, eq=False)
class Append:
    """The tokens that one forward pass adds to the cache. See `LatentCache.append`.

    Attributes:
        pages: [num_layers, num_pages, page_size, row].
        positions: int32 [b * s_q], position of each token in its sequence.
        slots: int64 [b * s_q], page * page_size + row in the page; -1 for padding.
        block_table: int32 [b, max_pages]; -1 where no page is reserved.
        seqlens_kv: int32 [b], lengths with these tokens.
        s_q: tokens a sequence, padding included.
        counts: int32 [b], real tokens of each sequence, which come first; None if all s_q are.
        starts_empty: no sequence had a token before.
        max_tokens: of the cache; positions are below it.
    """

    pages: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    seqlens_kv: torch.Tensor
    s_q: int
    counts: torch.Tensor | None
    starts_empty: bool
    max_tokens: int


class LatentCache:
    """Pages of latent rows, and which sequence owns which.

    Lengths live twice: on the device, where `append` advances them without a host synchronisation, and on the host as
    a bound from which pages are reserved. Between reservations nothing is copied to the device, so a decode step can
    be captured in a CUDA graph after `reserve`.

    Args:
        batch: sequences.
        max_tokens: most tokens one sequence may hold.
        num_layers: each has its own pages; block table and lengths are common.
        num_pages: pages of each layer; by default enough for all sequences at full length.
        page_size: tokens a page.
        d_latent, d_rope: widths of a row.
        dtype: of the rows; torch.uint8 is the FP8 layout of 656 bytes a token (d_latent 512, d_rope 64 only).

    Attributes:
        pages: [num_layers, num_pages, page_size, d_latent + d_rope], or [..., 656] uint8.
        block_table: int32 [batch, max_pages]; -1 where no page is reserved.
        seqlens_kv: int32 [batch].
    """

    def __init__(
        self,
        batch: int,
        max_tokens: int,
        *,
        num_layers: int = 1,
        num_pages: int | None = None,
        page_size: int = 64,
        d_latent: int = 512,
        d_rope: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        if dtype == torch.uint8 and (d_latent, d_rope) != (512, 64):
            raise ValueError(
                f"LatentCache: dtype: wanted d_latent 512 and d_rope 64 for uint8, got {d_latent} and {d_rope}"
            )
        self.batch, self.max_tokens, self.page_size = batch, max_tokens, page_size
        max_pages = ceil_div(max_tokens, page_size)
        num_pages = batch * max_pages if num_pages is None else num_pages
        row = FP8_CACHE_ROW if dtype == torch.uint8 else d_latent + d_rope
        self.pages = torch.empty(num_layers, num_pages, page_size, row, dtype=dtype, device=device)
        self.block_table = torch.full((batch, max_pages), -1, dtype=torch.int32, device=device)
        self.seqlens_kv = torch.zeros(batch, dtype=torch.int32, device=device)
        self._free = list(reversed(range(num_pages)))
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._bound = [0] * batch

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def reserve(self, tokens: int | Sequence[int]) -> None:
        """Own pages for so many tokens a sequence in all, those present included.

        Raises:
            CacheFull: and nothing has been reserved.
        """
        wanted = self._per_sequence("reserve", "tokens", tokens)
        if max(wanted, default=0) > self.max_tokens:
            raise CacheFull(
                f"LatentCache: sequence {wanted.index(max(wanted))} would hold {max(wanted)} tokens; "
                f"max_tokens is {self.max_tokens}"
            )
        missing = [
            max(ceil_div(n, self.page_size) - len(pages), 0) for n, pages in zip(wanted, self._owned, strict=True)
        ]
        if sum(missing) > len(self._free):
            raise CacheFull(
                f"LatentCache: wanted {sum(missing)} more pages of {self.page_size} tokens, "
                f"{len(self._free)} of {self.pages.shape[1]} are free"
            )
        if not any(missing):
            return
        for pages, n in zip(self._owned, missing, strict=True):
            pages.extend(self._free.pop() for _ in range(n))
        self._publish()

    def append(self, s_q: int, counts: Sequence[int] | None = None) -> Append:
        """Take slots for the next tokens of every sequence, and advance the lengths.

        Call it once a forward pass; every layer then writes and reads through what it returns.

        Args:
            s_q: tokens a sequence.
            counts: real tokens of each sequence where they differ; the rest of the s_q is padding behind them.

        Raises:
            CacheFull: and nothing has been appended.
        """
        new = [s_q] * self.batch if counts is None else self._per_sequence("append", "counts", counts)
        if min(new, default=0) < 0 or max(new, default=0) > s_q:
            raise ValueError(f"LatentCache.append: counts: wanted 0 to s_q = {s_q}, got {new}")
        ragged = any(n != s_q for n in new)
        starts_empty = not any(self._bound)
        bound = [have + n for have, n in zip(self._bound, new, strict=True)]
        self.reserve(bound)
        self._bound = bound

        device = self.seqlens_kv.device
        added = torch.tensor(new, dtype=torch.int32).to(device, non_blocking=True) if ragged else None
        offsets = torch.arange(s_q, dtype=torch.int32, device=device)
        positions = self.seqlens_kv[:, None] + offsets
        slots = self.slots_for(positions)
        if added is not None:
            slots = torch.where(offsets < added[:, None], slots, -1)
        self.seqlens_kv += s_q if added is None else added
        return Append(
            self.pages, positions.flatten(), slots.flatten(), self.block_table, self.seqlens_kv.clone(), s_q, added,
            starts_empty, self.max_tokens,
        )  # fmt: skip

    def slots_for(self, positions: torch.Tensor) -> torch.Tensor:
        """Slots int64 [b, n] of positions [b, n]: page * page_size + row in the page, -1 where no page is reserved."""
        max_pages = self.block_table.shape[1]
        if max_pages == 0:
            return torch.full_like(positions, -1, dtype=torch.int64)
        index = positions.long() // self.page_size
        page = self.block_table.gather(1, index.clamp(0, max_pages - 1)).long()
        has_page = (page >= 0) & (positions >= 0) & (index < max_pages)
        return torch.where(has_page, page * self.page_size + positions % self.page_size, -1)

    def drop(self, counts: torch.Tensor) -> None:
        """Forget the last `counts` (int32 [b], on the device) tokens of each sequence, such as rejected drafts.

        The host's bound stays until `refresh`.
        """
        self.seqlens_kv.sub_(counts).clamp_(min=0)

    def refresh(self) -> None:
        """Read the lengths back after `drop` or after replays of a captured graph. Synchronises."""
        self._bound = self.seqlens_kv.tolist()

    def free(self, sequence: int) -> None:
        """Empty one sequence and give its pages back."""
        self._free.extend(reversed(self._owned[sequence]))
        self._owned[sequence] = []
        self._bound[sequence] = 0
        self.seqlens_kv[sequence] = 0
        self._publish()

    def _per_sequence(self, method: str, argument: str, values: int | Sequence[int]) -> list[int]:
        if isinstance(values, int):
            return [values] * self.batch
        if len(values) != self.batch:
            raise ValueError(f"LatentCache.{method}: {argument}: wanted {self.batch} numbers, got {len(values)}")
        return [int(v) for v in values]

    def _publish(self) -> None:
        max_pages = self.block_table.shape[1]
        rows = [pages + [-1] * (max_pages - len(pages)) for pages in self._owned]
        self.block_table.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)
