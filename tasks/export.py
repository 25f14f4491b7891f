"""A run as other programs read it: model.safetensors, config.json, tokenizer.json and a model card.

    python evaluate.py export RUN --out DIR          run.load_run(DIR) reads it back

tokenizer.json is that of the tokenizers library, whatever tokenizer the run has.
"""

import json
from dataclasses import asdict
from pathlib import Path

from images import new_folder
from objectives import describe
from run import Run
from util import import_optional, plain

CARD = """# {name}

A Transformer of {parameters:,} parameters ({layers} layers, width {width}), pretrained with the objective
**{objective}**: {paper}.

| | |
|---|---|
| paper | Look Ahead or Look Around? (arXiv 2407.00935) |
| data | {data} |
| steps | {step:,}, batches of {batch_size} |
| tokens | {tokens} |
| run as | {path} |
{scores}

`config.json` has all settings. To use it, with the code that it was trained with:

```python
from run import load_run
run = load_run("{folder}")
features = run.model.encode(tokens)  # tokens (B, S) -> (B, S, {width})
```

It was trained on this data alone and repeats what it read there; nothing was done to make its texts true or
harmless.
"""


def export(run: Run, out, regimes):
    """Write the folder `out`, which must not exist. regimes: {name: results of evaluate.perplexity}."""
    save_file = import_optional("safetensors.torch").save_file
    config, settings = run.model.config, run.settings
    with new_folder(out, ()) as folder:
        save_file({name: x.contiguous().cpu() for name, x in run.model.state_dict().items()},
                  str(folder / "model.safetensors"))
        tokens = "patches of images"
        if run.tokenizer is not None:
            tokens = f"{run.tokenizer.kind}, vocabulary {config.vocab:,}, sequences of {config.length}"
            text = byte_tokenizer() if run.tokenizer.kind == "byte" else run.tokenizer.to_json()
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        content = {"settings": settings.to_dict(), "model_config": asdict(config), "step": run.step,
                   "tokenizer": run.tokenizer and run.tokenizer.kind}
        (folder / "config.json").write_text(json.dumps(plain(content), indent=1), encoding="utf-8")
        scores = "\n".join(f"| perplexity, {name} | {x['perplexity']:.2f} |" for name, x in regimes.items())
        card = CARD.format(
            name=Path(out).name, parameters=sum(p.numel() for p in run.model.parameters()),
            layers=config.layers, width=config.width, objective=describe(run.objective),
            paper=run.objective.paper, data=settings.data, step=run.step, batch_size=settings.batch_size,
            tokens=tokens, path=run.path, scores=scores, folder=out)
        (folder / "README.md").write_text(card, encoding="utf-8")


def byte_tokenizer():
    """data.ByteTokenizer as a tokenizer.json: id = byte, 256 the separator.

    The library writes a byte as a character that can be printed: itself if it is one, else one from 256 on.
    """
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printed]
    vocab = {chr(b) if b in printed else chr(256 + others.index(b)): b for b in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    separator = {"id": 256, "content": "[SEP]", "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
             "merges": []}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [separator],
                       "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
                       "decoder": byte_level, "model": model})
