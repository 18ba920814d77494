"""Checkpoints: everything comes back as it was, and nothing that was cut or altered comes back at all."""

from __future__ import annotations

import random

import pytest
import torch

from sigma_lite.checkpoint import checkpoints, newest_checkpoint, read_checkpoint, read_settings, write_checkpoint
from sigma_lite.storage import StorageError

CONTENT = {
    "state_dict": {
        "a": torch.arange(6.0).view(2, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
    },
    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": ({"betas": (0.9, 0.95)},)}],
    "plain": [None, True, 1, 2.5, float("inf"), "text", {"tensor": "not one"}, {("a", 1): -1}],
    "settings": '{"net": {"d_model": 32}}',
}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_round_trip(tmp_path):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, CONTENT)
    assert equal(read_checkpoint(path), CONTENT)
    assert read_settings(path) == {"net": {"d_model": 32}}


def test_tied_and_strided_tensors(tmp_path):
    weight = torch.randn(4, 6)
    write_checkpoint(tmp_path / "c", {"a": weight, "b": weight, "c": weight.T, "d": weight[:, ::2]})
    back = read_checkpoint(tmp_path / "c")
    assert equal(back, {"a": weight, "b": weight, "c": weight.T, "d": weight[:, ::2]})


def test_objects_are_refused(tmp_path):
    with pytest.raises(TypeError, match="x/0 is a set"):
        write_checkpoint(tmp_path / "c", {"x": [set()]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [({"a/b": 1.0, "a": {"b": 2.0}}), ({1: 1.0, "1": 2.0})])
def test_two_tensors_of_one_name_are_refused(tmp_path, keys):
    """One would be written and read back twice."""
    tensors = {k: {"b": torch.tensor(v["b"])} if isinstance(v, dict) else torch.tensor(v) for k, v in keys.items()}
    with pytest.raises(TypeError, match="two checkpoint entries are called"):
        write_checkpoint(tmp_path / "c", tensors)
    assert not list(tmp_path.iterdir())


def test_no_damage_goes_unseen(tmp_path):
    """A flipped bit or a cut anywhere: refused with one sentence, never another content and never another error."""
    path, chance = tmp_path / "step=000001.safetensors", random.Random(0)
    write_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    for _ in range(400):
        content = bytearray(whole)
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(whole))]
        else:
            content[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        for read in (read_checkpoint, read_settings):
            try:
                found = read(path)
            except StorageError as error:
                assert "cut or altered" in str(error)
            else:
                assert read is read_settings or equal(found, CONTENT)


def test_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None and checkpoints(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    for name in ("step=000099", "step=000100", "step=1000000", "step=last", "other"):
        (tmp_path / "checkpoints" / f"{name}.safetensors").touch()
    (tmp_path / "checkpoints" / "step=9999999.safetensors.partial").touch()
    assert newest_checkpoint(tmp_path).name == "step=1000000.safetensors"
    assert len(checkpoints(tmp_path)) == 3
