"""Text as batches of tokens: sources, encodings, and streams whose position is a value."""

from functitan.data.documents import (
    END_OF_TEXT,
    Corpus,
    byte_encoding,
    encoding,
    huggingface_documents,
    split,
    stdlib_documents,
)
from functitan.data.stream import BATCH, Cursor, TokenStream, token_stream

__all__ = [
    "BATCH",
    "END_OF_TEXT",
    "Corpus",
    "Cursor",
    "TokenStream",
    "byte_encoding",
    "encoding",
    "huggingface_documents",
    "split",
    "stdlib_documents",
    "token_stream",
]
