"""Models of other projects, of the same size and on the same batches, for bench.py to compare with."""
import contextlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from masks import query_mask
from support.cli import BadInput, import_optional

PEERS = {"causal": "GPT2LMHeadModel", "mask": "BertForMaskedLM", "two-stream": "XLNetLMHeadModel",
         "mae": "ViTMAEForPreTraining"}


def peers_of(case, transformers, nanogpt):
    """The peers of a case: transformers' where it has one, and nanoGPT in the folder `nanogpt` for the causal
    path."""
    c, found = case.config, []
    # ViTMAE knows one fixed ratio; there is no two-stream or causal model of images, and none of other
    # objectives' queries.
    if transformers and (not c.patch or case.path == "mae" and isinstance(case.objective.mask, float)):
        found.append(replace(case, peer="transformers"))
    if nanogpt and case.path == "causal" and not c.patch:
        found.append(replace(case, peer=str(nanogpt)))
    return found


def peer_name(case):
    return PEERS[case.path] if case.peer == "transformers" else "nanoGPT"


def make_peer(case):
    """The peer of a case, of the same width, depth, heads and vocabulary, without dropout."""
    return make_transformers(case) if case.peer == "transformers" else make_nanogpt(case)


def make_nanogpt(case):
    """GPT of the model.py in the folder case.peer, without biases, as its author recommends."""
    path, c = Path(case.peer, "model.py"), case.config
    if not path.exists():
        raise BadInput(f"--peer-nanogpt {case.peer}: there is no model.py; give a clone of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where torch.compile looks
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(
            block_size=c.length, vocab_size=c.vocab, n_layer=c.layers, n_head=c.heads, n_embd=c.width,
            dropout=0.0, bias=False))


def make_transformers(case):
    """transformers' model for the path of the case."""
    T, c = import_optional("transformers"), case.config
    bert = {"hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": 4 * c.width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "sdpa"}
    if case.path == "causal":
        return T.GPT2LMHeadModel(T.GPT2Config(
            vocab_size=c.vocab, n_positions=c.length, n_embd=c.width, n_layer=c.layers, n_head=c.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM", attn_implementation="sdpa"))
    if case.path == "mask":
        return T.BertForMaskedLM(T.BertConfig(vocab_size=c.vocab, max_position_embeddings=c.length, **bert))
    if case.path == "two-stream":
        return T.XLNetLMHeadModel(T.XLNetConfig(
            vocab_size=c.vocab, d_model=c.width, n_layer=c.layers, n_head=c.heads, d_inner=4 * c.width,
            dropout=0.0))
    layers, width, heads = c.decoder
    return T.ViTMAEForPreTraining(T.ViTMAEConfig(
        image_size=c.size, patch_size=c.patch, num_channels=len(c.mean), mask_ratio=case.objective.mask,
        decoder_num_hidden_layers=layers, decoder_hidden_size=width, decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width, **bert))


def peer_inputs(batch, case):
    """What the peer of a case takes, from the Batch that this project's model takes. The last id stands for
    [MASK]."""
    path, config = case.path, case.config
    # nanoGPT takes the next tokens as they are; -1 is not scored
    if case.peer and case.peer != "transformers":
        return {"idx": batch.tokens, "targets": F.pad(batch.tokens[:, 1:], (0, 1), value=-1)}
    # -100 is not scored
    labels = torch.where(batch.weight > 0, batch.labels, -100) if path != "mae" else None
    if path == "causal":
        return {"input_ids": batch.tokens, "labels": batch.tokens}
    if path == "mask":
        return {"input_ids": torch.where(batch.blank, config.vocab - 1, batch.tokens),
                "labels": torch.full_like(batch.tokens, -100).scatter(1, batch.targets, labels)}
    if path == "two-stream":
        return {"input_ids": batch.tokens, "perm_mask": (~query_mask(batch.groups)).float(), "labels": labels,
                "target_mapping": F.one_hot(batch.targets, batch.tokens.shape[1]).float()}
    # any pixels will do
    return {"pixel_values": batch.tokens.view(-1, len(config.mean), config.size, config.size)}
