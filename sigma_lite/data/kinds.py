"""What kind of text each token is, so that one can ask which expert learned what.

Python documents are labelled by Python's own tokenizer and parser, other text by its bytes. Every byte gets a label; a
token has that of its first byte that is not white space, so ` =` is an operator and `\\n    ` is white space.
"""

from __future__ import annotations

import ast
import io
import keyword
import string
import tokenize
import warnings
from collections.abc import Iterator

import numpy as np

KINDS = (
    "special",  # <|endoftext|> and the chat tokens
    "whitespace",  # between other kinds: line ends, indentation, a backslash that joins lines
    "keyword",  # Python's reserved words
    "identifier",
    "operator",  # Python's operators, brackets and commas
    "number",
    "string",  # f-strings as a whole
    "docstring",
    "comment",
    "text",  # words of documents that are not Python
    "punctuation",  # of documents that are not Python
)
SPECIAL, WHITESPACE, KEYWORD, IDENTIFIER, OPERATOR, NUMBER, STRING, DOCSTRING, COMMENT, TEXT, PUNCTUATION = range(11)

_LAYOUT = {tokenize.ENCODING, tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_KIND = {tokenize.COMMENT: COMMENT, tokenize.STRING: STRING, tokenize.NUMBER: NUMBER}
# From Python 3.12 an f-string (3.14: a t-string) arrives in pieces; labels must not depend on the interpreter.
_OPENS = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")}
_CLOSES = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")}

_BYTE_KIND = np.full(256, TEXT, np.uint8)
for _characters, _kind in ((string.punctuation, PUNCTUATION), (string.digits, NUMBER), (string.whitespace, WHITESPACE)):
    _BYTE_KIND[list(_characters.encode())] = _kind


def byte_kinds(name: str, text: str) -> np.ndarray:
    """Kind of every UTF-8 byte of a document, uint8 [bytes], indices into KINDS. Python is known by its file name."""
    if name.endswith((".py", ".pyi", ".pyw")):
        return _python_kinds(text)
    return _BYTE_KIND[np.frombuffer(text.encode(), np.uint8)]


def token_kinds(lengths_T: np.ndarray, kinds_of_bytes: np.ndarray) -> np.ndarray:
    """Kind of consecutive tokens of `lengths_T` bytes each (their sum is the number of bytes), uint8 [T]."""
    n_bytes = len(kinds_of_bytes)
    ends_T = np.cumsum(lengths_T)
    solid = np.where(kinds_of_bytes != WHITESPACE, np.arange(n_bytes), n_bytes)
    next_solid = np.minimum.accumulate(solid[::-1])[::-1]  # position of the next byte that is not white space
    first_T = next_solid[ends_T - lengths_T]
    return np.where(first_T < ends_T, kinds_of_bytes[np.minimum(first_T, n_bytes - 1)], WHITESPACE).astype(np.uint8)


def _python_kinds(text: str) -> np.ndarray:
    lines = list(io.StringIO(text, newline=""))  # the line ends of tokenize; str.splitlines knows more of them
    line_start = np.cumsum([0, *map(len, lines)]).tolist()
    docstrings = _docstring_spans(text, lines)
    edges, kinds = [0], []  # the text cut into stretches of one kind: white space and a token in turn
    for kind, (row, column), (end_row, end_column) in _python_tokens(lines):
        if kind == STRING and any(start <= (row, column) < end for start, end in docstrings.get(row, ())):
            kind = DOCSTRING
        edges += (line_start[row - 1] + column, line_start[end_row - 1] + end_column)
        kinds += (WHITESPACE, kind)
    edges.append(len(text))
    kinds.append(WHITESPACE)
    kinds_of_characters = np.repeat(np.array(kinds, np.uint8), np.diff(edges))
    if text.isascii():
        return kinds_of_characters
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.repeat(kinds_of_characters, 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF))


def _python_tokens(lines: list[str]) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """(kind, start, end) of each token that is not layout; what follows a fault that stops the tokenizer is text."""
    nesting, opened, end = 0, (1, 0), (1, 0)
    try:
        for type_, word, start, end_, _ in tokenize.generate_tokens(iter([*lines, ""]).__next__):
            if type_ in _LAYOUT:
                continue
            if type_ in _OPENS:
                opened, nesting = (opened if nesting else start), nesting + 1
            elif type_ in _CLOSES:
                nesting -= 1
                if not nesting:
                    end = end_
                    yield STRING, opened, end
            elif not nesting:
                end = end_
                if type_ == tokenize.NAME:
                    yield (KEYWORD if keyword.iskeyword(word) else IDENTIFIER), start, end
                else:
                    yield _KIND.get(type_, OPERATOR), start, end
    except (tokenize.TokenError, SyntaxError):
        yield TEXT, end, (len(lines), len(lines[-1]))


def _docstring_spans(text: str, lines: list[str]) -> dict[int, list[tuple[tuple[int, int], tuple[int, int]]]]:
    """By each line that a docstring touches, its (start, end) as (row, column); {} for what Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the document's own odd escapes
            todo: list[ast.AST] = [ast.parse(text)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}

    def position(row: int, byte_column: int) -> tuple[int, int]:
        return row, len(lines[row - 1].encode()[:byte_column].decode())

    spans: dict[int, list] = {}
    while todo:
        node = todo.pop()
        body = getattr(node, "body", ())
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            first = body[0].value if isinstance(body[0], ast.Expr) else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                span = position(first.lineno, first.col_offset), position(first.end_lineno, first.end_col_offset)
                for row in range(first.lineno, first.end_lineno + 1):
                    spans.setdefault(row, []).append(span)
        for group in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, group, ())
            todo += inner if isinstance(inner, list) else ()  # a lambda's body is no list of statements
    return spans
