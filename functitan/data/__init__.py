"""Text as batches of tokens: sources, encodings, and streams whose position is a value."""

from functitan.data.documents import Corpus, huggingface_documents, split, stdlib_documents
from functitan.data.encodings import END_OF_TEXT, byte_encoding, encoding
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
