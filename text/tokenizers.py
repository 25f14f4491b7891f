"""From text to token ids and back: bytes, or WordPiece and BPE of the `tokenizers` package."""
import itertools
import json

import numpy as np

from support.cli import BadInput, import_optional

SEPARATOR, UNKNOWN = "[SEP]", "[UNK]"

class ByteTokenizer:
    """UTF-8 bytes as tokens, and a separator. Needs no package and no training."""

    kind, vocab, separator, unknown = "byte", 257, 256, None

    def encode(self, text):
        """str -> uint16 array of ids."""
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def encode_all(self, texts):
        """A list of str -> a list of arrays."""
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """Ids -> str; each separator becomes an empty line."""
        parts = itertools.groupby(np.asarray(ids).tolist(), key=lambda i: i == self.separator)
        return "".join("\n\n" if cut else bytes(part).decode("utf-8", "replace") for cut, part in parts)

    def to_json(self):
        return json.dumps({"kind": self.kind})


class TrainedTokenizer:
    """A WordPiece (lower-cased, accents stripped, as in the Cramming protocol) or byte-level BPE tokenizer of
    the `tokenizers` package."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "[SEP]" written in a text is text
        self.kind = type(tokenizer.model).__name__.lower()
        self.vocab = tokenizer.get_vocab_size()
        self.separator = tokenizer.token_to_id(SEPARATOR)
        self.unknown = tokenizer.token_to_id(UNKNOWN)  # None where there is none, as in BPE
        if self.separator is None:
            raise BadInput(f"the tokenizer has no {SEPARATOR} token; make one with python data.py text")

    @classmethod
    def train(cls, kind, vocab, texts):
        """Train on an iterator of str."""
        tokenizers = import_optional("tokenizers")
        if kind == "wordpiece":
            tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=UNKNOWN))
            tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = tokenizers.decoders.WordPiece()
            trainer = tokenizers.trainers.WordPieceTrainer(
                vocab_size=vocab, special_tokens=[UNKNOWN, SEPARATOR], show_progress=False)
        else:
            tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = tokenizers.decoders.ByteLevel()
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=vocab, special_tokens=[SEPARATOR], show_progress=False,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text):
        """str -> array of ids."""
        return self.encode_all([text])[0]

    def encode_all(self, texts):
        """A list of str -> a list of arrays, on all cores: many short texts, or few long ones cut at line
        ends."""
        pieces = [list(cut_at_lines(text, 1 << 14)) for text in texts]
        flat = list(itertools.chain.from_iterable(pieces))
        encoded = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        ids = (itertools.chain.from_iterable(next(encoded).ids for _ in parts) for parts in pieces)
        return [np.fromiter(one, dtype=token_type(self.vocab)) for one in ids]

    def decode(self, ids):
        """Ids -> str; each separator becomes an empty line."""
        parts = itertools.groupby(np.asarray(ids).tolist(), key=lambda i: i == self.separator)
        return "".join("\n\n" if cut else self.tokenizer.decode(list(part)) for cut, part in parts)

    def to_json(self):
        return self.tokenizer.to_str()


def tokenizer_from_json(text):
    """The tokenizer that `to_json` described."""
    try:
        content = json.loads(text)
        if content.get("kind") == ByteTokenizer.kind:
            return ByteTokenizer()
        return TrainedTokenizer(import_optional("tokenizers").Tokenizer.from_str(text))
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  the tokenizers package raises nothing more specific
        raise BadInput(f"not a tokenizer that data.py wrote: {error}") from None


def token_type(vocab):
    return np.uint16 if vocab <= 1 << 16 else np.uint32


def cut_at_lines(text, size):
    """Cut a text into pieces of about `size` characters that end at line ends."""
    start = 0
    while start < len(text):
        stop = start + size
        stop = text.find("\n", stop) + 1 or len(text) if stop < len(text) else len(text)
        yield text[start:stop]
        start = stop
