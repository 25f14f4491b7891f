"""Models of the transformers package, tiny and random, against that library's losses, states and layouts."""

import pytest
import torch
from conftest import call, call_json, seeded

import evaluate
from objectives import describe
from tasks import hub
from util import BadInput

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "The cat sat on the mat, and the dog ran after it; then both slept until the morning came. " * 40
NAMES = ("gpt2", "llama", "bert")


def make_tokenizer(name):
    """A tokenizer with the special tokens and the layout of that model."""
    ends = {"gpt2": (None, "<|endoftext|>"), "llama": ("<s>", "</s>"), "bert": ("[CLS]", "[SEP]")}
    (first, last), bert = ends[name], name == "bert"
    special = [token for token in (first, "[PAD]", last, "[UNK]", "[MASK]") if token]
    made = tokenizers.BertWordPieceTokenizer() if bert else tokenizers.ByteLevelBPETokenizer()
    size = 90 if bert else 290
    made.train_from_iterator([TEXT], vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer = tokenizers.Tokenizer.from_str(made.to_str())
    layout = {"llama": ("<s> $A", "<s> $A <s> $B"), "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")}
    if name in layout:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            *layout[name], special_tokens=[(token, tokenizer.token_to_id(token)) for token in special])
    names = {"bos_token": first, "eos_token": last, "pad_token": "[PAD]"}
    if bert:
        names |= {"cls_token": first, "sep_token": last, "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                                **{key: token for key, token in names.items() if token})


def make_network(name, vocab):
    """A small random network whose output depends on every part of it."""
    torch.manual_seed(0)
    size = {"vocab_size": vocab, "max_position_embeddings": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config, network, extra = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}), "bert": ("BertConfig", "BertForMaskedLM", {}),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 1}),
        "headless": ("BertConfig", "BertModel", {}),
        "capped": ("Gemma2Config", "Gemma2ForCausalLM", {"num_key_value_heads": 1, "head_dim": 8}),
        "not causal": ("BertGenerationConfig", "BertGenerationDecoder", {})}[name]
    network = getattr(transformers, network)(getattr(transformers, config)(**size, **extra)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.3)
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (the library's network, its tokenizer, the folder that both were saved to)}."""
    made = {}
    for name in (*NAMES, "headless", "capped", "not causal"):
        tokenizer = make_tokenizer(name if name in NAMES else "bert")
        network, path = make_network(name, len(tokenizer) + 3), tmp_path_factory.mktemp("hub")
        network.save_pretrained(path)
        tokenizer.save_pretrained(path)
        made[name] = network, tokenizer, path
    return made


def some_tokens(tokenizer):
    return torch.randint(10, len(tokenizer), (3, 9), generator=seeded(1))


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_causal_likelihood_is_the_librarys_loss(folders, name):
    network, tokenizer, path = folders[name]
    run = hub.load_hub_model(f"hf:{path}", length=9)
    assert (describe(run.objective), run.path, run.settings.length) == ("ar", "causal", 9)
    sequences = some_tokens(tokenizer)
    prefix = torch.tensor([tokenizer.bos_token_id] if name == "llama" else [], dtype=torch.long)
    ids = torch.cat([prefix.expand(3, -1), sequences], dim=1)
    labels = ids.clone()
    labels[:, :len(prefix) + 1] = -100                                          # x_2 .. x_S are scored
    expected = network(input_ids=ids, labels=labels).loss.item()
    ours = evaluate.left_to_right(run, sequences)
    assert list(ours) == ["next"] and ours["next"].shape == (3, 8)
    assert ours["next"].mean().item() == pytest.approx(expected, abs=1e-4)
    assert abs(expected - torch.tensor(float(network.config.vocab_size)).log().item()) > 0.1


def test_masked_regimes_against_a_loop_over_prefixes(folders):
    network, tokenizer, path = folders["bert"]
    run = hub.load_hub_model(f"hf:{path}", length=9)
    assert (describe(run.objective), run.path) == ("mlm 0.15", "mask")
    sequences = some_tokens(tokenizer)
    results = evaluate.left_to_right(run, sequences)
    assert not torch.allclose(results["padded"], results["truncated"], atol=0.01)
    for regime, nll in results.items():
        for b, x in enumerate(sequences.tolist()):
            for k in range(1, 9):
                masks = [tokenizer.mask_token_id] * (9 - k if regime == "padded" else 1)
                ids = torch.tensor([[tokenizer.cls_token_id, *x[:k], *masks, tokenizer.sep_token_id]])
                scores = network(input_ids=ids).logits[0, 1 + k]
                assert nll[b, k - 1].item() == pytest.approx(-scores.log_softmax(0)[x[k]].item(), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_encode_is_the_librarys_and_knows_padding(folders, name):
    network, tokenizer, path = folders[name]
    run, causal, tokens = hub.load_hub_model(f"hf:{path}"), name != "bert", some_tokens(tokenizer)
    states = run.model.encode(tokens, causal=causal, every_layer=True)
    expected = network.base_model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(states) == 3 and states[-1].shape == (3, 9, run.model.config.width)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(states, expected))
    padding = torch.arange(9) >= torch.tensor([[9], [6], [2]])
    whole = run.model.encode(tokens.masked_fill(padding, 5), padding, causal=causal)
    for row, length in enumerate((9, 6, 2)):
        alone = run.model.encode(tokens[row:row + 1, :length], causal=causal)[0]
        assert torch.allclose(whole[row, :length], alone, atol=1e-5)
    with pytest.raises(BadInput, match="attention causal|attention full"):
        run.model.encode(tokens, causal=not causal)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_pairs_are_the_librarys(folders, name):
    _, tokenizer, path = folders[name]
    ours, (a, b) = hub.load_hub_model(f"hf:{path}").tokenizer, ("the cat sat", "a dog ran after it")
    ids = [ours.encode(text).tolist() for text in (a, b)]
    assert ids == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (a, b)]
    assert " ".join(ours.decode([*ids[0], ours.separator, *ids[1]]).split()) == f"{a} {b}"
    if name == "bert":
        assert ours.pair(ids[0]) == tokenizer(a)["input_ids"]
        assert ours.pair(*ids) == tokenizer(a, b)["input_ids"]
    else:
        prefix = tokenizer(a)["input_ids"][:-len(ids[0])]
        assert ours.pair(*ids) == [*prefix, *ids[0], ours.separator, *ids[1], ours.separator]
    # written in a text it is text
    assert ours.separator not in ours.encode(f"the {tokenizer.eos_token} cat").tolist()


def test_commands(folders, tmp_path):
    """Perplexity, and a greedy sample that goes on from its last half where it outgrows 40 tokens."""
    (tmp_path / "text.txt").write_text(TEXT)
    for name in ("gpt2", "bert"):
        network, tokenizer, path = folders[name]
        x = call_json(f"evaluate.py perplexity hf:{path} --data {tmp_path / 'text.txt'} --length 12 "
                      "--max-sequences 5 --dtype fp32")
        total = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) + 1
        for r in x["results"]["regimes"].values():
            assert r["bits_per_byte"] == pytest.approx(r["nll"] / 0.6931472 * total / len(TEXT), rel=1e-4)
    assert call(f"evaluate.py generate hf:{path} --prompt 'the cat' --tokens 5 --order confident")
    network, tokenizer, path = folders["gpt2"]
    found = call_json(f"evaluate.py generate hf:{path} --prompt 'the cat' --tokens 60 --temperature 0 "
                      "--dtype fp32")
    ids, start = tokenizer("the cat")["input_ids"], 0
    for _ in range(60):
        start = len(ids) - 20 if len(ids) - start >= 40 else start
        ids.append(network(input_ids=torch.tensor([ids[start:]])).logits[0, -1].argmax().item())
    assert found["texts"][0] == hub.load_hub_model(f"hf:{path}").tokenizer.decode(ids)


def test_a_run_beside_hub_models(folders, trained, tmp_path):
    """On one text, each beside a unigram model of its own tokens; hub models of one tokenizer are paired."""
    (tmp_path / "text.txt").write_text(TEXT)
    gpt2, run = f"hf:{folders['gpt2'][2]}", trained("mlm --mask 0.3")
    line = f"--data {tmp_path / 'text.txt'} --max-sequences 4 --dtype fp32"
    ours, theirs = call_json(f"evaluate.py perplexity {run} {gpt2} {line}")["checkpoints"]
    assert theirs["difference"] is None and theirs["unigram"]["nll"] > 0 < ours["unigram"]["nll"]
    assert {ours["objective"], theirs["objective"]} == {"mlm 0.3", "ar"}
    one = call_json(f"evaluate.py perplexity {run} {run} {line} --regime truncated")["checkpoints"][1]
    assert list(one["regimes"]) == ["truncated"] and one["difference"]["nll"] == 0
    two = call_json(f"evaluate.py perplexity {gpt2} {gpt2} {line} --length 12")["checkpoints"][1]
    assert two["length"] == 12 and two["difference"]["interval"] == [0, 0]
    with pytest.raises(BadInput, match="hf: models"):
        call(f"evaluate.py perplexity {gpt2} {run} {line} --length 12")


def test_the_length_of_a_hub_model(folders, capsys):
    gpt2 = f"hf:{folders['gpt2'][2]}"
    assert hub.load_hub_model(gpt2, length=5000).settings.length == 40
    assert "room for 40 tokens, not for 5000" in capsys.readouterr().err
    with pytest.raises(BadInput, match="needs 2"):
        hub.load_hub_model(gpt2, length=1)


def test_states_narrower_than_hidden_size(tmp_path):
    """OPT-350m projects its states down: a classifier has to fit what the network returns."""
    config = transformers.OPTConfig(vocab_size=300, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64,
                                    num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer("gpt2").save_pretrained(tmp_path)
    run = hub.load_hub_model(f"hf:{tmp_path}")
    assert run.model.config.width == run.model.encode(torch.tensor([[11, 12]]), causal=True).shape[-1] == 16


@pytest.mark.parametrize("name, says", [("not causal", "not causal"), ("capped", "after the output layer"),
                                        ("headless", "lacks weights")])
def test_what_would_give_wrong_numbers_is_refused(folders, name, says):
    with pytest.raises(BadInput, match=says):
        hub.load_hub_model(f"hf:{folders[name][2]}")


def test_a_pipe_or_a_link_to_a_device_is_refused_and_not_waited_for(folders, tmp_path):
    for path in folders["gpt2"][2].iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert hub.load_hub_model(f"hf:{tmp_path}").path == "causal"     # the hub keeps files as links, too
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(BadInput, match="config.json"):
        hub.load_hub_model(f"hf:{tmp_path}")
