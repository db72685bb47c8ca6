"""Files of weights: in shards, of torch.save, nested as trainings write them, and damaged."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from companion.core.errors import BadParameter
from companion.core.reading import read_weights
from companion.core.theta import snapshot


@pytest.fixture
def theta() -> dict[str, Tensor]:
    return snapshot(nn.Linear(3, 2))


def same(source: Path | str, theta: dict[str, Tensor]) -> tuple[str, ...]:
    found = read_weights(str(source))
    assert {k: v.tolist() for k, v in found.tensors.items()} == {
        k: v.tolist() for k, v in theta.items()
    }
    assert len(found.sha256) == 64
    return found.about


def test_one_safetensors_file_and_the_folder_it_is_in(tmp_path, theta):
    save_file(theta, tmp_path / "any.safetensors")
    assert same(tmp_path / "any.safetensors", theta) == ()
    assert same(tmp_path, theta) == ()


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(tmp_path, theta, ending):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    where = {}
    for i, (name, value) in enumerate(theta.items()):
        where[name] = f"{stem}-{i}.{ending}"
        (save_file if ending == "safetensors" else torch.save)(
            {name: value}, tmp_path / where[name]
        )
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert same(index, theta) == same(tmp_path, theta) == ("2 shards",)
    (tmp_path / where["bias"]).unlink()
    with pytest.raises(BadParameter, match=where["bias"]):
        read_weights(str(index))
    index.write_text("{}")
    with pytest.raises(BadParameter, match="weight_map"):
        read_weights(str(index))


def test_torch_save_nested_as_trainings_write_it(tmp_path, theta):
    file = tmp_path / "x.pth"
    other = {k: v + 1 for k, v in theta.items()}
    for value, about in (
        (theta, ()),
        ({"state_dict": theta, "epoch": 3}, ("its weights are under state_dict",)),
        ({"model": {"state_dict": theta}, "best": torch.ones(1)}, ("… model.state_dict",)),
    ):
        torch.save(value, file)
        assert [text[-10:] for text in same(file, theta)] == [text[-10:] for text in about]
    torch.save(theta, file, _use_new_zipfile_serialization=False)
    same(file, theta)
    torch.save({"model": theta, "ema": other, "optimizer": {"state": {}}}, file)
    assert "there is also ema" in same(file, theta)[1]
    same(f"{file}#ema", other)
    with pytest.raises(BadParameter, match="no 'teacher' in it; it has: model, ema, optimizer"):
        read_weights(f"{file}#teacher")


class Harmful:
    """A pickle of it runs a command."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (self.touched,)


def test_what_trainings_keep_beside_weights_does_not_matter(tmp_path, theta):
    file = tmp_path / "x.ckpt"
    beside = {
        "best": np.float64(93.2),
        "epoch": np.int64(3),
        "history": np.arange(3.0),
        "draws": np.random.get_state(),
        "args": argparse.Namespace(lr=0.1, out=tmp_path),
        "when": datetime.datetime(2026, 1, 1),
    }
    for zipped in (True, False):
        torch.save({"state_dict": theta, **beside}, file, _use_new_zipfile_serialization=zipped)
        same(file, theta)
    touched = tmp_path / "touched"
    torch.save({"state_dict": theta, "args": argparse.Namespace(a=Harmful(touched))}, file)
    with pytest.raises(BadParameter, match="holds more than weights"):
        read_weights(str(file))
    assert not touched.exists()


def test_arrays_of_numpy_and_wrong_endings(tmp_path, theta):
    file = tmp_path / "x.safetensors"
    torch.save({k: v.numpy() for k, v in theta.items()}, file)
    same(file, theta)


def test_nothing_but_weights_is_read_and_the_message_says_what_to_do(tmp_path, theta):
    file = tmp_path / "x.ckpt"
    for value, says in (
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"state_dict": theta, "optimizer": torch.optim.SGD([theta["bias"]])}, "torch.optim.sgd"),
        ({"state_dict": theta, "x": collections.defaultdict(int, a=1)}, "collections.defaultdict"),
        ({"model": {}}, "no weights are found"),
        ([1, 2], "it holds a list"),
        ({"epoch": 3}, "a mapping with epoch"),
    ):
        torch.save(value, file)
        with pytest.raises(BadParameter, match=says):
            read_weights(str(file))
    for begin, says in (
        (file.read_bytes()[:200], "damaged or cut short"),
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ):
        file.write_bytes(begin)
        with pytest.raises(BadParameter, match=says):
            read_weights(str(file))
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(BadParameter, match=r"none of torch.save; it holds a.npy"):
        read_weights(str(tmp_path / "x.npz"))
    round_and_round: dict[str, Any] = {}
    round_and_round["model"] = round_and_round
    torch.save(round_and_round, file)
    with pytest.raises(BadParameter, match="no weights are found"):
        read_weights(str(file))
    save_file(theta, tmp_path / "x.safetensors")
    with pytest.raises(BadParameter, match="has no keys such as 'ema'"):
        read_weights(str(tmp_path / "x.safetensors#ema"))
    file.write_bytes(b"hello")
    with pytest.raises(BadParameter, match="not a safetensors file"):
        read_weights(str(file))
    with pytest.raises(BadParameter, match="no such file"):
        read_weights(str(tmp_path / "nowhere.pth"))
    with pytest.raises(BadParameter, match="no file of weights"):
        (tmp_path / "empty").mkdir()
        read_weights(str(tmp_path / "empty"))
    for name in "ab":
        save_file(theta, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(BadParameter, match="2 files of weights"):
        read_weights(str(tmp_path / "empty"))
