"""experiments.peers."""
import torch
import torch.nn.functional as F

from masks import query_mask
from support.cli import import_optional

PEERS = {"causal": "GPT2LMHeadModel", "mask": "BertForMaskedLM", "two-stream": "XLNetLMHeadModel",
         "mae": "ViTMAEForPreTraining"}


# ---------------------------------------------------------------------------- peers

def make_peer(case):
    """transformers' model for the path of the case, of the same width, depth, heads and vocabulary, without dropout."""
    T, c = import_optional("transformers"), case.config
    bert = {"hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": 4 * c.width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "sdpa"}
    if case.path == "causal":
        return T.GPT2LMHeadModel(T.GPT2Config(
            vocab_size=c.vocab, n_positions=c.length, n_embd=c.width, n_layer=c.layers, n_head=c.heads, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
            attn_implementation="sdpa"))
    if case.path == "mask":
        return T.BertForMaskedLM(T.BertConfig(vocab_size=c.vocab, max_position_embeddings=c.length, **bert))
    if case.path == "two-stream":
        return T.XLNetLMHeadModel(T.XLNetConfig(
            vocab_size=c.vocab, d_model=c.width, n_layer=c.layers, n_head=c.heads, d_inner=4 * c.width, dropout=0.0))
    layers, width, heads = c.decoder
    return T.ViTMAEForPreTraining(T.ViTMAEConfig(
        image_size=c.size, patch_size=c.patch, num_channels=len(c.mean), mask_ratio=case.objective.mask,
        decoder_num_hidden_layers=layers, decoder_hidden_size=width, decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width, **bert))


def peer_inputs(batch, path, config):
    """What the peer of that path takes, from the Batch that this project's model takes. The last id stands for [MASK]."""
    labels = torch.where(batch.weight > 0, batch.labels, -100) if path != "mae" else None  # -100 is not scored
    if path == "causal":
        return {"input_ids": batch.tokens, "labels": batch.tokens}
    if path == "mask":
        return {"input_ids": torch.where(batch.blank, config.vocab - 1, batch.tokens),
                "labels": torch.full_like(batch.tokens, -100).scatter(1, batch.targets, labels)}
    if path == "two-stream":
        return {"input_ids": batch.tokens, "perm_mask": (~query_mask(batch.groups)).float(), "labels": labels,
                "target_mapping": F.one_hot(batch.targets, batch.tokens.shape[1]).float()}
    return {"pixel_values": batch.tokens.view(-1, len(config.mean), config.size, config.size)}  # any pixels will do


def has_peer(case):
    """Images: ViTMAE knows one fixed ratio, and there is no two-stream or causal peer."""
    return not case.config.patch or case.path == "mae" and isinstance(case.objective.mask, float)
