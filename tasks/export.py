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
from util import import_optional, write_json, write_text

CARD = """# {name}

A Transformer of {parameters:,} parameters ({layers} layers, width {width}), pretrained with the objective
**{objective}** ({paper}; Look Ahead or Look Around?, arXiv 2407.00935), on the path {path}.

| | |
|---|---|
| data | {data} |
| steps | {step:,}, batches of {batch_size} |
| tokens | {tokens} |
{scores}

`config.json` has all settings. To use it, with the code that it was trained with:

```python
from run import load_run
from tasks.probe import features
x = features(load_run("{folder}"), {examples})  # (N, {width})
```

It repeats what it read in this data; nothing was done to make its texts true or harmless.
"""


def export(run: Run, out, regimes):
    """Write the folder `out`, which must not exist. regimes: {name: results of evaluate.perplexity}."""
    save_file = import_optional("safetensors.torch").save_file
    config, settings = run.model.config, run.settings
    weights = {name: x.contiguous().cpu() for name, x in run.model.state_dict().items()}
    with new_folder(out, ()) as folder:
        save_file(weights, folder / "model.safetensors")
        tokens = "patches of images"
        if run.tokenizer:
            tokens = f"{run.tokenizer.kind}, vocabulary {config.vocab:,}, sequences of {config.length}"
            text = byte_tokenizer() if run.tokenizer.kind == "byte" else run.tokenizer.to_json()
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        write_json(folder / "config.json", {
            "settings": settings.to_dict(), "model_config": asdict(config), "step": run.step,
            "tokenizer": run.tokenizer and run.tokenizer.kind})
        scores = "\n".join(f"| perplexity, {name}, of {x['sequences']} sequences | {x['perplexity']:.2f} ± "
                           f"{x['perplexity_stderr']:.2f} |" for name, x in regimes.items())
        write_text(folder / "README.md", CARD.format(
            name=Path(out).name, parameters=sum(p.numel() for p in run.model.parameters()),
            layers=config.layers, width=config.width, objective=describe(run.objective),
            paper=run.objective.paper, data=settings.data, step=run.step, batch_size=settings.batch_size,
            tokens=tokens, path=run.path, scores=scores, folder=out,
            examples='["a text", "another"]' if run.tokenizer else "images"))


def byte_tokenizer():
    """data.ByteTokenizer as a tokenizer.json, in which a byte is a character that can be printed: itself, or
    one from 256 on."""
    others = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
    vocab = {chr(256 + others.index(b)) if b in others else chr(b): b for b in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    separator = {"id": 256, "content": "[SEP]", "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
    return json.dumps({"version": "1.0", "added_tokens": [separator], "pre_tokenizer": byte_level,
                       "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": []}})
