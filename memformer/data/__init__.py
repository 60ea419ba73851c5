"""Data: tokenizers, documents and packing, offline data sets, and sources of examples."""

from memformer.data.bpe import BytePairs, split_words, train_bpe
from memformer.data.corpus import Corpus, open_corpus, wrap_source
from memformer.data.documents import Document, list_documents, read_documents, split_documents, standard_library
from memformer.data.draws import bounded_integers, sample_integers, split_words64, unit_floats
from memformer.data.packing import PackedDocuments, make_window
from memformer.data.shapes import Figure, describe_scene, draw_scene, figure_coverage, paint_scene
from memformer.data.source import (
    BATCH_KEYS,
    SPLITS,
    Example,
    Extra,
    FiniteSource,
    RandomAccessSource,
    SyntheticSource,
    make_batch,
    make_example,
    stack_examples,
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
from memformer.data.text_files import Cursor, Problem, TextRecord
from memformer.data.token_store import Shard, TokenSplit, TokenStore
from memformer.data.token_windows import MixedSource, PackedTokens, TokenWindows, pack_lengths
from memformer.data.tokenization import describe_problem, tokenize_corpus, training_texts
from memformer.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from memformer.data.verses import (
    CHAPTERS_PACKAGE,
    VERSES_PACKAGES,
    Verse,
    find_chapters,
    find_verses,
    read_chapters,
    read_verse_slice,
    read_verses,
    split_verses,
    strip_markup,
)
from memformer.data.wordpiece import WordPiece

__all__ = [
    "BATCH_KEYS",
    "CHAPTERS_PACKAGE",
    "SPLITS",
    "STAMPS_FOLDER",
    "STAMPS_PACKAGE",
    "VERSES_PACKAGES",
    "BytePairs",
    "ByteTokenizer",
    "Corpus",
    "Cursor",
    "Document",
    "Example",
    "Extra",
    "Figure",
    "FileTokenizer",
    "FiniteSource",
    "MixedSource",
    "PackedDocuments",
    "PackedTokens",
    "Problem",
    "RandomAccessSource",
    "Shard",
    "Stamp",
    "SyntheticSource",
    "TextRecord",
    "TokenSplit",
    "TokenStore",
    "TokenWindows",
    "Tokenizer",
    "Verse",
    "WordPiece",
    "bounded_integers",
    "clean_caption",
    "describe_problem",
    "describe_scene",
    "draw_scene",
    "figure_coverage",
    "find_chapters",
    "find_verses",
    "list_documents",
    "list_stamps",
    "load_tokenizer",
    "make_batch",
    "make_example",
    "make_window",
    "open_corpus",
    "pack_lengths",
    "paint_scene",
    "read_chapters",
    "read_documents",
    "read_pictures",
    "read_verse_slice",
    "read_verses",
    "sample_integers",
    "save_tokenizer",
    "split_by_hash",
    "split_documents",
    "split_items",
    "split_stamps",
    "split_verses",
    "split_words",
    "split_words64",
    "stack_examples",
    "standard_library",
    "strip_markup",
    "tokenize_corpus",
    "train_bpe",
    "train_tokenizer",
    "training_texts",
    "unit_floats",
    "wrap_source",
]
