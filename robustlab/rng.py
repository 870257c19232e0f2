"""Counter-based randomness: a draw depends on (seed, purpose, ticket) and on nothing else.

    key     = blake2b(parent key, *names)                                  64 bits, on the host
    k       = S(S(ticket) ^ key)                                           S = the finaliser of splitmix64
    h(j)    = mix(mix(j * 0x9E3779B9 + low(k)) ^ high(k)),  j = 0 .. D-1   mix = lowbias32, on 32-bit words
    uniform = (h >>> 8) / 2^24
    normal  = sqrt(2) erfinv(((h >>> 9) + 1/2) / 2^22 - 1)                 23 bits: 24 would reach erfinv(1) = inf

The ticket is a sample's position in the seeded sample stream (in evaluation: its index), so draws survive a change of batch
size, of process count and a resumed run, and can be drawn twice. Integers and uniforms agree bit for bit across
devices, normals to rounding. lowbias32: Wellons, "Prospecting for hash functions" (2018); splitmix64: Steele, Lea, Flood,
OOPSLA 2014. Not cryptographic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _shift(x: Tensor, by: int, bits: int) -> Tensor:
    """Logical right shift; torch has only the arithmetic one on signed words."""
    return (x >> by) & ((1 << (bits - by)) - 1)


_S1, _S2 = _signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64)
_M1, _M2, _GOLDEN = _signed(0x7FEB352D, 32), _signed(0x846CA68B, 32), _signed(0x9E3779B9, 32)


def _splitmix64(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30, 64)) * _S1
    x = (x ^ _shift(x, 27, 64)) * _S2
    return x ^ _shift(x, 31, 64)


def _lowbias32(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16, 32)) * _M1
    x = (x ^ _shift(x, 15, 32)) * _M2
    return x ^ _shift(x, 16, 32)


@dataclass(frozen=True)
class Rng:
    """A source of draws: a seed or key, the path of purposes below it, and the tickets of the samples drawn for.

    >>> rng = Rng(0).child("attack", "start").at(torch.arange(2))
    >>> rng.uniform((3,)).shape
    torch.Size([2, 3])
    """

    key: int = 0
    tickets: Tensor | None = None
    number: int = 0  # of the micro-batch; only batch-level draws depend on it

    def child(self, *names: str | int) -> Rng:
        """The source for a purpose; every distinct path draws independently."""
        path = (self.key, *(str(n) if isinstance(n, str) else int(n) for n in names))  # NumPy's scalars print otherwise
        digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
        return replace(self, key=int.from_bytes(digest, "little"))

    def at(self, tickets: Tensor) -> Rng:
        """The same source for samples with these tickets (N,), of any integer type."""
        return replace(self, tickets=tickets.to(torch.int64))

    def select(self, rows: Tensor) -> Rng:
        """The same source for some of the samples (a mask or indices)."""
        return self.at(self._tickets()[rows])

    def split(self, parts: int, first: int = 0, stride: int = 1) -> list[Rng]:
        """One source per micro-batch; their global numbers are first, first + stride, ..."""
        return [replace(self, number=first + i * stride) for i in range(parts)]

    # -------------------------------------------------------------------------------------- draws for each sample

    def bits(self, shape: Sequence[int]) -> Tensor:
        """32 random bits per element: (N, *shape), int32."""
        tickets = self._tickets()
        k = _splitmix64(_splitmix64(tickets) ^ _signed(self.key, 64))
        low, high = k.to(torch.int32), (k >> 32).to(torch.int32)
        j = torch.arange(math.prod(shape), dtype=torch.int32, device=tickets.device) * _GOLDEN
        return _lowbias32(_lowbias32(j + low[:, None]) ^ high[:, None]).view(len(tickets), *shape)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [low, high): (N, *shape)."""
        u = _shift(self.bits(shape), 8, 32).to(torch.float32) * 2.0**-24
        return (low + (high - low) * u).to(dtype)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers: (N, *shape)."""
        u = (_shift(self.bits(shape), 9, 32).to(torch.float32) + 0.5) * 2.0**-22 - 1.0
        return (math.sqrt(2.0) * torch.erfinv(u)).to(dtype)

    def integers(self, shape: Sequence[int], high: int | Tensor) -> Tensor:
        """Whole numbers in 0 .. high-1: (N, *shape), int64. ``high`` is at most 2^24."""
        return (self.uniform(shape, dtype=torch.float64) * high).floor().long()

    def gamma(self, shape: Sequence[int], alpha: float, tries: int = 8) -> Tensor:
        """Gamma(alpha, 1) numbers: (N, *shape); Marsaglia and Tsang's method, ACM TOMS 26 (2000), first accepted of 8."""
        return self._log_gamma(shape, alpha, tries).exp().float()

    def _log_gamma(self, shape: Sequence[int], alpha: float, tries: int = 8) -> Tensor:
        """Their logarithms, float64: for small alpha the numbers themselves underflow."""
        boost = alpha < 1
        d = (alpha + 1 if boost else alpha) - 1 / 3
        n = self.child("normal").normal((tries, *shape)).double()
        u = self.child("uniform").uniform((tries, *shape)).double().clamp_min(2.0**-25)
        v = (1 + n / math.sqrt(9 * d)) ** 3
        ok = (v > 0) & (u.log() < n.square() / 2 + d - d * v + d * v.clamp_min(1e-300).log())
        first = ok.int().argmax(1, keepdim=True)  # the first True; the first try where none is (probability under 1e-10)
        out = (d * v.clamp_min(1e-300).gather(1, first).squeeze(1)).log()
        if boost:
            out = out + self.child("boost").uniform(shape).double().clamp_min(2.0**-25).log() / alpha
        return out

    def beta(self, shape: Sequence[int], a: float, b: float) -> Tensor:
        """Beta(a, b) numbers: (N, *shape)."""
        return (self.child("a")._log_gamma(shape, a) - self.child("b")._log_gamma(shape, b)).sigmoid().float()

    # -------------------------------------------------------------------------------------- draws for the whole batch

    def batch(self) -> torch.Generator:
        """A CPU generator for what couples the batch (a permutation, one mixing weight), keyed by the micro-batch number."""
        return torch.Generator().manual_seed(self.child("batch", self.number).key % 2**63)

    def batch_seed(self) -> int:
        """The seed of the ambient generator (dropout) during this micro-batch."""
        return self.child("ambient", self.number).key % 2**63

    def permutation(self, n: int) -> Tensor:
        """A permutation of 0 .. n-1, for the whole batch."""
        return torch.randperm(n, generator=self.batch())

    def _tickets(self) -> Tensor:
        if self.tickets is None:
            raise ValueError("this source has no tickets: bind samples with rng.at(tickets)")
        return self.tickets
