"""Federated averaging of LoRA: products, frozen A, robustness."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.federation.delta.adapters import CONFIG_TENSOR
from memopt.federation.delta.aggregate import AggregateSettings, aggregate
from memopt.federation.failures import SyncFailure

A, B = "m.lora_A.weight", "m.lora_B.weight"


def client(seed: int, rank: int = 4, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {A: rng.normal(size=(rank, 20)), B: rng.normal(size=(30, rank)) * scale}


def product(weights: dict[str, np.ndarray]) -> np.ndarray:
    return weights[B] @ weights[A]


def test_the_product_is_the_best_low_rank_average() -> None:
    """`product` gives the SVD truncation of the weighted mean of B A, with its error."""
    clients, shares = [client(s) for s in range(3)], [1, 2, 5]
    exact = sum(product(c) * s for c, s in zip(clients, shares, strict=True)) / 8
    result = aggregate(clients, shares)
    u, s, vt = np.linalg.svd(exact)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    np.testing.assert_allclose(product(result.weights), best, atol=1e-10)
    wanted = np.linalg.norm(exact - best) / np.linalg.norm(exact)
    assert result.error == pytest.approx(wanted)
    full = aggregate(clients, shares, AggregateSettings(rank=12))
    np.testing.assert_allclose(product(full.weights), exact, atol=1e-10)
    assert full.error < 1e-12


def test_naive_reports_how_far_it_is_off() -> None:
    """Averaging A and B apart is another update, and `naive` says by how much."""
    clients = [client(s) for s in range(3)]
    exact = sum(product(c) for c in clients) / 3
    result = aggregate(clients, settings=AggregateSettings(method="naive"))
    off = np.linalg.norm(product(result.weights) - exact) / np.linalg.norm(exact)
    assert result.error == pytest.approx(off)
    assert result.error > aggregate(clients).error


def test_frozen_a_is_exact_and_insists_on_it() -> None:
    """With one A everywhere the mean of B is the mean of the products; otherwise it is refused."""
    clients = [client(0) | {B: client(s)[B]} for s in range(3)]
    result = aggregate(clients, settings=AggregateSettings(method="freeze-a"))
    exact = sum(product(c) for c in clients) / 3
    np.testing.assert_allclose(product(result.weights), exact, atol=1e-12)
    with pytest.raises(SyncFailure, match="train with A frozen"):
        aggregate([client(0), client(1)], settings=AggregateSettings(method="freeze-a"))


def test_clients_of_different_rank_are_averaged() -> None:
    """`product` takes ranks 2, 4 and 8 together; the result has the largest."""
    result = aggregate([client(s, rank) for s, rank in enumerate((2, 4, 8))])
    assert result.weights[A].shape == (8, 20)


@pytest.mark.parametrize("robust", ["median", "trimmed"])
def test_a_bad_client_moves_the_mean_and_not_the_median(robust) -> None:
    """One client of five sending a huge update spoils the mean only; NaN is left out."""
    good = [client(0) for _ in range(4)]
    bad = client(9, scale=1e6)
    settings = AggregateSettings(robust=robust)
    np.testing.assert_allclose(
        product(aggregate([*good, bad], settings=settings).weights), product(good[0]), rtol=1e-6
    )
    assert np.abs(product(aggregate([*good, bad]).weights)).max() > 1e4
    broken = client(1) | {A: np.full((4, 20), np.nan)}
    result = aggregate([*good, broken])
    assert result.left_out == (4,)
    np.testing.assert_allclose(product(result.weights), product(good[0]), rtol=1e-6)


def test_the_norm_bound_scales_large_updates_down() -> None:
    """An update over the bound is brought to it and named."""
    result = aggregate([client(9, scale=1e6)], settings=AggregateSettings(max_norm=2.0))
    assert np.linalg.norm(product(result.weights)) == pytest.approx(2.0)
    assert result.clipped == (0,)


def test_clients_that_do_not_match_are_refused() -> None:
    """Other names, shapes or weights than agreed are typed errors."""
    with pytest.raises(SyncFailure, match="different tensors"):
        aggregate([client(0), {A: client(0)[A]}])
    with pytest.raises(SyncFailure, match="differ in shape"):
        aggregate([client(0), client(1) | {A: np.ones((4, 21))}])
    with pytest.raises(SyncFailure, match="not 2 numbers"):
        aggregate([client(0), client(1)], [1, -1])
    with pytest.raises(SyncFailure, match="no clients"):
        aggregate([])


def test_the_average_is_that_of_what_peft_adds(tmp_path) -> None:
    """Clients of other rank and alpha: PEFT loads the result, and its update is their mean."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from memopt.federation.delta.adapters import read_weights, write_weights

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Linear(9, 7))

    def updates(model: torch.nn.Module) -> list[torch.Tensor]:
        layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
        return [layer.get_delta_weight("default").detach().double() for layer in layers]

    clients, theirs = [], []
    for number, (rank, alpha, rslora) in enumerate([(2, 8, False), (3, 5, True), (4, 4, False)]):
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=["0", "1"],
            use_rslora=rslora,
            alpha_pattern={"1": 2 * alpha} if number == 0 else {},
            init_lora_weights=False,
        )
        torch.manual_seed(number + 1)
        model = get_peft_model(base(), config)
        model.save_pretrained(tmp_path / str(number))
        clients.append(read_weights(tmp_path / str(number)))
        theirs.append(updates(model))
    result = aggregate(clients, [1, 2, 1], AggregateSettings(rank=9))
    assert result.error < 1e-6
    write_weights(tmp_path / "mean", result.weights)
    mean = updates(PeftModel.from_pretrained(base(), str(tmp_path / "mean")))
    for got, one, two, three in zip(mean, *theirs, strict=True):
        torch.testing.assert_close(got, (one + 2 * two + three) / 4, rtol=1e-5, atol=1e-6)


def test_patterns_that_are_expressions_are_refused() -> None:
    """A layer pattern of a peer is a name, never an expression that could run for ever."""
    config = b'{"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 3}}'
    odd = client(0) | {CONFIG_TENSOR: np.frombuffer(config, np.uint8)}
    with pytest.raises(SyncFailure, match="plain name"):
        aggregate([odd])
