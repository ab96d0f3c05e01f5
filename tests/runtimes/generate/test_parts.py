"""Sampling, words and templates, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import BundleError, InputError
from memopt.runtimes.generate.chat import prompt_of
from memopt.runtimes.generate.sampling import Sampler, Sampling
from memopt.runtimes.generate.words import Words

MESSAGES = [{"role": "user", "content": "hi"}]


def folder(path: Path, template: str) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 3, 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_what_may_be_drawn_is_what_transformers_leaves(
    seed: int, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    """Every drawn token is one that transformers' own processors leave, in the same order."""
    logits = np.random.default_rng(seed).normal(0, 2, 20).astype(np.float32)
    seen = [1, 5, 5, 7]
    scores = torch.from_numpy(logits)[None]
    steps: list[object] = [transformers.RepetitionPenaltyLogitsProcessor(penalty)]
    steps += [transformers.TemperatureLogitsWarper(0.7)]
    steps += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    steps += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    for step in steps:
        scores = step(torch.tensor([seen]), scores)  # type: ignore[operator]
    allowed = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
    sampler = Sampler(
        Sampling(
            temperature=0.7,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=penalty,
            seed=seed,
        )
    )
    drawn = {sampler.pick(logits, seen)[0] for _ in range(60)}
    assert drawn <= allowed
    likely = torch.softmax(scores[0], 0)
    assert {i for i in allowed if likely[i] > 0.2} <= drawn


def test_draws_have_the_models_own_frequencies() -> None:
    """A thousand draws come as often as the softmax says."""
    shares = np.array([0.6, 0.3, 0.1])
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    drawn = [sampler.pick(np.log(shares).astype(np.float32), [])[0] for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn) / 2000, shares, atol=0.04)


def test_no_half_character_is_given_out() -> None:
    """A letter of four bytes, one a token, comes when it is whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = Words(tokenizer)
    pieces = [words.add(token) for token in tokenizer.encode("a😀é").ids]
    assert [piece for piece in pieces if piece] == ["a", "😀", "é"]
    broken = Words(tokenizer)
    assert "".join(map(broken.add, tokenizer.encode("a😀").ids[:-1])) + broken.finish() == "a"


def test_a_template_is_a_strangers_program(tmp_path: Path) -> None:
    """It reaches no attributes, and what it raises or gets wrong is one line."""
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BundleError, match="reaches for what it must not"):
        prompt_of(folder(tmp_path, escape), MESSAGES, {})
    with pytest.raises(InputError, match="refuses these messages: only users"):
        prompt_of(folder(tmp_path, "{{ raise_exception('only users') }}"), MESSAGES, {})
    with pytest.raises(BundleError, match="does not work on these messages"):
        prompt_of(folder(tmp_path, "{{ messages[0]['content'] + 1 }}"), MESSAGES, {})
    with pytest.raises(BundleError, match="does not work"):
        prompt_of(folder(tmp_path, "{% for %}"), MESSAGES, {})
    with pytest.raises(InputError, match="there are no messages"):
        prompt_of(folder(tmp_path, "x"), [], {})
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(BundleError, match="has no chat template"):
        prompt_of(tmp_path, MESSAGES, {})


def test_a_prompt_is_transformers_own(tmp_path: Path) -> None:
    """The usual extras of templates work: loop controls, tojson, the special tokens."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
    )
    messages = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "b"}] * 2
    found = prompt_of(folder(tmp_path, template), messages, {"bos_token": "<s>"})
    from transformers.utils.chat_template_utils import render_jinja_template

    wanted, _ = render_jinja_template(
        [messages], chat_template=template, bos_token="<s>", add_generation_prompt=True
    )
    assert found == wanted[0]
