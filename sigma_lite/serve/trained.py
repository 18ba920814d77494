"""A finished (or half-finished) run, ready to write."""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.checkpoint import newest_whole, read_checkpoint, read_plain
from sigma_lite.config import ConfigError, ModelConfig, RowsConfig, SparsityConfig, require
from sigma_lite.data import tokenizer
from sigma_lite.data.tokenizer import token_strings
from sigma_lite.identity import difference, identify, in_words
from sigma_lite.model import Parts, Transformer
from sigma_lite.model.parts import as_parts
from sigma_lite.runfile import from_mapping
from sigma_lite.serve.generate import sample
from sigma_lite.serve.weights import offload
from sigma_lite.storage import StorageError, model_folder


def plain_prompt(given: str) -> str:
    """A prompt as text. An argument that the terminal's encoding could not read may still be UTF-8.

    Raises ConfigError naming the first byte that is not.
    """
    try:
        return given.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        wrong, place = f"byte 0x{error.object[error.start]:02x}", error.start
    except UnicodeEncodeError as error:  # half a surrogate pair
        wrong, place = f"{given[error.start]!a}", error.start
    raise ConfigError(f"the prompt is not UTF-8 ({wrong} at place {place}): set the terminal to UTF-8, or write it in ASCII")


def end_of_text(words: Tokenizer, name: str | None = None, otherwise: int | None = None) -> int:
    """Id of the token between documents: by name, or else the one that an imported model ends with.

    Raises: ConfigError where the tokenizer has none and no import said one.
    """
    try:
        return tokenizer.end_of_text(words, name)
    except ConfigError:
        if otherwise is None:
            raise
        return otherwise


class Trained:
    """Model and tokenizer of a run's newest checkpoint that is whole, or of a folder in Hugging Face's format.

    Args:
        run: folder of the run, or of Qwen3-MoE or Qwen3 weights; or "reference", the model that comes with this package.
            The text that it was trained on is not needed.
        data: a folder with another tokenizer.json, such as that of the prepared data; default: the run's own.
        parts: those of the run, where it has its own: a checkpoint holds their names and weights, not their code. Those of
            this package are found by their names.
        own_code: find all others by their names too, and run their code. Only for a run of your own.
        resident: experts of each layer that are in memory; the others stay in the checkpoint, which is mapped, and are read
            when a token needs them (serve/weights.py; `offloaded` says what it cost). None: all of them are in memory.

    Raises: StorageError when there is no checkpoint, or no tokenizer that fits it.
    """

    def __init__(
        self,
        run: str | Path,
        data: str | Path | None = None,
        parts: Parts | None = None,
        own_code: bool = False,
        resident: int | None = None,
    ):
        run = model_folder(run)
        path = newest_whole(run)
        without = f"{run} holds no checkpoint in which experts could stay: `sigma-lite import` makes one of other weights"
        require(resident is None or path is not None, without)
        checkpoint = _checkpoint(run, path) if resident is None else read_plain(path)
        settings = json.loads(checkpoint["settings"])
        net = from_mapping(ModelConfig, settings["net"], "net")
        sparsity = from_mapping(SparsityConfig, settings["sparsity"], "sparsity")
        self.step: int = checkpoint["global_step"] or settings.get("imported", {}).get("step", 0)  # that weights have seen
        self.settings = settings
        self.length: int = settings.get("rows", {}).get("length", RowsConfig.length)  # positions of a training row
        with contextlib.nullcontext() if resident is None else torch.device("meta"):
            self.model = Transformer(net, parts or _known_parts(settings, run, own_code)).eval()
        self.offloaded = None if resident is None else offload(self.model, path, resident=resident)
        if resident is None:
            self.model.load_state_dict(model_weights(checkpoint))
        self.model.set_k(
            k_per_layer(
                self.step, switch_step=sparsity.switch_step, n_layers=net.n_layers, head=sparsity.head, target=net.top_k
            )
        )
        corpus, imported = settings.get("corpus", {}), settings.get("imported", {})
        beside = [corpus["dir"]] if "dir" in corpus else []  # runs used to leave it with their data; an import has none
        trained_with = checkpoint.get("TokenDataModule", {}).get("tokenizer sha256")
        self.tokenizer = tokenizer.of_run([data] if data else [run, *beside], net.vocab_size, trained_with)
        self.end_of_text = end_of_text(self.tokenizer, corpus.get("end_of_text"), imported.get("eos"))

    def ids(self, text: str) -> list[int]:
        """Tokens of a text; one that spells out a mark stays text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, prompt: str) -> list[int]:
        """Tokens of a document that begins like this. Raises ConfigError for what is not UTF-8."""
        return [self.end_of_text, *self.ids(plain_prompt(prompt))]

    def continue_text(self, prompt: str, max_new_tokens: int, *, seed: int = 0, **options: Any) -> Iterator[str]:
        """The continuation piece by piece, up to the end of the document; options are those of `generate.sample`.

        Raises: ConfigError for a prompt or an option that cannot work, and for a model whose numbers are not finite.
        """
        ids, options = torch.tensor(self.prompt_ids(prompt)), {"stop_id": self.end_of_text, **options}
        return self.texts(sample(self.model, ids, max_new_tokens=max_new_tokens, generator=seeded(seed), **options))

    def texts(self, tokens: Iterable[int]) -> Iterator[str]:
        """Their text piece by piece; a character whose bytes span tokens comes out whole."""
        bytes_of, decoder = self.bytes_of, codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes_of[token] if token < len(bytes_of) else b"")
        yield decoder.decode(b"", final=True)

    @functools.cached_property
    def bytes_of(self) -> list[bytes]:
        """What each token stands for, by id. Of all tokens, which takes milliseconds: pages ask for thousands of pieces."""
        return token_strings(self.tokenizer)


load = Trained  # as chapters write it: load("reference")


def seeded(seed: int) -> torch.Generator:
    """Raises ConfigError for a seed that torch cannot take."""
    require(-(2**63) <= seed < 2**64, f"seed={seed}: must fit in 64 bits")
    return torch.Generator().manual_seed(seed)


def _checkpoint(run: str | Path, path: Path | None) -> dict[str, Any]:
    if path is not None:
        return read_checkpoint(path)
    if Path(run, "config.json").is_file():
        from sigma_lite.serve.imports import as_checkpoint  # which knows exports, which are made of this

        return as_checkpoint(run)[1]
    raise StorageError(f"{run} holds no checkpoint: give the folder of a run that was trained, such as runs/toy")


def _known_parts(settings: Mapping[str, Any], run: str | Path, own_code: bool) -> Parts:
    """Those that the settings name, if they are this package's: other code is not run because a file names it."""
    own = {name.removeprefix("parts."): value for name, value in settings.items() if name.startswith("parts.")}
    wanted = ", ".join(f"parts.{name}={in_words(value)}" for name, value in sorted(own.items()))
    ours = all(isinstance(value, dict) and value["class"].startswith("sigma_lite.") for value in own.values())
    fix = "give it, Trained(run, parts=Parts(...)), or --own-parts"
    require(ours or own_code, f"{run} has {wanted}: {fix}")
    parts = as_parts({name: {"class_path": value["class"], "init_args": value["settings"]} for name, value in own.items()})
    for name, value in own.items():
        other = difference(value, identify(getattr(parts, name)), f"parts.{name}")
        require(not other, f"{run} was trained with other code: {other}; {fix}")
    return parts


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's own state_dict: names as in `Transformer.state_dict()`."""
    return {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
