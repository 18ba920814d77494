import ast
import io
import random
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pytest

from sigma_lite.data.kinds import KINDS, WHITESPACE, byte_kinds, token_kinds

LETTERS = dict(zip("_kionsdctp", KINDS[1:], strict=True))  # _ whitespace, k keyword, i identifier, ...

# A program cut into stretches of one kind: "letter stretch" each.
PROGRAM = [
    *("c# a note \u00e9", "_\n", "kimport", "_ ", "ios", "_\n"),
    *("kclass", "_ ", "iA", "o(", "iB", "o):", "_\n    ", 'd"""Says\n\n    two. \u00e9"""', "_\n    "),
    *("ix", "_ ", "o=", "_ ", "n0x1F", "_ ", "o+", "_ ", "n1.5e3j", "_  ", "c# why", "_\n    "),
    *("kdef", "_ ", "i\u00e9", "o(", "iself", "o):", "_ ", 'd"in one line"', "_\n    "),
    *("kasync", "_ ", "kdef", "_ ", "ig", "o():", "_\n        ", "d'one'", "_ ", 'dr"two"', "_\n        "),
    *("s'not the first statement'", "_\n        "),
    *("kreturn", "_ ", 'sf"{x!r:>{9}} \u00e9 {{}}"', "_ ", "o+", "_ \\\n            ", "kNone", "_\n"),
    *("kif", "_ ", "ix", "o:", "_\n    ", "s'not in a function'", "_\n"),
    *("klambda", "o:", "_ ", "s'not a docstring'", "_\n"),
    *("kdef", "_ ", "ih", "o():", "_\n\t", "s'''called'''", "o.", "istrip", "o()", "_\n\x0c"),
    *("kdef", "_ ", "im", "o():", "_\n    ", "sb'bytes'", "_\n"),
]


def expand(stretches: list[str]) -> tuple[str, list[str]]:
    """(text, kind of each byte)"""
    kinds = [LETTERS[s[0]] for s in stretches for _ in s[1:].encode()]
    return "".join(s[1:] for s in stretches), kinds


def kinds_of(name: str, text: str) -> list[str]:
    return [KINDS[k] for k in byte_kinds(name, text)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_program_is_labelled_exactly(line_end):
    text, kinds = expand([s.replace("\n", line_end) for s in PROGRAM])
    ast.parse(text)  # a real program
    got = kinds_of("program.py", text)
    assert list(zip(text.encode(), got, strict=True)) == list(zip(text.encode(), kinds, strict=True))


@pytest.mark.parametrize(
    "stretches",
    [
        ["kdef", "_ ", "if", "o(", "t\n    '''never closed\n"],
        ["iprint", "_ ", "s'old python'", "_\n"],
        ["_\n \t\n"],
    ],
)
def test_what_is_not_a_program_has_labels_too(stretches):
    text, kinds = expand(stretches)
    got = kinds_of("broken.py", text)
    known = [k for k in kinds if k != "text"]
    assert got[: len(known)] == known
    assert len(got) == len(text.encode())


def test_other_text_is_labelled_by_its_bytes():
    text, kinds = expand(["tGr\u00fc\u00dfe", "p,", "_ ", "t\u4f60\u597d", "_\n", "n42", "p%", "_\t", "t\U0001f642"])
    assert kinds_of("letter.txt", text) == kinds


def test_a_token_has_the_kind_of_its_first_byte_that_is_not_white_space():
    text, _ = expand(["ix", "_ ", "o=", "_ ", "n1", "_\n    ", "c# no", "_\n"])
    tokens = ["x", " =", " 1", "\n   ", " # ", "no", "\n"]
    assert "".join(tokens) == text
    kinds = token_kinds(np.array([len(t) for t in tokens]), byte_kinds("a.py", text))
    assert [KINDS[k] for k in kinds] == [
        "identifier",
        "operator",
        "number",
        "whitespace",
        "comment",
        "comment",
        "whitespace",
    ]


def test_token_kinds_agree_with_the_definition_on_random_cuts():
    random.seed(0)
    text, _ = expand(PROGRAM)
    of_bytes = byte_kinds("a.py", text)
    for _ in range(50):
        cuts = sorted(random.sample(range(1, len(of_bytes)), 40))
        edges = [0, *cuts, len(of_bytes)]
        expected = [
            next((k for k in of_bytes[a:b] if k != WHITESPACE), WHITESPACE) for a, b in zip(edges, edges[1:], strict=False)
        ]
        assert token_kinds(np.diff(edges), of_bytes).tolist() == expected


@pytest.fixture(scope="module")
def modules() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "json/decoder", "dataclasses", "typing", "asyncio/tasks", "tarfile", "xml/dom/minidom", "re")
    paths = [root / f"{name}.py" for name in names]
    return [path.read_text("utf-8") for path in paths if path.exists()]


def of_kind(text: str, *kinds: str) -> np.ndarray:
    return np.isin(byte_kinds("module.py", text), [KINDS.index(k) for k in kinds])


def test_the_library_without_its_comments_is_the_same_program(modules):
    for text in modules:
        content = np.frombuffer(text.encode(), np.uint8)
        comments = of_kind(text, "comment")
        assert comments.any()
        assert ast.dump(ast.parse(content[~comments].tobytes())) == ast.dump(ast.parse(text))


def test_the_library_has_as_many_docstrings_as_the_parser_finds(modules):
    for text in modules:
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, owners) and ast.get_docstring(n) is not None]
        labels = of_kind(text, "docstring")
        runs = np.diff(np.concatenate([[0], labels])).clip(0).sum()
        assert runs == len(found)


def test_white_space_between_tokens_is_all_that_is_called_white_space(modules):
    for text in modules:
        content = np.frombuffer(text.encode(), np.uint8)
        assert set(content[of_kind(text, "whitespace")].tobytes()) <= set(b" \t\r\n\x0c\\")
        words, nesting = [], 0  # from Python 3.12 on, what stands in the braces of an f-string arrives as tokens too
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = tokenize.tok_name[token.type]
            nesting += kind.endswith("STRING_START") - kind.endswith("STRING_END")
            words += [token.string] if kind == "NAME" and not nesting else []
        assert content[of_kind(text, "identifier", "keyword")].tobytes().decode() == "".join(words)
