"""Assignment of stored items to the splits train, validation and test."""

import hashlib
from collections.abc import Sequence

__all__ = ["split_by_hash", "split_items"]


def split_by_hash(key: bytes, *, test: int, validation: int) -> str:
    """Assigns an item to a split by the hash of its key.

    The assignment depends on nothing else: it is the same on every machine, and adding items never moves others.

    Args:
      key: the item's identity.
      test: percentage of the test split.
      validation: percentage of the validation split.

    Example:
      >>> split_by_hash(b"argparse.py", test=5, validation=5)
      'train'
    """
    number = _hash(key) % 100
    return "test" if number < test else "validation" if number < test + validation else "train"


def split_items(keys: Sequence[bytes], *, test: int, validation: int) -> list[str]:
    """Assigns items to splits by the hashes of their keys; no split is empty where there are three distinct keys.

    Items with equal keys are in the same split. Where `split_by_hash` would leave a split empty, which is likely for
    fewer than a hundred items, the items are ranked by hash and each split takes its percentage of them, at least one.

    Args:
      keys: identities of the items.
      test: percentage of the test split.
      validation: percentage of the validation split.

    Returns:
      The split of each item.

    Example:
      >>> split_items([b"a", b"b", b"c", b"a"], test=5, validation=5)
      ['train', 'validation', 'test', 'train']
    """
    chosen = {key: split_by_hash(key, test=test, validation=validation) for key in keys}
    if len(chosen) >= 3 and len(set(chosen.values())) < 3:
        ranked = sorted(chosen, key=lambda key: (_hash(key), key))
        tests = max(1, len(ranked) * test // 100)
        held_out = tests + max(1, len(ranked) * validation // 100)
        for rank, key in enumerate(ranked):
            chosen[key] = "test" if rank < tests else "validation" if rank < held_out else "train"
    return [chosen[key] for key in keys]


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
