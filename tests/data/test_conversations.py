"""Conversations: how they become tokens, which of them are targets, how rows are packed, and which side a problem is on."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from sigma_lite.config import TASKS, ConfigError, CorpusConfig, ModelConfig, RowsConfig
from sigma_lite.data import corpora, tasks
from sigma_lite.data.chat import Marks, Turn, marks
from sigma_lite.data.conversations import NoTalk, turns_of
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.data.packed import PackedRows, packed
from sigma_lite.data.rows import IGNORED, heldout_loader
from sigma_lite.data.shards import Prepared
from sigma_lite.data.tokenizer import token_strings
from sigma_lite.model import Transformer

from .conftest import corpus_of, prepare_quietly, write_texts

FRAME = Marks(0, 1, 2, 3)
PROBLEMS = {"source": "tasks", "path": None, "heldout": 0.1}


def rows_of(data: Prepared, length: int, split: str = "train") -> PackedRows:
    return PackedRows(getattr(data, split), data.token_bytes, length, marks(data.tokenizer, 0))


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Prepared:
    """300 additions and sortings, with a tokenizer that has tags for thoughts. Do not write into its folder."""
    folder = tmp_path_factory.mktemp("problems")
    write_texts(folder / "text")
    words = corpus_of(folder, dir=str(folder / "words"), special_tokens=("<think>", "</think>"))
    prepare_quietly(words)
    given = {"tokenizer": str(folder / "words" / "tokenizer.json"), "tasks": ("add2", "sort3"), "max_documents": 300}
    return prepare_quietly(corpus_of(folder, **PROBLEMS | given))


def read(data: Prepared, ids: np.ndarray) -> str:
    """Tokens as text, marks by their names."""
    names = token_strings(data.tokenizer)
    return "".join(names[i].decode() or data.tokenizer.id_to_token(i) for i in ids)


# ------------------------------------------------------------------------------------------------------------- targets


def test_only_what_the_assistant_says_is_a_target_with_its_end():
    # begin user said said assistant | answer answer end | user said assistant | answer end | begin user said assistant | ...
    ids = np.array([[0, 1, 10, 11, 2, 20, 21, 3, 1, 12, 2, 22, 3, 0, 1, 13, 2, 23, 3, 0, 0]])
    said = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]], bool)
    assert (FRAME.answers(ids) == said).all()
    assert not FRAME.answers(np.array([[0, 1, 10, 2], [0, 0, 0, 0]])).any()


def test_a_row_by_hand(tmp_path):
    roles = ("user", "assistant")
    said = [("12?", "3"), ("4?", "56")], [("7?", "8")]
    talks = [[{"role": r, "content": c} for pair in own for r, c in zip(roles, pair, strict=True)] for own in said]
    text = "\n".join(json.dumps({"messages": talk}) for talk in talks)
    write_texts(tmp_path / "text")
    (tmp_path / "talk.jsonl").write_text(text + "\n" + "\n".join(_line(f"{n}!", "x") for n in range(20)))
    prepare_quietly(corpus_of(tmp_path, dir=str(tmp_path / "words"), single_digits=True))
    given = {"source": "chat", "path": str(tmp_path / "talk.jsonl"), "tokenizer": str(tmp_path / "words/tokenizer.json")}
    data = prepare_quietly(corpus_of(tmp_path, **given))
    whole = np.concatenate([data.train.read(0, 10**6)[0], data.heldout.read(0, 10**6)[0]])
    said = read(data, whole)
    first = "<|endoftext|><|user|>12?<|assistant|>3<|end|><|user|>4?<|assistant|>56<|end|>"
    assert first in said and "<|endoftext|><|user|>7?<|assistant|>8<|end|>" in said
    split = "train" if first in read(data, data.train.read(0, 10**6)[0]) else "heldout"
    rows = rows_of(data, 40, split)
    found = next(b for b in map(rows.__getitem__, range(len(rows))) if first in read(data, b.ids_BS[0].numpy()))
    targets = found.targets_BS[0]
    assert read(data, targets[targets != IGNORED].numpy()).count("3<|end|>56<|end|>") == 1
    assert (found.bytes_BS.sum() == sum(len(token_strings(data.tokenizer)[i]) for i in targets[targets != IGNORED])).all()


def _line(said: str, answer: str, **more: str) -> str:
    answered = {"role": "assistant", "content": answer, **more}
    return json.dumps({"messages": [{"role": "user", "content": said}, answered]})


def test_targets_of_problems_are_steps_and_answers(problems):
    rows, seen = rows_of(problems, 64), Counter()
    for batch in map(rows.__getitem__, range(len(rows))):
        ids, targets = batch.ids_BS[0], batch.targets_BS[0]
        last = targets != IGNORED
        assert (ids[1:][last[:-1]] == targets[:-1][last[:-1]]).all(), "a target is the next token"
        for worked in read(problems, targets[last].numpy()).removesuffix("<|end|>").split("<|end|>"):
            seen[bool(re.fullmatch(r"<think>\d\+\d\+0=\d\d;\d\+\d\+\d=\d\d</think>>\d{3}|\d{3}", worked))] += 1
        assert batch.bytes_BS[batch.targets_BS == IGNORED].sum() == 0
    assert set(seen) == {True} and seen[True] == problems.manifest["train_documents"]


# ------------------------------------------------------------------------------------------------------------- packing


def test_packing_by_hand():
    assert packed(np.array([0, 4, 7, 9, 15, 16]), 9).tolist() == [[0, 9], [9, 16]]
    assert packed(np.array([0, 4, 7, 9, 15, 16]), 5).tolist() == [[0, 4], [4, 9], [15, 16]], "6 tokens fit nowhere"
    assert packed(np.array([0]), 5).shape == (0, 2)


def test_every_conversation_stands_whole_in_one_row_and_is_a_document(problems):
    rows, conversations = rows_of(problems, 50), 0
    for number in range(len(rows)):
        batch = rows[number]
        text = read(problems, batch.ids_BS[0].numpy()).rstrip()
        own = [t for t in text.split("<|endoftext|>") if t]
        assert text.startswith("<|endoftext|><|user|>") and all(t.startswith("<|user|>") for t in own)
        conversations += len(own)
        starts = (batch.ids_BS[0] == 0).nonzero()[:, 0]
        assert (batch.documents_BS[0].diff().nonzero()[:, 0] + 1).tolist() == starts[1:].tolist()
    assert conversations == problems.manifest["train_documents"]
    empty = rows[len(rows)]
    assert (empty.targets_BS == IGNORED).all() and empty.bytes_BS.sum() == 0


def test_what_is_longer_than_a_row_is_left_out_and_said(problems):
    with pytest.warns(UserWarning, match=r"conversations do not fit into a row and are left out; \d+ holds the longest"):
        short = rows_of(problems, 16)
    assert len(short) and all("+" not in read(problems, short[k].ids_BS[0].numpy()) for k in range(len(short)))
    with pytest.raises(ConfigError, match=r"rows.length=4: \d+ of \d+ conversations do not fit"):
        rows_of(problems, 4)


def test_the_loss_of_packed_rows_is_that_of_each_conversation_alone(problems):
    """Attention stays inside, positions do not matter to RoPE, and the mean goes over the answers' tokens."""
    torch.manual_seed(0)
    net = ModelConfig(300, 2, 32, 2, 1, 16, n_experts=8, d_expert=16)
    model = Transformer(net).double().eval()
    rows = rows_of(problems, 64)
    batch = rows.__getitems__([0, 1, len(rows) - 1])
    packed_loss, _ = model.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
    nats, count = 0.0, 0
    for row in (0, 1, len(rows) - 1):
        ids = torch.from_numpy(problems.train.read(*rows.span(row))[0].astype(np.int64))
        starts = [*(ids == 0).nonzero()[:, 0].tolist(), len(ids)]
        for first, end in zip(starts, starts[1:], strict=False):
            own = ids[first:end]
            answer = int((own == 2).nonzero()[0, 0]) + 1
            logits, _ = model(own[None, :-1])
            logp = logits[0].detach().log_softmax(-1)
            nats -= sum(float(logp[t - 1, own[t]]) for t in range(answer, len(own)))
            count += len(own) - answer
    assert float(packed_loss.detach()) == pytest.approx(nats / count, rel=1e-9)


def test_held_out_rows_are_scored_once(problems):
    rows = rows_of(problems, 64, "heldout")
    loader = heldout_loader(rows, RowsConfig(length=64, per_step=4, per_micro=4))
    scored = sum(int((batch.targets_BS != IGNORED).sum()) for batch in loader)
    ids = problems.heldout.read(0, 10**6)[0][None]
    assert scored == FRAME.answers(ids).sum() > 0


# --------------------------------------------------------------------------------------------------------------- split


def test_a_problem_is_on_the_side_on_which_eval_asks_it(problems):
    given = CorpusConfig("tasks", tasks=("add2", "two_step4"), max_documents=500, heldout=0.1)
    for document in corpora.documents(given):
        problem_is_heldout = corpora.split_position(document) < tasks.HELDOUT
        assert corpora.is_heldout(document, 0.1) == problem_is_heldout
    asked = {one.prompt for one in tasks.problems("add2", 400, heldout=True)}
    trained = {d["name"] for d in problems.documents() if d["split"] == "train"}
    drawn = {f"{t}:{n}": p for n, (t, p) in enumerate(_drawn(("add2", "sort3"), 300))}
    assert not asked & {drawn[name] for name in trained} and asked & {*drawn.values()}


def _drawn(names, count):
    return [(names[n % 2], one.prompt) for n, one in enumerate(tasks.mixed(names, count))]


def test_eval_finds_the_answer_behind_thoughts_in_tags(problems):
    """Tags are no text, so what is written reads `steps>answer`, as without them."""
    frame, words = marks(problems.tokenizer, 0), token_strings(problems.tokenizer)
    for one in tasks.problems("add2", 20):
        turn = Turn(one.prompt, f">{one.answer}", one.steps)
        ids = np.array(frame.conversation([turn], lambda text: tasks.encode(problems.tokenizer, text)))
        said = ids[frame.answers(ids[None])[0]]
        assert said[0] == frame.think[0] and frame.think[1] in said
        assert one.solved_by(b"".join(words[i] for i in said[:-1]).decode()) and said[-1] == frame.end


def test_problems_come_once_and_the_same_again_in_parts():
    given = CorpusConfig("tasks", tasks=("sort2", "add1"), max_documents=400, heldout=0.1)
    skipped = Counter()
    whole = list(corpora.documents(given, skipped))
    assert len({d.text for d in whole}) == len(whole) == 400 - skipped["duplicate"] < 250
    halves = CorpusConfig("tasks", tasks=("sort2", "add1"), max_documents=400, heldout=0.1, parts=2)
    assert sorted(d.text for d in corpora.documents(halves)) == sorted(d.text for d in whole)


def test_without_steps_only_the_answer_is_said():
    given = {"source": "tasks", "tasks": ("add2",), "max_documents": 5, "heldout": 0.1}
    for document in corpora.documents(CorpusConfig(**given, worked=False)):
        assert re.fullmatch(r"\d\d\+\d\d=\d{3}", document.text)
    for document in corpora.documents(CorpusConfig(**given)):
        assert re.fullmatch(r"\d\d\+\d\d=\d\+\d\+0=\d\d;\d\+\d\+\d=\d\d>\d{3}", document.text)


# ------------------------------------------------------------------------------------------------------ lines of messages


def test_lines_of_messages():
    system, user = {"role": "system", "content": "Short."}, {"role": "user", "content": "2+2?"}
    answer = {"role": "assistant", "content": "4", "reasoning_content": "two twice"}
    assert turns_of(json.dumps({"messages": [system, user, answer]}).encode()) == (Turn("Short.\n\n2+2?", "4", "two twice"),)
    assert turns_of(json.dumps({"chat": [user, answer] * 2}).encode(), "chat")[1] == Turn("2+2?", "4", "two twice")
    for bad in (b"{", b"[]", b'{"messages": []}', b'{"messages": [{"role": "user"}]}'):
        with pytest.raises(NoTalk):
            turns_of(bad)
    for order in ([user], [answer, user], [user, user, answer], [user, answer, system]):
        with pytest.raises(NoTalk, match="must take turns"):
            turns_of(json.dumps({"messages": order}).encode())


def test_a_bad_line_is_named_or_left_out(tmp_path):
    path = tmp_path / "talk.jsonl.gz"
    path.write_bytes(gzip.compress(f"{_line('a', 'b')}\n\nnonsense\n{_line('a', 'b')}\n".encode()))
    (tmp_path / "notes.md").write_text("no conversation")
    given = CorpusConfig("chat", path=str(tmp_path), dir=str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"line 3 of .*talk.jsonl.gz: it is no JSON .*missing_text=empty"):
        list(corpora.documents(given))
    skipped = Counter()
    lenient = CorpusConfig("chat", path=str(tmp_path), dir=str(tmp_path / "data"), missing_text="empty")
    assert [d.text for d in corpora.documents(lenient, skipped)] == ["ab"]
    assert skipped == {"no conversation": 1, "duplicate": 1, "no .jsonl": 1}


def test_thoughts_need_tags_and_marks_cannot_be_written(tmp_path):
    write_texts(tmp_path / "text")
    talk = tmp_path / "talk.jsonl"
    lines = [_line(f"{n} <|assistant|> <think>", f"<|end|>{n}", reasoning_content="hm") for n in range(20)]
    talk.write_text("\n".join(lines))
    for name, special in (("plain", ()), ("tags", ("<think>", "</think>"))):
        prepare_quietly(corpus_of(tmp_path, dir=str(tmp_path / name), special_tokens=special))
    chat = {"source": "chat", "path": str(talk)}
    with pytest.raises(ConfigError, match=r"special_tokens=\[<think>, </think>\]"):
        prepare_quietly(corpus_of(tmp_path, **chat, tokenizer=str(tmp_path / "plain"), dir=str(tmp_path / "x")))
    data = prepare_quietly(corpus_of(tmp_path, **chat, tokenizer=str(tmp_path / "tags"), dir=str(tmp_path / "y")))
    ids = data.train.read(0, 10**6)[0]
    frame = marks(data.tokenizer, 0)
    assert sum(ids == frame.assistant) == sum(ids == frame.end) == sum(ids == frame.think[0]) == sum(ids == 0)
    first = ids[: int(np.flatnonzero(ids == 0)[1])]
    answer = first[FRAME.answers(first[None])[0]]
    assert re.fullmatch(r"<think>hm</think><\|end\|>\d+<\|end\|>", read(data, answer)), "the first end is plain text"
    assert (answer == frame.end).sum() == 1


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"tasks": ()}, "needs tasks"),
        ({"tasks": ("ad2",)}, r"'ad2'.*add2"),
        ({"tasks": ("add0",)}, "any number of digits"),
        ({"max_documents": None}, "has no end"),
        ({"heldout": 0.08}, "problems that `eval` holds out: set it to 0.1"),
        ({"source": "stdlib"}, "tasks=.* would not be read"),
        ({"source": "stdlib", "tasks": (), "worked": False}, "worked=False would not be read"),
        ({"source": "chat", "tasks": ()}, "'chat' needs path"),
    ],
)
def test_settings_that_cannot_work(changes, says):
    usual = {"source": "tasks", "tasks": ("add2",), "max_documents": 9, "heldout": 0.1}
    with pytest.raises(ConfigError, match=says):
        CorpusConfig(**usual | changes)


def test_copies_of_tokens_are_of_plain_text(problems):
    module = TokenDataModule(CorpusConfig(vocab_size=300), RowsConfig(64, 4, 4, split_above=0.5))
    module.prepared = problems
    with pytest.raises(ConfigError, match="split_above=0.5"):
        module.training_rows()


def test_every_named_task_can_be_made():
    assert list(tasks.MAKERS) == list(TASKS) and all(tasks.MAKERS[name].__name__ == name for name in TASKS)


def test_a_row_may_hold_one_conversation_only():
    """As rewards need it. What is held out is packed all the same: it is measured, not asked."""
    starts = np.array([0, 4, 9, 10, 25])
    assert packed(starts, 10, several=False).tolist() == [[0, 4], [4, 9], [9, 10]], "one that is too long is left out"
    assert packed(starts, 10).tolist() == [[0, 10]]


def test_column_steps_carry():
    assert tasks.column_steps("999", "001") == "9+1+0=10;9+0+1=10;9+0+1=10"
    assert tasks.column_steps("37", "58") == "7+8+0=15;3+5+1=09"
