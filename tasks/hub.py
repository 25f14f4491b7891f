"""What CKPT names: runs, and language models of the transformers package as model.Transformer is used.

GPT-2 and its like run as `ar`, BERT and its like as `mlm 0.15`, by the code that our own checkpoints go
through. As in ours, x_1 is given and x_2 .. x_S are scored. Around x the model sees what its tokenizer puts
around a single text:

    causal   prefix x_1 .. x_S                            prefix: nothing for GPT-2, <s> for Llama
    masked   [CLS] x_1 .. x_k [MASK] .. [MASK] [SEP]      `truncated` has one [MASK]

Weights are read from safetensors only, and no code that comes with a model is ever run.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import TrainedTokenizer, load_evaluation, token_type
from model import gather_rows
from objectives import describe
from run import Run, Settings, choose_autocast, choose_device, held_out_text, load_run
from util import BadInput, import_optional, note


def open_run(args, checkpoint=None, kind=None):
    """The checkpoint, or another -> Run, autocast context. kind: "text" or "images", if only that will do."""
    name, length = str(checkpoint or args.checkpoint), getattr(args, "length", None)
    device, hub = choose_device(args.device), name.startswith("hf:")
    if length and not hub:
        raise BadInput(f"--length {length} is for hf: models; {name} has the length of its training")
    run = load_hub_model(name, device, length) if hub else load_run(name, device)
    trained_on = "text" if run.tokenizer else "images"
    if kind not in (None, trained_on):
        raise BadInput(f"{name} was trained on {trained_on}; this command takes {kind}")
    autocast, _ = choose_autocast(device, args.dtype)
    return run, autocast()


def open_runs(args):
    """(name, Run, autocast context, Corpus) of several checkpoints; the text of all is --data, or what the
    first one's data held out."""
    first = None
    for name in args.checkpoints:
        run, autocast = open_run(args, name, "text")
        text = same_text(run, *first) if first and not args.data else held_out_text(run, args.data)
        first = first or (run, text)
        yield name, run, autocast, text


def same_text(run, first, corpus):
    """The held-out text `corpus` of the Run `first`, as another Run reads it."""
    if run.tokenizer.to_json() == first.tokenizer.to_json():
        return corpus
    if first.tokenizer.kind not in ("byte", "bpe"):  # the others do not give back what they have read
        raise BadInput(f"{run.name} has another tokenizer than {first.name}; give a text with --data")
    return replace(load_evaluation([first.tokenizer.decode(corpus.val)], run.tokenizer), name=corpus.name)


def about(run):
    """What --json says of a checkpoint."""
    return {"step": run.step, "objective": describe(run.objective), "path": run.path}


def finite(run, x):
    """x, which the network gave, if all of it is finite."""
    if not x.isfinite().all():
        raise BadInput(f"{run.name} gives numbers that are not finite: its training diverged")
    return x


class HubTokenizer(TrainedTokenizer):
    """A tokenizer of the transformers package as data.py's are used; `vocab` scores has its model."""

    def __init__(self, tokenizer, name, vocab, causal):
        self.tokenizer, self.name, self.vocab, self.causal = tokenizer, name, vocab, causal
        self.mask = tokenizer.mask_token_id
        self.separator = tokenizer.eos_token_id if causal else tokenizer.sep_token_id
        # Where there is no tokenizer's file the library makes up one of special tokens alone.
        if not len(self.encode("a")) or self.separator is None or not causal and self.mask is None:
            needed = "an end-of-text token" if causal else "[SEP] and [MASK]"
            raise BadInput(f"{name} has no tokenizer, or one without {needed}; save it into the same folder")
        self.layouts = [self.layout("a"), self.layout("a", "a")]
        self.prefix, self.suffix = self.layouts[0][0], [] if causal else self.layouts[0][-1]
        if causal:  # prefix a separator b separator: the last token has seen everything
            self.layouts = [[self.prefix] + [[self.separator]] * texts for texts in (1, 2)]

    def layout(self, *texts):
        """The special tokens before, between and behind texts -> lists of ids."""
        x, found = self.tokenizer(*texts, return_special_tokens_mask=True), [[]]
        tokens = zip(x["input_ids"], x["special_tokens_mask"])
        for special, run in itertools.groupby(tokens, key=lambda token: token[1]):
            if special:
                found[-1] += [i for i, _ in run]
            else:
                found.append([])
        return found

    def pair(self, *texts):
        """[CLS] a [SEP] b [SEP] for BERT, a separator behind each text for causal models; or of one text."""
        first, *behind = self.layouts[len(texts) - 1]
        ids = list(first)
        for text, special in zip(texts, behind):
            ids += [*map(int, text), *special]
        return ids

    def encode_all(self, texts):
        """[str] -> [array of ids], without special tokens; "[SEP]" written in a text is text."""
        ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [np.array(one, token_type(self.vocab)) for one in ids["input_ids"]]

    def to_json(self):
        """Only a name: no token folder of data.py belongs to this tokenizer."""
        return json.dumps({"kind": "hf", "name": self.name})


class HubModel(nn.Module):
    """A language model as model.Transformer is used. Features are what enters its output layer."""

    def __init__(self, network, config, tokenizer):
        super().__init__()
        self.network, self.config, self.name = network, config, tokenizer.name
        self.causal, self.mask = tokenizer.causal, tokenizer.mask
        self.prefix, self.suffix = tokenizer.prefix, tokenizer.suffix
        self.embedding = network.get_output_embeddings()
        self.embedding.forward = lambda x: x  # the network's `logits` are now what enters its output layer
        self.query = self.embedding.weight    # stands for model.Transformer's, which tells callers the device

    def forward(self, tokens, groups, targets, path, cuts=None, blank=None, padded=True, given=None):
        """As model.Transformer.forward, on the path that the model was trained for."""
        if path == "mask":
            tokens = torch.where(groups > 1 if blank is None else blank, self.mask, tokens)
        before, after = (tokens.new_tensor(x).expand(len(tokens), -1) for x in (self.prefix, self.suffix))
        attention = F.pad((groups > 0).long(), (len(self.prefix), len(self.suffix)), value=1)
        x = self.network(input_ids=torch.cat([before, tokens, after], dim=1), attention_mask=attention).logits
        return gather_rows(x, (targets + len(self.prefix) - int(path == "causal")).clamp(min=0))

    def logits(self, features):
        return F.linear(features, self.embedding.weight, self.embedding.bias)

    def encode(self, tokens, padding=None, causal=False, every_layer=False):
        """As model.Transformer.encode, of ids that hold their special tokens already (HubTokenizer.pair)."""
        if causal != self.causal:
            raise BadInput(f"{self.name} attends {'causally' if self.causal else 'in both directions'} only; "
                           f"choose --attention {'causal' if self.causal else 'full'}")
        attention = torch.ones_like(tokens) if padding is None else (~padding).long()
        x = self.network.base_model(input_ids=tokens, attention_mask=attention,
                                    output_hidden_states=every_layer)
        return [*x.hidden_states[:-1], x.last_hidden_state] if every_layer else x.last_hidden_state


@torch.no_grad()
def load_hub_model(name, device="cpu", length=None):
    """hf:FOLDER or hf:NAME as a Run of `length` tokens (None: 128), or as many as it has positions for."""
    network, tokenizer, causal = read_hub_model(name)
    vocab, config = network.get_output_embeddings().weight.shape[0], network.config.get_text_config()
    tokenizer = HubTokenizer(tokenizer, name, vocab, causal)
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    room = int(min(positions, tokenizer.tokenizer.model_max_length))
    ids = torch.full((2, 8), tokenizer.separator)
    ids[1, -1] = (tokenizer.separator + 1) % vocab              # one later token changes
    scores = network(input_ids=ids).logits
    largest = scores.abs().max().item()
    if causal and not torch.allclose(scores[0, :-1], scores[1, :-1], atol=1e-5 * largest):
        raise BadInput(f"{name} is not causal: its scores of a token depend on later ones")
    width = network.base_model(input_ids=ids).last_hidden_state.shape[-1]  # OPT-350m's is not hidden_size
    sizes = SimpleNamespace(vocab=vocab, length=room, width=width)
    model = HubModel(network, sizes, tokenizer)
    if not torch.allclose(scores, model.logits(network(input_ids=ids).logits), atol=1e-3 * largest):
        raise BadInput(f"{name} changes its scores after the output layer; such models are not supported")
    room -= len(model.prefix) + len(model.suffix)
    if min(length or 2, room) < 2:
        raise BadInput(f"a sequence needs 2 tokens; {name} has room for {room}, --length is {length}")
    if length and length > room:
        note(f"{name} has room for {room} tokens, not for {length}")
    length = min(length or 128, room)
    settings = Settings(objective="ar" if causal else "mlm", preset="tiny", length=length, data=None)
    return Run(model.to(device), *settings.task(), tokenizer, settings, 0, name)


def read_hub_model(name):
    """-> (network in evaluation mode, the library's tokenizer, whether it is causal)."""
    transformers, source = import_optional("transformers"), name.removeprefix("hf:")
    if odd := [path for path in Path(source).glob("*") if not (path.is_file() or path.is_dir())]:
        raise BadInput(f"{odd[0]} is neither a file nor a folder")  # reading a device or a pipe never ends
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
        causal = not masked or getattr(config, "is_decoder", False)              # some types can be either
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        network, report = kind.from_pretrained(source, trust_remote_code=False, use_safetensors=True,
                                               output_loading_info=True)
    except Exception as error:  # noqa: BLE001  whatever stands in that folder, or the network's state
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{name} is no causal or masked language model with tokenizer, safetensors weights "
                       f"and no code of its own: {reason}") from None
    if report["missing_keys"]:  # which the library has filled with random numbers
        raise BadInput(f"{name} lacks weights of a language model, such as {min(report['missing_keys'])}")
    network = network.float().eval()
    network.config.use_cache = False
    return network, tokenizer, causal
