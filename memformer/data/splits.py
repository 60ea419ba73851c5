"""Assignment of stored documents to splits."""

import hashlib

__all__ = ["split_by_hash"]


def split_by_hash(key: bytes, *, test: int, validation: int) -> str:
    """Assigns a document to a split by the hash of its key.

    The assignment depends on nothing else: it is the same on every machine, and adding documents never moves others.

    Args:
      key: the document's identity.
      test: percentage of the test split.
      validation: percentage of the validation split.

    Example:
      >>> split_by_hash(b"argparse.py", test=5, validation=5)
      'train'
    """
    number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 100
    return "test" if number < test else "validation" if number < test + validation else "train"
