"""Text to token ids with ``tokenizers`` alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle, read_json
from memopt.errors import BundleError
from memopt.positions import OFFSET_POSITIONS, position_limit
from memopt.runtimes.batching import (
    USUAL,
    Batch,
    Budget,
    UnusableItems,
    bucket,
    by_budget,
    in_order,
)
from memopt.tasks.classes import infers
from memopt.weights.kinds import FULL_LENGTH, STATIC, UNPADDED
from memopt.weights.sentence import default_prompt, lower_cased, read_sentence
from memopt.weights.tokenizer import lower_case

if TYPE_CHECKING:
    from numpy.typing import NDArray

# transformers writes 1e30 for "no limit"; no model has positions beyond this.
_NO_LIMIT = 1_000_000
# Texts tokenized at once, while the chunk before them runs: nothing runs beside the first, so it is
# small. Each chunk sweeps over the widths once, and a new shape costs a runtime as much as a tenth
# of a batch, so later ones are large, up to this many characters: the tokenizer holds some hundred
# bytes a token, before it cuts, of two chunks at a time.
CHUNKS = (64, 512, 2048)
_MOST_CHARACTERS = 1 << 18
_FIRST = np.zeros(1, np.intp)


# What one input is, for error messages.
_TAKES = {"one": "str", "pair": "a pair of str", "either": "str or a pair of str"}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A text that its sender has tokenized; special tokens are among the ids, or are left out.

    >>> len(TokenIds((101, 102)))
    2
    """

    ids: tuple[int, ...]

    @property
    def type_ids(self) -> list[int]:
        """One segment."""
        return [0] * len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


class TextFrontEnd:
    """Turns texts, or pairs of texts, into padded batches of what the graph wants.

    Of a pair that is too long the longer text is cut, token by token, as transformers does.

    Args:
        bundle: where ``tokenizer.json`` lies, how long inputs may be, and whether they are pairs.
        inputs: the names of the graph's inputs.
    """

    def __init__(self, bundle: Bundle, inputs: Sequence[str]) -> None:
        self._tokenizer = open_tokenizer(bundle)
        if lower_cased(bundle.path):
            lower_case(self._tokenizer)
        self._folder = bundle.path
        self._prompt = default_prompt(bundle.path)
        self._takes = bundle.task.takes
        self._wants_mask = "attention_mask" in inputs
        self._wants_types = "token_type_ids" in inputs
        self._alike = bundle.manifest.model_type in UNPADDED
        self._full = bundle.manifest.model_type in FULL_LENGTH
        # Static embeddings are the mean of the text's own tokens alone, of none it is zero.
        self._special = bundle.manifest.model_type != STATIC
        self._wants_pooling = "pooling_mask" in inputs
        padding = self._tokenizer.padding
        self._pad = padding["pad_id"] if padding else _pad_id(bundle, self._tokenizer)
        self.max_length = _max_length(bundle)
        self._tokenizer.no_padding()
        # A model without a limit gets whole texts, whatever was saved with the tokenizer.
        cut = self._tokenizer.truncation or {}
        self._tokenizer.no_truncation()
        if self.max_length is not None:
            side = _tokenizer_config(bundle).get("truncation_side") or cut.get("direction", "right")
            self._tokenizer.enable_truncation(self.max_length, direction=side)
        self._rows = _rows(bundle) or np.iinfo(np.int64).max
        if self._pad >= self._rows:
            self._pad = 0  # padding is masked, any id will do
        # Single sequences have type 0 in nearly every tokenizer; ask once instead of per text.
        self._types = any(self._tokenizer.encode("a").type_ids)
        self._skip = self._count_prompt()

    def with_prompt(self, prompt: str) -> TextFrontEnd:
        """Return a front end that puts ``prompt`` before every text; it shares the tokenizer.

        Raises:
            BundleError: the model does not pool its prompt, and the graph was made for one prompt.
        """
        if prompt == self._prompt:
            return self
        sentence = read_sentence(self._folder)
        if sentence and not sentence.include_prompt and not self._wants_pooling:
            raise BundleError(
                f"the graph in {self._folder} leaves the tokens of {self._prompt!r} out of its "
                "vectors, and no other prompt's",
                fix=f"run: memopt export {self._folder}",
            )
        other = copy(self)
        other._prompt = prompt
        other._skip = other._count_prompt()
        return other

    def _count_prompt(self) -> int:
        """Return how many tokens the prompt puts before a text, the first special one too.

        A trailing special token ends the text, not the prompt; so counts sentence-transformers.
        """
        if not self._prompt or not self._wants_pooling:
            return 0
        encoding = self._tokenizer.encode(self._prompt)
        return int(len(encoding) - encoding.special_tokens_mask[-1])

    def check(self, item: Any) -> str | None:
        """Return why ``item`` cannot be encoded, None when it can."""
        if isinstance(item, TokenIds):
            return self._refused(item)
        if isinstance(item, str) and self._takes != "pair":
            return _unencodable(item)
        if self._takes != "one" and _is_pair(item):
            return _unencodable(item[0]) or _unencodable(item[1])
        return f"is {type(item).__name__}, not {_TAKES[self._takes]}"

    def chunks(self, items: Sequence[Any]) -> list[NDArray[np.intp]]:
        """Return the positions of ``items`` in chunks of similar length, longest first.

        Characters stand for tokens here, so that a chunk can be tokenized while another runs. The
        longest come first: memory peaks at once, not at the end of an hour.
        """
        lengths = np.fromiter((_characters(item) for item in items), np.intp, len(items))
        order = np.argsort(-lengths, kind="stable")
        if len(order) <= 2 * CHUNKS[0]:
            return [order] if len(order) else []
        chunks: list[NDArray[np.intp]] = []
        start = 0
        while start < len(order):
            size = CHUNKS[min(len(chunks), len(CHUNKS) - 1)]
            longest = max(int(lengths[order[start]]), 1)
            stop = start + min(size, max(CHUNKS[0], _MOST_CHARACTERS // longest))
            chunks.append(order[start:stop])
            start = stop
        return chunks

    def prepare(self, items: Sequence[Any], budget: Budget = USUAL) -> list[Batch]:
        """Tokenize one chunk and cut it into batches of similar length.

        Raises:
            UnusableItems: texts with a token that the model has no embedding of.
        """
        return self.batches(self.tokenize(items), budget)

    def tokenize(self, items: Sequence[Any]) -> list[Any]:
        """Return encodings of texts or pairs, cut, not padded; token ids stand for themselves."""
        texts = [item for item in items if not isinstance(item, TokenIds)]
        encodings: list[Any] = self._tokenizer.encode_batch_fast(
            self._texts(texts), add_special_tokens=self._special
        )
        if len(texts) == len(items):
            return encodings
        rest = iter(encodings)
        return [item if isinstance(item, TokenIds) else next(rest) for item in items]

    def batches(self, encodings: list[Any], budget: Budget = USUAL) -> list[Batch]:
        """Cut what was tokenized into batches of similar length.

        Raises:
            UnusableItems: texts with a token that the model has no embedding of.
        """
        if self._full and self.max_length is not None:
            count = budget.batch_size or max(1, budget.tokens // self.max_length)
            batches = [
                Batch(part, self._feed([encodings[row] for row in part], self.max_length))
                for part in in_order(len(encodings), count)
            ]
        elif len(encodings) == 1 and not self._alike:
            # One sentence takes half a millisecond in a quantized graph: sorting would show.
            length = budget.rounded(len(encodings[0]), 1, self.max_length)
            width = bucket(length, self.max_length)
            batches = [Batch(_FIRST, self._feed(encodings, width))]
        else:
            lengths = np.fromiter((len(e) for e in encodings), np.intp, len(encodings))
            batches = [
                Batch(rows, self._feed([encodings[row] for row in rows], width))
                for rows, width in by_budget(lengths, budget, self.max_length, alike=self._alike)
            ]
        # A runtime may answer an id beyond the table with whatever lies there.
        if any(batch.feed["input_ids"].max(initial=0) >= self._rows for batch in batches):
            self._refuse_beyond(encodings)
        return batches

    def _refused(self, tokens: TokenIds) -> str | None:
        """Return why ids cannot be used; cut, they could lose the special token at their end."""
        if not 1 <= len(tokens) <= (self.max_length or len(tokens)):
            return f"has {len(tokens)} tokens, and the model takes 1 to {self.max_length}"
        if not 0 <= min(tokens.ids) <= max(tokens.ids) < self._rows:
            return f"has tokens beyond the {self._rows} that the model knows"
        return None

    def _texts(self, items: Sequence[Any]) -> list[Any]:
        """Return what the tokenizer is given: texts with the prompt, pairs as tuples."""
        if self._takes != "one":
            return [item if isinstance(item, str) else tuple(item) for item in items]
        return [self._prompt + text for text in items] if self._prompt else list(items)

    def _refuse_beyond(self, encodings: list[Any]) -> None:
        highest = [max(encoding.ids, default=0) for encoding in encodings]
        beyond = {
            index: f"holds the token {self._tokenizer.id_to_token(token)!r} with id {token}, and "
            f"the model knows {self._rows} (its tokenizer.json is of another model)"
            for index, token in enumerate(highest)
            if token >= self._rows
        }
        if beyond:
            raise UnusableItems(beyond)

    def _feed(self, encodings: list[Any], width: int) -> dict[str, NDArray[np.int64]]:
        shape = (len(encodings), width)
        ids = np.full(shape, self._pad, np.int64)
        given, mask = self._places(encodings, shape)
        # All rows at once: of short texts one array a row takes as long as tokenizing them.
        ids[given] = _joined(encoding.ids for encoding in encodings)
        feed = {"input_ids": ids}
        if self._wants_mask:
            feed["attention_mask"] = mask
        if self._wants_pooling:
            feed["pooling_mask"] = mask.copy()
            feed["pooling_mask"][:, : self._skip] = 0
        if self._wants_types:
            types = np.zeros(shape, np.int64)
            if self._types or self._takes != "one":
                types[given] = _joined(encoding.type_ids for encoding in encodings)
            feed["token_type_ids"] = types
        return feed

    def _places(
        self, encodings: list[Any], shape: tuple[int, int]
    ) -> tuple[Any, NDArray[np.int64]]:
        """Return where a batch's tokens stand, as an index, and its attention mask."""
        # A tokenizer without special tokens has none for "": the model then sees one padding
        # token, because a row that is masked everywhere gives NaN in the softmax.
        least = 1 if self._special else 0
        if len(encodings) == 1:
            # Of one text, slices: comparing and indexing would be a fifth of its preparation.
            length = len(encodings[0])
            mask = np.zeros(shape, np.int64)
            mask[0, : max(length, least)] = 1
            return np.s_[0, :length], mask
        lengths = np.fromiter(map(len, encodings), np.intp, len(encodings))[:, None]
        columns = np.arange(shape[1])
        return columns < lengths, (columns < np.maximum(lengths, least)).astype(np.int64)


def _joined(rows: Iterable[list[int]]) -> list[int]:
    joined: list[int] = []
    for row in rows:
        joined += row
    return joined


def _unencodable(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate at position {error.start}"
    return None


def _is_pair(item: Any) -> bool:
    pair = isinstance(item, tuple | list) and len(item) == 2
    return pair and all(isinstance(text, str) for text in item)


def _characters(item: Any) -> int:
    if isinstance(item, TokenIds):
        return 4 * len(item)
    return len(item) if isinstance(item, str) else sum(map(len, item))


def open_tokenizer(bundle: Bundle) -> Any:
    """Return a bundle's ``tokenizers.Tokenizer``, as it was saved.

    Raises:
        BundleError: its file is missing or damaged.
    """
    from tokenizers import Tokenizer

    path = bundle.path / "tokenizer.json"
    try:
        # Read here: from_file reports a missing file and a damaged one alike.
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing", fix="convert the model again") from error
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path} is not a tokenizer ({error})") from error


def takes_pairs(bundle: Bundle) -> bool:
    """Say whether an input of a bundle is a pair of texts: rerankers, and models of inference."""
    takes = bundle.task.takes
    return takes == "pair" or (takes == "either" and infers(bundle.config()))


def _tokenizer_config(bundle: Bundle) -> dict[str, Any]:
    path = bundle.path / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _max_length(bundle: Bundle) -> int | None:
    """Return how many tokens the model takes, special tokens included."""
    if bundle.manifest.max_length:
        config = bundle.config() if (bundle.path / "config.json").is_file() else {}
        # Bundles of older versions have limits that some position tables do not hold.
        table = position_limit(config) if config.get("model_type") in OFFSET_POSITIONS else None
        return min(bundle.manifest.max_length, table or bundle.manifest.max_length)
    limit = _tokenizer_config(bundle).get("model_max_length")
    if isinstance(limit, int | float) and limit < _NO_LIMIT:
        return int(limit)
    return position_limit(bundle.config())


def _rows(bundle: Bundle) -> int | None:
    """Return how many rows the table of token embeddings has, None when the config does not say."""
    path = bundle.path / "config.json"
    config = read_json(path) if path.is_file() else {}
    rows = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    return rows if isinstance(rows, int) and rows > 0 else None


def _pad_id(bundle: Bundle, tokenizer: Any) -> int:
    token = _tokenizer_config(bundle).get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        found = bundle.config().get("pad_token_id")
    # Models without a padding token (GPT-2) mask the padding: any id will do.
    return found if isinstance(found, int) else 0
