"""Whisper's marks of time, beginnings and segments are those of transformers, for any tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from memopt.errors import BundleError, ConfigurationError
from memopt.runtimes.generate.speech import SpeechTokens, pieces_of, timed
from tests.runtimes.generate.speech_kit import END, LANGUAGES, MARKS, START, TASKS, WITHOUT, WORDS

TOKENS = st.lists(
    st.one_of(st.integers(60, 70), st.integers(MARKS, WORDS - 1)), min_size=0, max_size=9
)
EN, DE = LANGUAGES.values()
TRANSLATE, TRANSCRIBE = TASKS.values()


def tokens(**settings: Any) -> SpeechTokens:
    usual = {"lang_to_id": LANGUAGES, "task_to_id": TASKS, "no_timestamps_token_id": WITHOUT}
    return SpeechTokens.of(START, {**usual, **settings})


@settings(max_examples=100)
@given(written=TOKENS, seed=st.integers(0, 9), first=st.sampled_from([None, 0, 20]))
def test_marks_of_time_are_forbidden_as_in_transformers(
    written: list[int], seed: int, first: int | None
) -> None:
    """Pairs, order, the first mark, and a mark where all together are likelier than any word."""
    config = SimpleNamespace(
        no_timestamps_token_id=WITHOUT,
        eos_token_id=END,
        bos_token_id=END,
        max_initial_timestamp_index=first,
    )
    scores = np.random.default_rng(seed).normal(0, 3, WORDS).astype(np.float32)
    rule = WhisperTimeStampLogitsProcessor(config, begin_index=2)  # type: ignore[arg-type]
    ids = torch.tensor([[START, EN, *written]])
    wanted = rule(ids, torch.from_numpy(scores)[None])[0].numpy()
    found = timed(scores, written, tokens(max_initial_timestamp_index=first), END)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))


@settings(max_examples=100)
@given(written=TOKENS.filter(bool), seek=st.integers(0, 500), frames=st.integers(1, 200))
def test_segments_are_cut_as_in_transformers(written: list[int], seek: int, frames: int) -> None:
    """Start, end and tokens of each, and where the next window begins."""
    wanted, ahead = WhisperGenerationMixin._retrieve_segment(
        seek_sequence=torch.tensor(written),
        seek_outputs=[{}],
        time_offset=torch.tensor([seek * 0.02 / 2], dtype=torch.float64),
        timestamp_begin=MARKS,
        seek_num_frames=torch.tensor([frames]),
        time_precision=0.02,
        time_precision_features=0.01,
        input_stride=2,
        prev_idx=0,
        idx=0,
        return_token_timestamps=False,
        decoder_input_ids=torch.tensor([[START]]),
    )
    found, own = pieces_of(written, MARKS, seek, frames)
    assert [list(piece.tokens) for piece in found] == [s["tokens"].tolist() for s in wanted]
    times = [float(s[at]) for s in wanted for at in ("start", "end")]
    # 30 frames are 14 marks there, by float32's rounding.
    assert [at for p in found for at in (p.start, p.end)] == pytest.approx(times, abs=0.0201)
    # One that would stay where it is goes on instead: transformers never ends there.
    assert own == (int(ahead) if int(ahead) > 0 else frames)


@pytest.mark.parametrize(
    ("stated", "asked", "beginning"),
    [
        ({}, (None, None, False), (START, None, WITHOUT)),
        ({}, (None, None, True), (START, None)),
        ({}, ("en", None, False), (START, EN, TRANSCRIBE, WITHOUT)),
        ({}, ("<|de|>", "translate", True), (START, DE, TRANSLATE)),
        ({}, (None, "translate", False), (START, None, TRANSLATE, WITHOUT)),
        (
            {"forced_decoder_ids": [[1, None], [2, TRANSCRIBE]]},
            (None, None, False),
            (START, None, TRANSCRIBE, WITHOUT),
        ),
        (
            {"forced_decoder_ids": [[1, DE], [2, TRANSCRIBE], [3, WITHOUT]]},
            (None, None, True),
            (START, DE, TRANSCRIBE),
        ),
        ({"is_multilingual": False}, (None, None, False), (START, WITHOUT)),
    ],
)
def test_a_text_begins_as_its_checkpoint_says(
    stated: dict[str, Any], asked: tuple[Any, Any, bool], beginning: tuple[int | None, ...]
) -> None:
    """Start, language, task and whether there are marks, in transformers' order."""
    assert tokens(**stated).beginning(*asked) == beginning


def test_what_a_checkpoint_does_not_know_is_named() -> None:
    """Languages, tasks and marks that are not there, and gaps in what is forced."""
    with pytest.raises(ConfigurationError, match="language 'xx' is not known"):
        tokens().beginning("xx", None, False)
    with pytest.raises(ConfigurationError, match="task 'summarise' is not known"):
        tokens().beginning(None, "summarise", False)
    with pytest.raises(ConfigurationError, match="no marks of time"):
        tokens(no_timestamps_token_id=None).beginning("en", None, True)
    with pytest.raises(ConfigurationError, match="it knows one only"):
        tokens(is_multilingual=False).beginning("en", None, False)
    with pytest.raises(BundleError, match="do not follow each other"):
        tokens(forced_decoder_ids=[[2, EN]])
