"""Causal and masked language models of the transformers package behind the interface of model.Transformer.

    python evaluate.py perplexity hf:PATH --data TEXT     GPT-2, BERT, ...: a local folder or a name on the
                                                          hub

GPT-2 and its like are run as `ar` (causal, one stream), BERT and its like as `mlm 0.15` (masks, one stream),
so that every command and the whole of left-to-right likelihood (Eq. 2) is the code that our own checkpoints
go through. As ours, x_1 is given and x_2 .. x_S are scored. Around x the model sees what its own tokenizer
puts around a single text:

    causal   prefix x_1 .. x_S                              prefix: nothing for GPT-2, <s> for Llama, </s> for
             OPT
    masked   [CLS] x_1 .. x_k [MASK] .. [MASK] [SEP]        `truncated` has one [MASK]; [SEP] closes either
             regime

Weights are read from safetensors only, and no code that comes with a model is ever run.
"""

import itertools
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.machine import choose_device, choose_dtype
from engine.runs import UNTRAINED, Run, load_run
from engine.settings import Settings
from support.cli import BadInput, import_optional
from support.kernels import take
from text.tokenizers import cut_at_lines, token_type

# ---------------------------------------------------------------------------- tokenizer

class HubTokenizer:
    """A tokenizer of the transformers package as data.py's are used, which knows the special tokens of its
    model."""

    def __init__(self, tokenizer, name, vocab, causal):
        """`vocab` is the number of scores that the model gives, which may be more than the tokenizer has
        tokens."""
        self.tokenizer, self.name, self.vocab, self.mask = tokenizer, name, vocab, tokenizer.mask_token_id
        self.separator = tokenizer.eos_token_id if causal else tokenizer.sep_token_id
        unknown, backend = tokenizer.unk_token_id, getattr(tokenizer, "backend_tokenizer", None)
        self.unknown = None if unknown == tokenizer.eos_token_id else unknown  # GPT-2's stands for nothing
        self.kind = type(backend.model).__name__.lower() if backend else ""
        # Where there is no file the library makes up a tokenizer of special tokens alone.
        empty = len(tokenizer) <= len(tokenizer.all_special_ids) or not len(self.encode("a"))
        if empty or self.separator is None or not causal and self.mask is None:
            raise BadInput(f"{name} has no tokenizer, or one without "
                           f"{'an end-of-text' if causal else '[SEP] and [MASK]'} token; save the tokenizer "
                           "into the same folder")
        if len(tokenizer) > vocab:
            raise BadInput(f"{name}: its tokenizer has {len(tokenizer):,} tokens and its model {vocab:,}; "
                           "they do not belong together")
        self.templates = [self.template("a"), self.template("a", "a")]
        if causal:  # GPT-1's way to a pair: what tells the texts apart, and the last token, is the separator
            prefix = self.templates[0][:self.templates[0].index((None, 0))]
            self.templates = [prefix + [(None, 0), (self.separator, 0)] * n for n in (1, 2)]

    def template(self, *texts):
        """How the tokenizer lays out a text or a pair: [(id of a special token, or None for a text, token
        type)]."""
        text = self.encode("a").tolist()
        whole = self.tokenizer(*texts, return_token_type_ids=True)
        ids, types, parts, i = whole["input_ids"], whole["token_type_ids"], [], 0
        while i < len(ids):
            here = ids[i:i + len(text)] == text
            parts.append((None if here else ids[i], types[i]))
            i += len(text) if here else 1
        return parts

    def pair(self, a, b=None):
        """Ids of one text or of two -> (ids, segments) with the model's special tokens, two lists of one
        length.

        BERT: [CLS] a [SEP] b [SEP] with token types 0 and 1; RoBERTa: <s> a </s> </s> b </s>. Causal models,
        most of which have no layout for a pair: prefix a separator b separator, so that the last token has
        seen everything.
        """
        ids, segments, texts = [], [], iter([a] if b is None else [a, b])
        for special, segment in self.templates[b is not None]:
            new = [int(i) for i in next(texts)] if special is None else [special]
            ids += new
            segments += [segment] * len(new)
        return ids, segments

    def encode(self, text):
        """str -> array of ids, without special tokens; "[SEP]" written in a text is text."""
        pieces = list(cut_at_lines(text, 1 << 14))
        ids = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True,
                             return_attention_mask=False,
                             verbose=False)["input_ids"] if pieces else []
        return np.fromiter(itertools.chain.from_iterable(ids), dtype=token_type(self.vocab))

    def decode(self, ids):
        """Ids -> str; each separator becomes an empty line."""
        parts = itertools.groupby(np.asarray(ids).tolist(), key=lambda i: i == self.separator)
        return "".join("\n\n" if cut else self.tokenizer.decode(list(part)) for cut, part in parts)

    def to_json(self):
        """Only a name: no token folder of data.py belongs to this tokenizer."""
        return json.dumps({"kind": "hf", "name": self.name})


# ---------------------------------------------------------------------------- model

@dataclass(frozen=True)
class HubConfig:
    vocab: int
    length: int  # most positions, special tokens included
    width: int   # of what `encode` returns


class HubModel(nn.Module):
    """A model with language-model head as model.Transformer is used. Features are what enters its output
    layer."""

    def __init__(self, network, config, tokenizer, causal, headless):
        super().__init__()
        single = tokenizer.templates[0]
        text = single.index((None, 0))
        self.network, self.config, self.causal, self.headless = network, config, causal, headless
        self.name, self.mask = tokenizer.name, tokenizer.mask
        self.prefix = [special for special, _ in single[:text]]
        self.suffix = [] if causal else [special for special, _ in single[text + 1:]]

    @property
    def embedding(self):
        """The output layer; its weight (vocab, D) is the target embedding."""
        return self.network.get_output_embeddings()

    @property
    def query(self):
        """Stands for model.Transformer's [MASK] vector, which tells callers the device."""
        return self.embedding.weight

    def head_input(self, ids, attention):
        """ids, attention (B, L), 0 where nothing may be seen -> (B, L, D), what enters the output layer,
        which itself is skipped: the scores of all tokens would take V / D times the memory."""
        seen = []

        def catch(head, inputs):
            seen.append(inputs[0])
            return inputs[0][:, :0]

        handle = self.embedding.register_forward_pre_hook(catch)
        try:
            self.network(input_ids=ids, attention_mask=attention)
        finally:
            handle.remove()
        return seen[0]

    def forward(self, tokens, groups, targets, path, cuts=None, blank=None, padded=True):
        """As model.Transformer.forward, for the one path that the model was trained for. tokens without
        special tokens."""
        if self.headless:
            raise BadInput(f"{self.name} has no trained language-model head, so it predicts nothing; probe "
                           "or fine-tune it, or give a checkpoint with the head")
        if path == "mask":
            tokens = torch.where(groups > 1 if blank is None else blank, self.mask, tokens)
        before, after = (tokens.new_tensor(special).expand(len(tokens), -1)
                         for special in (self.prefix, self.suffix))
        attention = F.pad((groups > 0).long(), (len(self.prefix), len(self.suffix)), value=1)
        x = self.head_input(torch.cat([before, tokens, after], dim=1), attention)       # (B, L, D)
        return take(x, (targets + len(self.prefix) - int(path == "causal")).clamp(min=0))

    def logits(self, features):
        """Features (..., D) -> scores (..., vocab)."""
        return self.embedding(features)

    def encode(self, tokens, padding=None, causal=False, every_layer=False, segments=None):
        """As model.Transformer.encode, of ids that hold their special tokens already (HubTokenizer.pair).

        segments (B, S): token types, for models that were trained with them; others ignore it.
        """
        if causal != self.causal:
            raise BadInput(f"{self.name} attends {'causally' if self.causal else 'in both directions'} only; "
                           f"choose {'causal' if self.causal else 'full'} attention")
        typed = segments is not None and getattr(self.network.config, "type_vocab_size", 0) > 1
        x = self.network.base_model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens)
            if padding is None else (~padding).long(),
            output_hidden_states=every_layer, **({"token_type_ids": segments} if typed else {}))
        return [*x.hidden_states[:-1], x.last_hidden_state] if every_layer else x.last_hidden_state


# ---------------------------------------------------------------------------- loading

def load_any(name, device="cpu", length=None):
    """What CKPT names, ready for evaluation: a run of train.py, untrained:RUN, or hf:FOLDER or hf:NAME."""
    name = str(name)
    if name.removeprefix(UNTRAINED).startswith("hf:"):
        if name.startswith(UNTRAINED):
            raise BadInput(f"{name}: only a run of train.py can be initialised anew")
        return load_hub_model(name, device, length)
    if length is not None:
        raise BadInput(f"--length {length} is for hf: models; {name} is evaluated at the length of its "
                       "training")
    return load_run(name, device)


def load_hub_model(name, device="cpu", length=None):
    """hf:FOLDER or hf:NAME as a Run whose sequences are `length` tokens long, or what special tokens leave of
    the positions that it has (None: 128, as ours)."""
    network, tokenizer, causal, headless = read_hub_model(name)
    vocab = network.get_output_embeddings().weight.shape[0]
    tokenizer = HubTokenizer(tokenizer, name, vocab, causal)
    config = network.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0  # XLNet, which has no limit, says -1
    room = int(min(positions if positions > 0 else math.inf, tokenizer.tokenizer.model_max_length))
    model = HubModel(network, HubConfig(vocab, room, config.hidden_size), tokenizer, causal, headless)
    if length is not None and length > room:
        raise BadInput(f"--length {length} is more than the {room} tokens that {name} takes at a time")
    length = min(length or 128, room - len(model.prefix) - len(model.suffix))
    check_model(model, length, tokenizer.separator)
    settings = Settings(objective="ar" if causal else "mlm", length=length, data=None)
    return Run(model.to(device), *settings.task(), tokenizer, settings, 0, name)


def read_hub_model(name):
    """-> (network in evaluation mode, the library's tokenizer, whether it is causal, whether it lacks a
    trained head)."""
    transformers = import_optional("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    source = name.removeprefix("hf:")
    if source.startswith(("/", ".")) and not Path(source).is_dir():
        raise BadInput(f"{name}: there is no folder {source}")
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
        causal = not masked or getattr(config, "is_decoder", False)  # some types can be either
        known = masked or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder or not known:
            raise BadInput(f"{name} is a {config.model_type}, neither a causal nor a masked language model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        network, report = kind.from_pretrained(source, trust_remote_code=False, use_safetensors=True,
                                               output_loading_info=True)
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  whatever stands in that folder, or the network's state
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{name} cannot be loaded: {reason} (It takes a folder, or a name on the hub, with "
                       "config.json, tokenizer and safetensors weights, and without code of its "
                       "own)") from None
    base = [key for key in report["missing_keys"] if key.startswith(network.base_model_prefix + ".")]
    if base:
        raise BadInput(f"{name} lacks weights of its network, such as {base[0]}")
    network = network.float().eval()
    network.config.use_cache = False
    return network, tokenizer, causal, bool(report["missing_keys"])


@torch.no_grad()
def check_model(model, length, token):
    """Refuse a model that cannot take that many tokens, that changes its scores after the output layer, or
    that passes for causal and is not: change the last token, and no earlier score may move. `token`: an id to
    fill sequences with."""
    kind = f"{model.name}, a {model.network.config.model_type},"
    ids = torch.full((1, len(model.prefix) + length + len(model.suffix)), token)
    try:
        own = model.network(input_ids=ids).logits
        ours = model.logits(model.head_input(ids, torch.ones_like(ids)))
    except (IndexError, RuntimeError) as error:
        raise BadInput(f"{model.name} does not take {ids.shape[1]} tokens at a time; give a smaller --length "
                       f"({str(error).splitlines()[0]})") from None
    if not torch.allclose(own, ours, atol=1e-3 * own.abs().max().item()):
        raise BadInput(f"{kind} changes its scores after the output layer; such models are not supported")
    if model.causal:
        short = ids[:, :8].repeat(2, 1)  # where the change of one token shows
        short[1, -1] = (token + 1) % model.config.vocab
        first, second = model.network(input_ids=short).logits[:, :-1]
        if not torch.allclose(first, second, atol=1e-5 * first.abs().max().item()):
            raise BadInput(f"{kind} is not causal: its scores of a token depend on later ones, so they are "
                           "no likelihood")


def open_run(args, checkpoint=None):
    """The checkpoint (one of several, where a command takes several), device and precision that the arguments
    name. -> Run, autocast context."""
    device = choose_device(args.device)
    dtype = choose_dtype(device, args.dtype)
    run = load_any(checkpoint or args.checkpoint, device, getattr(args, "length", None))
    return run, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
