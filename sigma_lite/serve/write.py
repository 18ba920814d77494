"""What `generate` and `chat` print: text on standard output as it comes, and how fast it came on standard error."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sigma_lite.config import require
from sigma_lite.data.chat import marks
from sigma_lite.data.tokenizer import special_tokens
from sigma_lite.serve.generate import Continuation, Sampling, generate, stream
from sigma_lite.serve.trained import Trained, plain_prompt, seeded


def write(trained: Trained, prompts: Sequence[str], options: Namespace) -> None:
    """Continue the prompts: one as it comes, several together, each under a head with its number and seed.

    Raises: ConfigError for options that cannot work, before anything is written.
    """
    require(options.samples >= 1, f"samples={options.samples}: must be at least 1")
    texts = [plain_prompt(prompt) for prompt in prompts for _ in range(options.samples)]
    ids = [trained.prompt_ids(text) for text in texts]
    stop, sampling = stop_ids(trained, options.stop), _sampling(options)
    seeds = [options.seed + number for number in range(len(texts))]
    for seed in seeds:
        seeded(seed)  # refuses what is no seed
    require(options.max_new_tokens >= 0, f"max_new_tokens={options.max_new_tokens}: must be 0 or more")
    settings = {"max_new_tokens": options.max_new_tokens, "sampling": sampling, "stop": stop}
    begun = time.monotonic()
    if len(texts) == 1 and not options.experts:
        print(texts[0], end="", flush=True)
        _facts(trained, begun, [len(ids[0])], [len(_say(trained, ids[0], seeds[0], settings))])
        return
    found = generate(trained.model, ids, seeds=seeds, experts=options.experts, **settings)
    for number, (text, continuation) in enumerate(zip(texts, found, strict=True)):
        if len(texts) > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} of {len(texts)}, seed {seeds[number]}")
        print(text + "".join(trained.texts(continuation.tokens)))
        if options.experts:
            print(expert_table(trained, [*ids[number], *continuation.tokens], continuation))
    _facts(trained, begun, [len(own) for own in ids], [len(own.tokens) for own in found])


def chat(trained: Trained, options: Namespace) -> None:
    """Answer line by line, with all that was said before. Raises ConfigError where the tokenizer lacks the marks."""
    frame = marks(trained.tokenizer, trained.end_of_text)
    settings = {"max_new_tokens": options.max_new_tokens, "sampling": _sampling(options)}
    settings["stop"] = {*stop_ids(trained, options.stop), frame.end, frame.user}
    turns: list[tuple[list[int], list[int] | None]] = []
    for number, line in enumerate(_asked()):
        said = plain_prompt(line.rstrip("\n"))
        if not said:
            return
        ids, begun = frame.prompt([*turns, (trained.ids(said), None)]), time.monotonic()
        answer = _say(trained, ids, options.seed + number, settings)
        _facts(trained, begun, [len(ids)], [len(answer)])
        turns.append((trained.ids(said), answer))


def stop_ids(trained: Trained, names: Sequence[str]) -> set[int]:
    """The end of a document and the tokens named. Raises ConfigError for a text that is not one token."""
    special = {name: i for i, name in special_tokens(trained.tokenizer).items()}
    found = {trained.end_of_text}
    for name in names:
        ids = [special[name]] if name in special else trained.ids(name)
        require(len(ids) == 1, f"--stop {name!r} is {len(ids)} tokens of this tokenizer: name one, such as {min(special)!r}")
        found |= set(ids)
    return found


def expert_table(trained: Trained, ids: Sequence[int], continuation: Continuation) -> str:
    """A line a token that the model read: its text, and its experts in each layer, best first."""
    experts = continuation.experts
    lines = ["token            " + " ".join(f"{f'layer {layer}':>9}" for layer in range(len(experts)))]
    for place in range(len(experts[0]) if experts else 0):
        text = "".join(trained.texts(ids[place : place + 1])) or trained.tokenizer.id_to_token(ids[place])
        lines.append(f"{text!r:<16} " + " ".join(f"{_numbers(ids_TK[place]):>9}" for ids_TK in experts))
    return "\n".join(lines)


def _numbers(chosen_K: Tensor) -> str:
    return ",".join(str(e) for e in chosen_K.tolist() if e >= 0) or "none"


def _sampling(options: Namespace) -> Sampling:
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p)


def _say(trained: Trained, ids: list[int], seed: int, settings: dict) -> list[int]:
    """Print a continuation as it comes, and return its tokens."""
    tokens: list[int] = []

    def kept() -> Iterator[int]:
        for step in stream(trained.model, torch.tensor([ids]), generators=[seeded(seed)], **settings):
            if step.tokens[0] not in settings["stop"]:
                tokens.append(step.tokens[0])
                yield step.tokens[0]

    for piece in trained.texts(kept()):
        print(piece, end="", flush=True)
    print(flush=True)
    return tokens


def _asked() -> Iterator[str]:
    """Lines of standard input; a person sees where to type."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _facts(trained: Trained, begun: float, read: Sequence[int], written: Sequence[int]) -> None:
    seconds = max(time.monotonic() - begun, 1e-9)
    print(
        f"generate      {sum(written)} tokens after {sum(read)} of the prompt, {seconds:.2f} s,"
        f" {sum(written) / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )
    longest = max((r + w for r, w in zip(read, written, strict=True)), default=0)
    if longest > trained.length:
        print(
            f"sigma-lite: {longest} positions, and it was trained on rows of {trained.length}: from there on it attends over"
            " distances that it never saw, and its text gets worse (net.rope_type extends a model)",
            file=sys.stderr,
        )
