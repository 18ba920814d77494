"""A finished (or half-finished) run, ready to write."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.checkpoint import newest_whole, read_checkpoint, read_plain, read_settings, step_of
from sigma_lite.config import ConfigError, ModelConfig, RowsConfig, SparsityConfig, require
from sigma_lite.data import tokenizer
from sigma_lite.data.tokenizer import token_strings
from sigma_lite.identity import in_words
from sigma_lite.model import Parts, Transformer
from sigma_lite.runfile import from_mapping
from sigma_lite.serve.generate import sample
from sigma_lite.serve.weights import offload
from sigma_lite.storage import StorageError


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
    """Model and tokenizer of a run's newest checkpoint that is whole.

    Args:
        run: folder of the run.
        data: a folder with another tokenizer.json, such as that of the prepared data; default: the run's own.
        parts: those of the run, where it has its own: a checkpoint holds their names and weights, not their code.
        resident: experts of each layer that are in memory; the others stay in the checkpoint, which is mapped, and are read
            when a token needs them (serve/weights.py; `offloaded` says what it cost). None: all of them are in memory.

    Raises: StorageError when there is no checkpoint, or no tokenizer that fits it.
    """

    def __init__(
        self,
        run: str | Path,
        data: str | Path | None = None,
        parts: Parts | None = None,
        resident: int | None = None,
    ):
        path = newest_whole(run)
        if path is None:
            raise StorageError(f"{run} holds no checkpoint: give the folder of a run that was trained, such as runs/toy")
        settings = read_settings(path)
        net = from_mapping(ModelConfig, settings["net"], "net")
        sparsity = from_mapping(SparsityConfig, settings["sparsity"], "sparsity")
        self.step = step_of(path)
        own = sorted(name for name in settings if name.startswith("parts."))
        wanted = ", ".join(f"{name}={in_words(settings[name])}" for name in own)
        require(parts is not None or not own, f"{run} has {wanted}: give it, Trained(run, parts=Parts(...))")
        self.length: int = settings.get("rows", {}).get("length", RowsConfig.length)  # positions of a training row
        with contextlib.nullcontext() if resident is None else torch.device("meta"):
            self.model = Transformer(net, parts or Parts()).eval()
        if resident is None:
            checkpoint, self.offloaded = read_checkpoint(path), None
            self.model.load_state_dict(model_weights(checkpoint))
        else:
            checkpoint, self.offloaded = read_plain(path), offload(self.model, path, resident=resident)
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

    def continue_text(
        self, prompt: str, max_new_tokens: int, *, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
    ) -> Iterator[str]:
        """The continuation piece by piece; a character whose bytes span tokens comes out whole.

        Raises: ConfigError for a prompt or an option that cannot work, and for a model whose numbers are not finite.
        """
        ids = [self.end_of_text, *self.tokenizer.encode(plain_prompt(prompt), add_special_tokens=False).ids]
        require(-(2**63) <= seed < 2**64, f"seed={seed}: must fit in 64 bits")
        generator = torch.Generator().manual_seed(seed)
        options = {"temperature": temperature, "top_p": top_p, "stop_id": self.end_of_text, "generator": generator}
        return self._text(sample(self.model, torch.tensor(ids), max_new_tokens=max_new_tokens, **options))

    def _text(self, tokens: Iterator[int]) -> Iterator[str]:
        bytes_of, decoder = token_strings(self.tokenizer), codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes_of[token])
        yield decoder.decode(b"", final=True)


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's own state_dict: names as in `Transformer.state_dict()`."""
    return {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
