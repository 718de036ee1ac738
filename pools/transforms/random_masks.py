"""Random masks that depend on seed, expert, tensor and element, not on how tensors are cut or threads take turns.

Element e of a tensor gets 32 bits of the Philox stream whose key is a hash of (seed, expert's name, tensor's name):
counter-based generators can start anywhere (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

PER_COUNT = 8  # 32-bit words that Philox makes of one value of its counter


def random_words(seed: int, expert: str, name: str, start: int, stop: int) -> NDArray[np.uint32]:
    """Return 32 random bits for each element [start, stop) of one expert's tensor."""
    digest = hashlib.sha256(f"{seed}\0{expert}\0{name}".encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64))
    first = start // PER_COUNT
    generator.advance(first)
    words = generator.random_raw(-(-(stop - first * PER_COUNT) // 2))
    bits: NDArray[np.uint32] = np.asarray(words, dtype="<u8").view(np.uint32)
    return bits[start - first * PER_COUNT : stop - first * PER_COUNT]


def keep(words: NDArray[np.uint32], probability: float) -> NDArray[np.bool_]:
    """Return which elements are kept, each with this probability (to 2⁻³²)."""
    limit = round(probability * 2**32)
    if limit >= 2**32:
        return np.ones(len(words), dtype=np.bool_)
    return words < np.uint32(limit)
