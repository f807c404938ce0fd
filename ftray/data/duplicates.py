"""Prompts of one split that another has too, but for letter case and blanks: such records prove nothing."""

import hashlib
import unicodedata

import numpy as np
import pyarrow as pa

from ftray.data.shards import TokenizedData

AT_ONCE = 2**22  # hashes held in memory


def shared_prompts(data: TokenizedData, split: str, other: str = "train", at_once: int = AT_ONCE) -> int:
    """How many rows of `split` have the prompt of a row of `other`; a text without a prompt counts as a whole.

    Args:
        at_once: rows of `split` whose hashes are held in memory; `other` is read once for each so many.
    """
    groups, count, held = len(data.splits[split].row_groups), 0, list[np.ndarray]()
    for index in range(groups):
        held.append(_hashes(data, split, index))
        if index < groups - 1 and sum(map(len, held)) < at_once:
            continue
        asked, found = np.concatenate(held), np.empty(0, np.uint64)
        for there in range(len(data.splits[other].row_groups)):
            found = np.union1d(found, np.intersect1d(asked, _hashes(data, other, there)))
        count += int(np.isin(asked, found).sum())
        held = []
    return count


def normalised(text: str) -> str:
    """Text without what nobody would call a difference: letter case, blanks, how Unicode writes a character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hashes(data: TokenizedData, split: str, row_group: int) -> np.ndarray:
    """A hash of the prompt of each row of a row group, uint64."""
    table: pa.Table = data.row_group(split, row_group, ["prompt", "target"])
    texts = [prompt or target for prompt, target in zip(*(column.to_pylist() for column in table.columns), strict=True)]
    digests = (hashlib.blake2b(normalised(text).encode(errors="surrogatepass"), digest_size=8) for text in texts)
    return np.frombuffer(b"".join(digest.digest() for digest in digests), np.uint64)
