"""An exported run: read back, and by the libraries that its files are for."""

import pytest
import torch
from conftest import call

from data import ByteTokenizer
from run import load_run
from tasks.export import byte_tokenizer
from util import BadInput


@pytest.mark.parametrize("flags, data", [("vl --mask 0.15,0.3", None), ("ar --streams 2", "shapes")])
def test_a_run_comes_back(trained, tmp_path, flags, data):
    load_file = pytest.importorskip("safetensors.torch").load_file
    run, out = load_run(trained(flags, data=data)), tmp_path / "mine"
    call(f"evaluate.py export {trained(flags, data=data)} --out {out}")
    again, weights = load_run(out), load_file(out / "model.safetensors")
    assert again.objective == run.objective and again.path == run.path and again.step == run.step == 20
    assert (again.settings.data, again.settings.lr) == (run.settings.data, run.settings.lr)
    for name, x in run.model.state_dict().items():
        assert torch.equal(x, again.model.state_dict()[name]) and torch.equal(x, weights[name])
    card = (out / "README.md").read_text()
    assert "20, batches of 8" in card and ("perplexity, padded" in card) == (data is None)
    with pytest.raises(BadInput, match="exists"):
        call(f"evaluate.py export {trained(flags, data=data)} --out {out}")


def test_a_run_whose_text_is_gone_is_exported(tmp_path, capsys):
    pytest.importorskip("safetensors")
    text, run, out = tmp_path / "text.txt", tmp_path / "run", tmp_path / "mine"
    text.write_text("a few words. " * 100)
    call(f"train.py --data {text} --length 16 --steps 2 --batch-size 2 --no-report --device cpu --out {run}")
    text.unlink()
    call(f"evaluate.py export {run} --out {out}")
    assert "perplexity" not in (out / "README.md").read_text() and (out / "model.safetensors").exists()
    assert "no perplexity: " in capsys.readouterr().err


def test_bytes_have_a_tokenizer_json_of_the_library():
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_str(byte_tokenizer())
    for text in ("The cat, it's", "H\u00e9 \u2713 \U0001f600\n\n\t x\x00", "".join(map(chr, range(1, 1000)))):
        ids = tokenizer.encode(text).ids
        assert ids == ByteTokenizer().encode(text).tolist() and tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("[SEP]") == ByteTokenizer.separator
