"""Documents of four domains out of the library."""

import ast
import dis
import io
import os
import subprocess
import sys
import tokenize
import unicodedata
from itertools import groupby
from types import CodeType

import pytest

from sigma_lite.config import CorpusConfig
from sigma_lite.data import library
from sigma_lite.data.corpora import Document, documents, domain_of, expected, split_position

MODULE = '''# A licence.
#
# -----
# In two lines.
"""What it is.

    Indented.
"""
import os  # not the first line

class A:
    """Of é."""
    x = """kept

    # no comment
"""  # after a string

    def f(self):
        # Why.
        #: And how.

        # Apart.
        return 'x'
'''

CODE = '''import os
class A:
    x = """kept

    # no comment
"""
    def f(self):
        return 'x'
'''

PROSE = ["A licence.\nIn two lines.", "What it is.\n\nIndented.", "not the first line", "Of é.", "after a string"]


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    names = ("json/decoder.py", "dataclasses.py", "asyncio/tasks.py", "re/_parser.py", "optparse.py")
    return {name: path.read_text("utf-8") for name in names if (path := library.root() / name).exists()}


# ---------------------------------------------------------------------------------------------------- code and prose


def test_a_module_falls_into_its_program_and_its_words():
    code, prose = library.code_and_prose(MODULE)
    assert code == CODE
    assert prose == "\n\n".join([*PROSE, "Why.\nAnd how.", "Apart."])


@pytest.mark.parametrize("text", ["", "\n", "x = 1", "# only words", '"""Only."""', "def f(:\n  x # y\n"])
def test_odd_modules_fall_apart_too(text):
    code, prose = library.code_and_prose(text)
    assert not (code and prose) or text.startswith("def")


def words(text: str, docstrings: set[tuple[int, int]]) -> list[str]:
    """What Python's tokenizer reads, without comments, layout and the docstrings that begin at those places."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kept = (t.string for t in tokens if t.type not in layout and t.start not in docstrings)
    return ["\n".join(line.rstrip() for line in word.split("\n")) for word in kept]


def owners(text: str) -> list[ast.AST]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds) and ast.get_docstring(n) is not None]


def test_code_is_the_program_and_prose_has_every_docstring_and_comment(modules):
    for text in modules.values():
        code, prose = library.code_and_prose(text)
        said = owners(text)
        assert words(code, set()) == words(text, {(n.body[0].lineno, n.body[0].col_offset) for n in said})
        assert all(line.strip() == line.lstrip() and line for line in code.split("\n")[:-1] if '"""' not in code)
        assert all(ast.get_docstring(n).strip() in prose for n in said)
        comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        assert all(c.lstrip("#:! ").rstrip("# ") in prose for c in comments if any(map(str.isalpha, c)))


# ---------------------------------------------------------------------------------------------------------- bytecode


def code_objects(code: CodeType) -> list[CodeType]:
    return [code, *(c for inner in code.co_consts if isinstance(inner, CodeType) for c in code_objects(inner))]


def test_bytecode_names_every_instruction_in_order(modules):
    for text in modules.values():
        got = library.bytecode(text).split("\n")
        compiled = compile(text, "module", "exec", dont_inherit=True, optimize=2)
        expected = [i.opname for code in code_objects(compiled) for i in dis.get_instructions(code)]
        assert [line.split()[0] for line in got if line and not line.endswith(":")] == expected


def test_bytecode_is_the_same_in_every_process():
    text = "def f(x):\n    return x in {'a', 'bc', 'd', (1, 2)}, lambda: 0, 1.5, (x,), (None, 'q'), ('one',)\n"
    command = [sys.executable, "-c", f"from sigma_lite.data.library import bytecode; print(bytecode({text!r}))"]
    said = {subprocess.check_output(command, env={**os.environ, "PYTHONHASHSEED": str(seed)}) for seed in range(3)}
    assert len(said) == 1
    one = said.pop().decode()
    assert "0x" not in one and "{'a', 'bc', 'd', (1, 2)}" in one and "('one',)" in one and "<code f>" in one


def test_what_does_not_compile_has_no_bytecode():
    assert library.bytecode("print 'old'\n") == library.bytecode("\0") == ""


# ------------------------------------------------------------------------------------------------------------ tables


def test_tables_say_what_the_characters_are():
    modules = {"encodings/cp1251.py": "charmap_decode", "encodings/utf_8.py": "", "html/entities.py": ""}
    tables = {name: text for name, text, _ in library.domains(modules)["tables"]}
    assert "tables/encodings/utf_8.txt" not in tables
    page = [row.split(";") for row in tables.pop("tables/encodings/cp1251.txt").splitlines()]
    assert len(page) == 255  # one byte has no meaning there
    assert all(bytes.fromhex(byte).decode("cp1251") == chr(int(point, 16)) for byte, point, _ in page)
    assert "\neacute;00E9;LATIN SMALL LETTER E WITH ACUTE\n" in tables.pop("tables/html/entities.txt")
    rows = [row.split(";") for text in tables.values() for row in text.splitlines()]
    assert len({row[0] for row in rows}) == len(rows) > 20_000
    assert all(unicodedata.lookup(row[1]) == chr(int(row[0], 16)) for row in rows[::7])
    assert ["00E9", "LATIN SMALL LETTER E WITH ACUTE", "Ll", "0", "L", "0065 0301", "00C9", "00E9"] in rows


# --------------------------------------------------------------------------------------------------------- the corpus


def test_a_program_is_there_in_one_form_and_a_module_on_one_side():
    names = [f"package/module_{i}.py" for i in range(200)]
    texts = library.domains({name: f"# about {name}\nx = {name!r}\n" for name in names})
    made = {domain: list(texts[domain]) for domain in ("code", "prose", "bytecode")}
    keys = {domain: [key for *_, key in documents] for domain, documents in made.items()}
    assert sorted(keys["code"] + keys["bytecode"]) == sorted(keys["prose"]) == sorted(names)
    assert len(keys["bytecode"]) / 200 == pytest.approx(library.BYTECODE_SHARE, abs=0.09)
    assert all(name.rpartition(".")[0] + ".py" == f"{d}/{key}" for d in keys for name, _, key in made[d])
    held_out = {name for name in names if split_position(Document("", "", name)) < 0.5}  # in code and bytecode alike
    for domain in ("code", "bytecode"):
        assert len(held_out & set(keys[domain])) / len(keys[domain]) == pytest.approx(0.5, abs=0.2)


def test_the_first_documents_are_shared_out_among_the_domains():
    config = CorpusConfig(source="domains", max_documents=22)
    found = list(documents(config))
    assert found == list(documents(config)) and len(found) == expected(config) == 22
    counts = [(domain, len(list(group))) for domain, group in groupby(domain_of(config, d.name) for d in found)]
    assert counts == [("code", 6), ("prose", 6), ("bytecode", 6), ("tables", 4)]
    assert len({d.text for d in found}) == 22
    assert all(d.name.endswith(".py") == d.name.startswith("code/") for d in found)  # what kinds.py reads as Python


def test_the_domain_is_the_first_folder_where_folders_are_domains():
    files, domains = CorpusConfig(source="files", path="x"), CorpusConfig(source="domains")
    for config in (files, domains):
        assert domain_of(config, "law/eu/a.txt") == "law" and domain_of(config, "law/rows.jsonl:3") == "law"
        assert domain_of(config, "a.txt") is None
    assert domain_of(CorpusConfig(), "json/decoder.py") is None
    assert domain_of(CorpusConfig(source="hf", dataset="org/set"), "org/set:7") is None
