"""Tokenizers; names as transformers'. `tokenizer.py` is the class. A vocabulary has one of three
forms on disk, a file each: only these touch a library, imported when a tokenizer is made.
"""

from __future__ import annotations

from ..encoding import Array as Array
from ..encoding import BatchEncoding as BatchEncoding
from .stream import TextStream as TextStream
from .tokenizer import AutoTokenizer as AutoTokenizer
from .tokenizer import ChatGLMTokenizer as ChatGLMTokenizer
