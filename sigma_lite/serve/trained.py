"""A finished (or half-finished) run, ready to write."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

import torch

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.checkpoint import model_weights, newest_whole, read_settings, step_of
from sigma_lite.config import ModelConfig, SparsityConfig
from sigma_lite.data.shards import load
from sigma_lite.data.tokenizer import END_OF_TEXT_ID, token_strings
from sigma_lite.model import Transformer
from sigma_lite.runfile import from_mapping
from sigma_lite.serve.generate import sample
from sigma_lite.storage import StorageError


class Trained:
    """Model and tokenizer of a run's newest checkpoint that is whole.

    Args:
        run: folder of the run.
        data: folder of the prepared data; default: where the run's own data was.

    Raises: StorageError when there is no checkpoint, or no tokenizer that fits it.
    """

    def __init__(self, run: str | Path, data: str | Path | None = None):
        path = newest_whole(run)
        if path is None:
            raise StorageError(f"{run} holds no checkpoint: give the folder of a run that was trained, such as runs/toy")
        settings = read_settings(path)
        net = from_mapping(ModelConfig, settings["net"], "net")
        sparsity = from_mapping(SparsityConfig, settings["sparsity"], "sparsity")
        self.step = step_of(path)
        self.model = Transformer(net).eval()
        self.model.load_state_dict(model_weights(path))
        self.model.set_k(
            k_per_layer(
                self.step, switch_step=sparsity.switch_step, n_layers=net.n_layers, head=sparsity.head, target=net.top_k
            )
        )
        prepared = load(data or settings["corpus"]["dir"])
        if prepared.vocab_size != net.vocab_size:
            raise StorageError(
                f"the tokenizer in {prepared.dir} has {prepared.vocab_size} tokens, the model {net.vocab_size}: give --data"
                " with the data that this run was trained on"
            )
        self.tokenizer = prepared.tokenizer

    def continue_text(
        self, prompt: str, max_new_tokens: int, *, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
    ) -> Iterator[str]:
        """The continuation piece by piece; a character whose bytes span tokens comes out whole."""
        ids = [END_OF_TEXT_ID, *self.tokenizer.encode(prompt).ids]
        generator = torch.Generator().manual_seed(seed)
        options = {"temperature": temperature, "top_p": top_p, "stop_id": END_OF_TEXT_ID, "generator": generator}
        return self._text(sample(self.model, torch.tensor(ids), max_new_tokens=max_new_tokens, **options))

    def _text(self, tokens: Iterator[int]) -> Iterator[str]:
        bytes_of, decoder = token_strings(self.tokenizer), codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes_of[token])
        yield decoder.decode(b"", final=True)
