"""A tokenizer that somebody else has made: found, and tried before a corpus is cut with it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from sigma_lite.config import ConfigError, nearest, require
from sigma_lite.data.tokenizer import FILE, n_ids, token_strings
from sigma_lite.data.unpack import optional
from sigma_lite.storage import model_folder

PROBE = "Two  words,\n\tthen 12345 == x\r\n'It\u2019s' caf\u00e9, \u4f60\u597d, \U0001f642 \x00\x7f end  "


def existing(name: str) -> bytes:
    """The content of a tokenizer.json: `name` is that file, a folder that holds it, or a name on the hub ("org/name").

    "reference" is that of the model which comes with this package.
    Of the hub only that one file is fetched (through huggingface_hub, which keeps it), and no code of it is run.
    Raises ConfigError, naming the nearest file where there is one of that name.
    """
    path = model_folder(name)
    if path.is_dir():
        fix = "save it there with the `save_pretrained` of a fast tokenizer"
        require((path / FILE).is_file(), f"data.corpus.tokenizer={name!r} is a folder without {FILE}: {fix}")
        path = path / FILE
    if path.is_file():
        return path.read_bytes()
    beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(name, beside) if beside else "its folder does not exist"
    missing = f"data.corpus.tokenizer={name!r} is no file or folder here ({hint[:300]})"
    on_hub = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith(".json")
    require(on_hub, missing)
    hub = optional("huggingface_hub", "a tokenizer by its name on the hub", "huggingface_hub")
    try:
        return Path(hub.hf_hub_download(name, FILE)).read_bytes()
    except Exception as error:  # no such name, no such file, no network: each has a class of its own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{missing}, and the hub did not give it: {reason}") from error


def require_usable(found: Tokenizer, name: str, vocab_size: int) -> None:
    """Try a tokenizer on a text. `name` is what the settings call it.

    Raises ConfigError where its tokens do not stand for the bytes of the text, as bits per byte need, or where the model's
    vocabulary is too small for its ids.
    """
    size = n_ids(found)
    require(size <= vocab_size, f"data.corpus.tokenizer={name!r} has ids up to {size - 1}: set model.net.vocab_size={size}")
    words = token_strings(found)
    kept = b"".join(words[token] for token in found.encode(PROBE).ids)
    require(
        kept == PROBE.encode(),
        f"data.corpus.tokenizer={name!r} does not keep every byte of a text (it made {kept[:40]!r} of {PROBE[:20]!r}):"
        " choose a byte-level one without a prefix space, as GPT-2, Llama 3, Qwen or OLMo have",
    )


def normal(tokenizer: Tokenizer, text: str) -> str:
    """The text whose bytes its tokens stand for: some tokenizers first join letters and accents (NFC)."""
    return text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
