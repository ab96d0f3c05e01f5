"""Two graphs write greedily from sources of several lengths in one batch; torch from each alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from memopt.exporters.check import Run, Tolerance, likeliest, same_token
from memopt.exporters.halves import cross_names, own_names
from memopt.exporters.pair_cases import LOGITS, SOURCE_MASK, Sizes, source_of, source_states
from memopt.runtimes.keys_values import PAST, held
from memopt.runtimes.torch_model import LoadedModel

STEPS = 64  # tokens that the graphs write beside torch
_LENGTHS = (9, 1, 5)
_FIX = "nothing was written; worth a report"


def walk(
    encode: Run,
    decode: Run,
    loaded: LoadedModel,
    sizes: Sizes,
    tolerance: Tolerance,
    name: str,
) -> int:
    """Write from the model's first token on.

    Returns:
        How many tokens were equal. A row ends with the model's end token, or where torch's two
        likeliest tokens are closer than the tolerance: either is right there.

    Raises:
        ExportError: another token than torch's.
    """
    import torch

    random = np.random.default_rng(9)
    lengths = [min(n, sizes.source or n) for n in _LENGTHS]
    alone = [source_of(loaded, 1, n, False, random) for n in lengths]
    steps = min(STEPS, (sizes.target or STEPS + 1) - 1)
    start = start_token(loaded.config)
    with torch.no_grad():
        expected = [_written(loaded, source, start, steps) for source in alone]
    together = _together(alone, loaded.config.pad_token_id or 0)
    cross = held(encode(together))
    return _followed(decode, together, cross, start, expected, sizes, tolerance, name)


def start_token(config: Any) -> int:
    """Return the token that a decoder begins with."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    return 0


def _together(alone: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    if "input_features" in alone[0]:
        return {"input_features": np.concatenate([s["input_features"] for s in alone])}
    width = max(source["input_ids"].shape[1] for source in alone)

    def wide(name: str, fill: int) -> Any:
        rows = [source[name][0] for source in alone]
        return np.stack([np.pad(r, (0, width - len(r)), constant_values=fill) for r in rows])

    return {"input_ids": wide("input_ids", pad), "attention_mask": wide("attention_mask", 0)}


def _written(
    loaded: LoadedModel, source: Mapping[str, Any], start: int, steps: int
) -> list[tuple[int, float]]:
    """Return torch's greedy tokens, each with its lead over the next one relative to its size."""
    import torch

    states = source_states(loaded, source)
    masks = {n: torch.from_numpy(v) for n, v in source.items() if n == "attention_mask"}
    ends = loaded.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    cache, ids, found = None, torch.tensor([[start]]), []
    for _ in range(steps):
        result = loaded.module(
            encoder_outputs=states,
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            **masks,
        )
        cache = result.past_key_values
        found.append(likeliest(result.logits[0, -1]))
        if found[-1][0] in ends:
            break
        ids = torch.tensor([[found[-1][0]]])
    return found


def _followed(
    decode: Run,
    source: Mapping[str, Any],
    cross: Mapping[str, Any],
    start: int,
    expected: list[list[tuple[int, float]]],
    sizes: Sizes,
    tolerance: Tolerance,
    name: str,
) -> int:
    batch = len(expected)
    fixed = {n: cross[n] for n in cross_names(sizes.layers, PAST)}
    if "attention_mask" in source:
        fixed[SOURCE_MASK] = source["attention_mask"]
    empty = np.zeros((batch, sizes.heads, 0, sizes.size), np.float32)
    own = dict.fromkeys(own_names(sizes.layers, PAST), empty)
    ids, equal, open_rows = np.full((batch, 1), start, np.int64), 0, set(range(batch))
    for step in range(max(map(len, expected))):
        outputs = decode({"input_ids": ids, **fixed, **own})
        for row in sorted(open_rows):
            if step >= len(expected[row]):
                open_rows.discard(row)
                continue
            got = int(outputs[LOGITS][row, -1].argmax())
            where = f"{name}: token {step + 1} of source {row}"
            if same_token(got, expected[row][step], tolerance, where, _FIX):
                equal += 1
            else:
                open_rows.discard(row)
        own = held(outputs)
        following = [row[min(step, len(row) - 1)][0] for row in expected]
        ids = np.array(following, np.int64)[:, None]
    return equal
