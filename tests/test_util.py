"""What all command lines share."""

import json

import numpy as np
import pytest
import torch

from util import plain, write_json, write_text


def test_json_has_no_numbers_that_are_not_finite(tmp_path, capsys):
    inf = float("inf")
    content = {"a": float("nan"), "b": [1.5, inf], "c": torch.tensor([1.0, -inf]), "d": np.float64(2)}
    write_json("-", content)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [1.0, None], "d": 2.0}
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == plain(content)


def test_files_are_written_whole_and_in_utf_8(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    write_text(path, "± \udc80\n")  # a lone surrogate, as in a file name that is no UTF-8
    assert path.read_bytes() == "± \\udc80\n".encode() and list(tmp_path.iterdir()) == [path]

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="space"):
        write_text(path, "half")
    assert path.read_text(encoding="utf-8").startswith("±")
