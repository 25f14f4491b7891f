"""Models of the transformers package, tiny and random, against that library's own losses, hidden states and
layouts."""
import json
import sys

import pytest
import torch

import evaluate
from downstream import connectivity, hub
from objectives import describe
from support.cli import BadInput

TEXT = ("The cat sat on the mat, and the dog ran after it; "
        "then both of them slept until the morning came. ") * 40
CAUSAL, MASKED = ("gpt2", "llama", "opt"), ("bert", "roberta", "electra")


def make_tokenizer(transformers, name):
    """A tokenizer with the special tokens and the layout of that model."""
    tokenizers = pytest.importorskip("tokenizers")
    pre, decoders, trainers = tokenizers.pre_tokenizers, tokenizers.decoders, tokenizers.trainers
    first, last, layout = {
        "gpt2": (None, "<|endoftext|>", None), "llama": ("<s>", "</s>", ("<s> $A", "<s> $A <s> $B")),
        "opt": (None, "</s>", ("</s> $A", "</s> $A </s> $B")),
        "bert": ("[CLS]", "[SEP]", ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")),
        "roberta": ("<s>", "</s>",
                    ("<s> $A </s>", "<s> $A </s> </s> $B </s>"))}[{"electra": "bert"}.get(name, name)]
    special = [token for token in (first, "[PAD]", last, "[UNK]", "[MASK]") if token]
    if name in ("bert", "electra"):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    if layout:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=layout[0], pair=layout[1], special_tokens=[(t, tokenizer.token_to_id(t)) for t in special])
    names = {"bos_token": first, "eos_token": last, "cls_token": first, "sep_token": last,
             "pad_token": "[PAD]"}
    if name in MASKED:
        names |= {"mask_token": "[MASK]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                                **{k: v for k, v in names.items() if v})


def make_network(transformers, name, tokenizer, length=40, **options):
    """A small random network whose output depends on every part of it."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": length, "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id}
    wide = {"hidden_size": 16, "intermediate_size": 32}
    kinds = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"hidden_size": 16}),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {**wide, "num_key_value_heads": 1}),
        "opt": ("OPTConfig", "OPTForCausalLM", {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}),
        "bert": ("BertConfig", "BertForMaskedLM", {**wide, "type_vocab_size": 2}),
        "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**wide, "type_vocab_size": 1}),
        "electra": ("ElectraConfig", "ElectraForMaskedLM",
                    {**wide, "embedding_size": 8, "type_vocab_size": 2}),
        "headless": ("BertConfig", "BertModel", {**wide, "type_vocab_size": 2}),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**wide, "num_key_value_heads": 1, "head_dim": 8}),
        "bert-generation": ("BertGenerationConfig", "BertGenerationDecoder", wide),
        "bert decoder": ("BertConfig", "BertLMHeadModel", {**wide, "is_decoder": True}),
        "xlnet": ("XLNetConfig", "XLNetLMHeadModel", {"d_model": 16, "d_inner": 32})}
    if name == "xlnet":  # which has no limit of positions, and its own names
        size = {"vocab_size": size["vocab_size"], "n_layer": 2, "n_head": 2}
    config, network, extra = kinds[name]
    network = getattr(transformers,
                      network)(getattr(transformers, config)(**{**size, **extra, **options})).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.3)
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (the library's network, its tokenizer, the folder that both were saved to)}."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    made = {}
    for name in (*CAUSAL, *MASKED):
        tokenizer = make_tokenizer(transformers, name)
        network = make_network(transformers, name, tokenizer)
        path = tmp_path_factory.mktemp(name)
        network.save_pretrained(path)
        tokenizer.save_pretrained(path)
        made[name] = network, tokenizer, path
    return made


def sequences_for(tokenizer, count=3, length=9):
    """Ids of ordinary tokens (count, length)."""
    return torch.randint(10, len(tokenizer), (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CAUSAL)
def test_extras_causal_perplexity_is_the_librarys_loss(folders, name):
    network, tokenizer, path = folders[name]
    run = hub.load_any(f"hf:{path}", length=9)
    assert (describe(run.objective), run.path, run.settings.length) == ("ar", "causal", 9)
    sequences = sequences_for(tokenizer)
    prefix = torch.tensor({"gpt2": [], "llama": [0], "opt": [1]}[name], dtype=torch.long)
    assert tokenizer.convert_ids_to_tokens(prefix.tolist()) == {"gpt2": [], "llama": ["<s>"],
                                                                "opt": ["</s>"]}[name]
    ids = torch.cat([prefix.expand(3, -1), sequences], dim=1)
    labels = ids.clone()
    labels[:, :len(prefix) + 1] = -100                                          # x_2 .. x_S are scored
    expected = network(input_ids=ids, labels=labels).loss.item()
    ours = evaluate.left_to_right(run, sequences)
    assert list(ours) == ["next"] and ours["next"].shape == (3, 8)
    assert ours["next"].mean().item() == pytest.approx(expected, abs=1e-4)
    uniform = torch.tensor(float(network.config.vocab_size)).log().item()
    assert abs(expected - uniform) > 0.1                                        # the network says something


@pytest.mark.parametrize("name", MASKED)
def test_extras_masked_regimes_against_a_loop_over_prefixes(folders, name):
    network, tokenizer, path = folders[name]
    run = hub.load_any(f"hf:{path}", length=9)
    assert (describe(run.objective), run.path) == ("mlm 0.15", "mask")
    sequences = sequences_for(tokenizer)
    results = evaluate.left_to_right(run, sequences)
    assert list(results) == ["padded", "truncated"] and not torch.allclose(results["padded"],
                                                                           results["truncated"], atol=0.01)
    for regime, nll in results.items():
        for b, x in enumerate(sequences.tolist()):
            for k in range(1, 9):
                hidden = 9 - k if regime == "padded" else 1
                ids = [tokenizer.cls_token_id, *x[:k], *[tokenizer.mask_token_id] * hidden,
                       tokenizer.sep_token_id]
                scores = network(input_ids=torch.tensor([ids])).logits[0, 1 + k]
                assert nll[b, k - 1].item() == pytest.approx(-scores.log_softmax(0)[x[k]].item(), abs=1e-4)


@pytest.mark.parametrize("name", (*CAUSAL, *MASKED))
def test_extras_encode_is_the_librarys_and_knows_padding(folders, name):
    network, tokenizer, path = folders[name]
    run = hub.load_any(f"hf:{path}", length=9)
    causal = name in CAUSAL
    tokens = sequences_for(tokenizer)
    states = run.model.encode(tokens, causal=causal, every_layer=True)
    expected = network.base_model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(states) == 3 and states[-1].shape == (3, 9, run.model.config.width)
    for ours, theirs in zip(states, expected):
        assert torch.allclose(ours, theirs, atol=1e-5)
    padding = torch.arange(9) >= torch.tensor([[9], [6], [2]])
    whole = run.model.encode(tokens.masked_fill(padding, 0), padding, causal=causal)
    other = run.model.encode(tokens.masked_fill(padding, 5), padding, causal=causal)
    for row, length in enumerate((9, 6, 2)):
        alone = run.model.encode(tokens[row:row + 1, :length], causal=causal)[0]
        assert torch.allclose(whole[row, :length], alone, atol=1e-5)
        assert torch.allclose(other[row, :length], alone, atol=1e-5)
    assert not torch.allclose(whole[1, :2], whole[2, :2], atol=0.01)
    only = "causally only; choose causal" if causal else "both directions only; choose full"
    with pytest.raises(BadInput, match=only):
        run.model.encode(tokens, causal=not causal)


def test_extras_token_types_reach_the_model(folders):
    network, tokenizer, path = folders["bert"]
    model, tokens = hub.load_any(f"hf:{path}").model, sequences_for(tokenizer)
    segments = (torch.arange(9) > 4).long().expand(3, -1)
    typed, plain = model.encode(tokens, segments=segments), model.encode(tokens)
    assert torch.allclose(typed, network.bert(input_ids=tokens, token_type_ids=segments).last_hidden_state,
                          atol=1e-5)
    assert not torch.allclose(typed, plain, atol=0.01)
    # has one type, and is not given others
    roberta = hub.load_any(f"hf:{folders['roberta'][2]}", length=9).model
    assert torch.equal(roberta.encode(tokens, segments=segments), roberta.encode(tokens))


@pytest.mark.parametrize("name", (*CAUSAL, *MASKED))
def test_extras_tokens_and_pairs_are_the_librarys(folders, name):
    _, tokenizer, path = folders[name]
    ours = hub.load_any(f"hf:{path}", length=9).tokenizer
    a, b = ("the cat sat", "a dog ran after it")
    ids = [ours.encode(text).tolist() for text in (a, b)]
    assert ids == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (a, b)]
    assert ours.vocab == len(tokenizer) + 3 and ours.encode("").tolist() == []
    assert " ".join(ours.decode([*ids[0], ours.separator, *ids[1]]).split()) == f"{a} {b}"
    if name in MASKED:
        for texts, given in (((a,), ids[:1]), ((a, b), ids)):
            whole = tokenizer(*texts, return_token_type_ids=True)
            assert ours.pair(*given) == (whole["input_ids"], whole["token_type_ids"])
    else:
        prefix = tokenizer(a)["input_ids"][:-len(ids[0])]
        assert ours.pair(ids[0]) == ([*prefix, *ids[0], ours.separator],
                                     [0] * (len(prefix) + len(ids[0]) + 1))
        assert ours.pair(*ids)[0] == [*prefix, *ids[0], ours.separator, *ids[1], ours.separator]
    # written in a text it is text
    written = f"the {tokenizer.eos_token} cat"
    assert ours.separator not in ours.encode(written).tolist()
    assert tokenizer.eos_token_id in tokenizer(written)["input_ids"]


def call(capsys, *argv):
    evaluate.main([*map(str, argv), "--device", "cpu", "--dtype", "fp32"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ("gpt2", "bert"))
def test_extras_perplexity_command(folders, capsys, tmp_path, name):
    network, tokenizer, path = folders[name]
    (tmp_path / "text.txt").write_text(TEXT)
    argv = ("perplexity", f"hf:{path}", "--data", tmp_path / "text.txt", "--length", "12")
    x = json.loads(call(capsys, *argv, "--json", "-"))
    assert x["results"]["length"] == 12 and x["objective"] == {"gpt2": "ar", "bert": "mlm 0.15"}[name]
    total = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) + 1
    results = x["results"]["regimes"]
    assert all(r["tokens"] == 11 * min(200, total // 12) for r in results.values())
    for r in results.values():
        assert r["bits_per_byte"] == pytest.approx(r["nll"] / 0.6931472 * total / len(TEXT), rel=1e-4)
    if name == "gpt2":
        sequences = connectivity.evaluation_sequences(hub.load_any(f"hf:{path}", length=12),
                                                      str(tmp_path / "text.txt"))[0]
        assert results["next"]["nll"] == pytest.approx(network(input_ids=sequences,
                                                               labels=sequences).loss.item(), abs=1e-4)
    shown = call(capsys, *argv, "--by-length")
    assert str(path) in shown and "step" not in shown
    assert ("tokens are [UNK]. WordPiece also drops" in shown) == (name == "bert")


def test_extras_other_commands(folders, capsys, tmp_path):
    network, tokenizer, path = folders["gpt2"]
    (tmp_path / "text.txt").write_text(TEXT)
    prompt = tokenizer("the cat")["input_ids"]
    text = json.loads(call(capsys, "generate", f"hf:{path}", "--prompt", "the cat", "--tokens", "60",
                           "--temperature", "0", "--json", "-"))
    ids, start = list(prompt), 0
    # a text that outgrows 40 tokens goes on from its half
    for _ in range(60):
        start = len(ids) - 20 if len(ids) - start >= 40 else start
        ids.append(network(input_ids=torch.tensor([ids[start:]])).logits[0, -1].argmax().item())
    assert text["texts"][0] == hub.load_any(f"hf:{path}").tokenizer.decode(ids)
    masked = f"hf:{folders['bert'][2]}"
    assert call(capsys, "generate", masked, "--prompt", "the cat", "--tokens", "5", "--order",
                "confident").startswith("the cat")
    x = json.loads(call(capsys, "connectivity", f"hf:{path}", masked, "--data", tmp_path / "text.txt",
                        "--features", "60",
                        "--top", "50", "--json", "-"))
    assert not x["same_sequences"] and [row["features"] for row in x["checkpoints"]] == [60, 60]


@pytest.mark.parametrize("name", ("gpt2", "bert"))
def test_extras_probe_and_fine_tuning(folders, capsys, tmp_path, name):
    """Pairs of texts of two classes that share no word, through finetune.py."""
    rows = [("the cat sat on it", "the mat") if k % 2 else ("dog ran after them", "morning came")
            for k in range(120)]
    lines = ["text\ttext_b\tlabel",
             *(f"{a}\t{b}\t{'cat' if k % 2 else 'dog'}" for k, (a, b) in enumerate(rows))]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    argv = (f"hf:{folders[name][2]}", "--data", tmp_path / "pairs.tsv", "--json", "-")
    probe = json.loads(call(capsys, "probe", *argv))
    assert probe["path"] == {"gpt2": "causal",
                             "bert": "mask"}[name] and probe["results"]["layers"]["last"]["accuracy"] == 1
    tuned = json.loads(call(capsys, "finetune", *argv, "--epochs", "20", "--lr", "0.002", "--seeds", "1"))
    assert tuned["results"]["accuracy"]["mean"] == 1


def test_extras_features_are_what_the_output_layer_reads(folders):
    for name in ("gpt2", "electra"):
        network, tokenizer, path = folders[name]
        run = hub.load_any(f"hf:{path}", length=9)
        tokens = sequences_for(tokenizer)
        groups = run.objective.groups(3, 9, torch.Generator().manual_seed(0))
        targets = (groups > 1).long().argmax(1, keepdim=True)
        features = run.model(tokens, groups, targets, run.path)
        # 8 for this electra of width 16
        assert features.shape == (3, 1, run.model.embedding.weight.shape[1])
        ids = tokens if name == "gpt2" else torch.nn.functional.pad(
            tokens.masked_fill(groups > 1, tokenizer.mask_token_id), (1, 0), value=tokenizer.cls_token_id)
        if name == "electra":
            ids = torch.nn.functional.pad(ids, (0, 1), value=tokenizer.sep_token_id)
        scores = network(input_ids=ids).logits[torch.arange(3),
                                               targets[:, 0] + (1 if name == "electra" else -1)]
        assert torch.allclose(run.model.logits(features)[:, 0], scores, atol=1e-4)


# ---------------------------------------------------------------------------- refusals

def test_extras_refusals(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(transformers, "bert")

    def saved(name, network, with_tokenizer=True):
        network.save_pretrained(tmp_path / name)
        if with_tokenizer:
            tokenizer.save_pretrained(tmp_path / name)
        return f"hf:{tmp_path / name}"

    with pytest.raises(BadInput, match="there is no folder"):
        hub.load_any(f"hf:{tmp_path}/nothing")
    with pytest.raises(BadInput, match="cannot be loaded"):
        hub.load_any(f"hf:{tmp_path}")
    with pytest.raises(BadInput, match="cannot be loaded"):
        hub.load_any("hf:")
    with pytest.raises(BadInput, match="no tokenizer"):
        hub.load_any(saved("mute", make_network(transformers, "bert", tokenizer), with_tokenizer=False))
    with pytest.raises(BadInput, match="do not belong together"):
        hub.load_any(saved("small", make_network(transformers, "bert", tokenizer, vocab_size=50)))
    t5 = transformers.T5Config(vocab_size=99, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(BadInput, match="is a t5, neither"):
        hub.load_any(saved("t5", transformers.T5ForConditionalGeneration(t5)))
    with pytest.raises(BadInput, match="changes its scores"):
        hub.load_any(saved("gemma", make_network(transformers, "gemma2", tokenizer)))
    with pytest.raises(BadInput, match="--length 41 is more than the 40 tokens"):
        hub.load_any(f"hf:{folders['bert'][2]}", length=41)
    # [CLS] and [SEP] take two
    assert hub.load_any(f"hf:{folders['bert'][2]}", length=40).settings.length == 38
    with pytest.raises(BadInput, match="does not take 40 tokens at a time; give a smaller --length"):
        hub.load_any(f"hf:{folders['roberta'][2]}")                              # its positions start at 2
    with pytest.raises(BadInput, match="give one with --data"):
        evaluate.perplexity(hub.load_any(f"hf:{folders['bert'][2]}"))


@pytest.mark.parametrize("name, length", (("bert-generation", 9), ("bert-generation", None), ("xlnet", 9),
                                          ("xlnet", None)))
def test_extras_models_that_pass_for_causal_are_refused(tmp_path, name, length):
    """The library lists them as causal, and they attend in both directions: what they give is no likelihood
    of the next."""
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(transformers, "gpt2")
    network = make_network(transformers, name, tokenizer, length=200)
    ids = sequences_for(tokenizer, 2)
    ids[1] = torch.cat([ids[0, :-1], ids[1, -1:]])
    first, second = network(input_ids=ids).logits[:, :-1]
    assert not torch.allclose(first, second, atol=1e-2)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput,
                       match=f"a {name}, is not causal: its scores of a token depend on later ones"):
        hub.load_any(f"hf:{tmp_path}", length=length)


def test_extras_a_causal_model_of_a_masked_kind_is_taken(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(transformers, "gpt2")
    make_network(transformers, "bert decoder", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert hub.load_any(f"hf:{tmp_path}", length=9).path == "causal"


@pytest.mark.parametrize("name, expected", (("gpt2", 512), ("bert", 510)))
def test_extras_length_512_is_as_many_tokens_as_fit(tmp_path, name, expected):
    """GPT-2 reads 512 tokens; of BERT's 512 positions [CLS] and [SEP] take two. Without --length it is 128
    for both."""
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(transformers, name)
    make_network(transformers, name, tokenizer, length=512).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = hub.load_any(f"hf:{tmp_path}", length=512)
    assert run.settings.length == expected and hub.load_any(f"hf:{tmp_path}").settings.length == 128


def test_extras_a_model_without_its_head_can_encode_but_not_predict(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(transformers, "bert")
    network = make_network(transformers, "headless", tokenizer)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run, tokens = hub.load_any(f"hf:{tmp_path}"), sequences_for(tokenizer)
    assert torch.allclose(run.model.encode(tokens), network(input_ids=tokens).last_hidden_state, atol=1e-5)
    with pytest.raises(BadInput, match="no trained language-model head"):
        evaluate.left_to_right(run, tokens)


def test_extras_neither_pickles_nor_foreign_code_are_loaded(folders, tmp_path):
    network, tokenizer, _ = folders["gpt2"]
    tokenizer.save_pretrained(tmp_path)
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="safetensors"):
        hub.load_any(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MyConfig: pass\n")
    with pytest.raises(BadInput, match="without code of its own"):
        hub.load_any(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_a_length_is_for_hub_models(tmp_path):
    with pytest.raises(BadInput, match="--length 9 is for hf: models"):
        hub.load_any(tmp_path, length=9)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="pip install transformers"):
        hub.load_any("hf:gpt2")
