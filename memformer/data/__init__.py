"""Data: tokenizers, documents and packing, offline data sets, and sources of examples."""

from memformer.data.bpe import BytePairs, split_words, train_bpe
from memformer.data.documents import Document, list_documents, read_documents, split_documents, standard_library
from memformer.data.packing import PackedDocuments
from memformer.data.shapes import Figure, describe_scene, draw_scene, figure_coverage, paint_scene
from memformer.data.source import (
    BATCH_KEYS,
    SPLITS,
    Example,
    Extra,
    FiniteSource,
    RandomAccessSource,
    SyntheticSource,
    make_example,
)
from memformer.data.splits import split_by_hash, split_items
from memformer.data.stamps import (
    STAMPS_FOLDER,
    STAMPS_PACKAGE,
    Stamp,
    clean_caption,
    list_stamps,
    read_pictures,
    split_stamps,
)
from memformer.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from memformer.data.verses import (
    VERSES_PACKAGES,
    Verse,
    find_verses,
    read_verse_slice,
    read_verses,
    split_verses,
    strip_markup,
)
from memformer.data.wordpiece import WordPiece

__all__ = [
    "BATCH_KEYS",
    "SPLITS",
    "STAMPS_FOLDER",
    "STAMPS_PACKAGE",
    "VERSES_PACKAGES",
    "BytePairs",
    "ByteTokenizer",
    "Document",
    "Example",
    "Extra",
    "Figure",
    "FileTokenizer",
    "FiniteSource",
    "PackedDocuments",
    "RandomAccessSource",
    "Stamp",
    "SyntheticSource",
    "Tokenizer",
    "Verse",
    "WordPiece",
    "clean_caption",
    "describe_scene",
    "draw_scene",
    "figure_coverage",
    "find_verses",
    "list_documents",
    "list_stamps",
    "load_tokenizer",
    "make_example",
    "paint_scene",
    "read_documents",
    "read_pictures",
    "read_verse_slice",
    "read_verses",
    "save_tokenizer",
    "split_by_hash",
    "split_documents",
    "split_items",
    "split_stamps",
    "split_verses",
    "split_words",
    "standard_library",
    "strip_markup",
    "train_bpe",
    "train_tokenizer",
]
