# SPDX-License-Identifier: Apache-2.0
"""Text that every machine has: the sources of the Python standard library, as bytes."""

import dataclasses
import pathlib
import sysconfig

import numpy as np
from numpy.typing import NDArray

# Not text that a person wrote as one: tests, generated tables, translations of bytes to letters.
_LEFT_OUT = {
    "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages",
    "dist-packages",
}  # fmt: skip
_HELD_OUT_EVERY = 20  # every 20th file is held out


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two disjoint lists of files, each as one array of bytes."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]

    def batch(self, step: int, sequences: int, length: int) -> NDArray[np.int32]:
        """Random windows [sequences, length] of the training text, the same for the same step."""
        return _windows(self.train, np.random.default_rng((1, step)), sequences, length)

    def held_out_batches(self, count: int, sequences: int, length: int) -> list[NDArray[np.int32]]:
        """Always the same windows of the text held out."""
        rng = np.random.default_rng(2)
        return [_windows(self.held_out, rng, sequences, length) for _ in range(count)]


def load() -> Corpus:
    """Reads the standard library of the running Python, file by file in a fixed order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts)
    )
    texts = [np.frombuffer((root / file).read_bytes(), np.uint8) for file in files]
    return Corpus(
        train=np.concatenate([t for i, t in enumerate(texts) if i % _HELD_OUT_EVERY]),
        held_out=np.concatenate(texts[::_HELD_OUT_EVERY]),
    )


def _windows(
    text: NDArray[np.uint8], rng: np.random.Generator, sequences: int, length: int
) -> NDArray[np.int32]:
    starts = rng.integers(0, text.size - length, size=sequences)
    return np.stack([text[s : s + length] for s in starts]).astype(np.int32)
