"""A tiny language model and LoRA adapters of it, trained for real on text of this repository.

Shared by federation_tour.py and benchmarks/sync.py. A two-layer GPT-2 over bytes learns the
licence's English; its LoRA adapter then learns Python from the package's own source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
# A model this small is slower on several threads, which wait for each other at every layer.
torch.set_num_threads(1)
CONTEXT, BATCH = 48, 12


def byte_text(paths: list[Path]) -> torch.Tensor:
    """Return the files' bytes as one sequence of token ids."""
    data = b"\n".join(path.read_bytes() for path in paths)
    return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))


def english() -> torch.Tensor:
    """Text the base model knows."""
    return byte_text([ROOT / "LICENSE"])


def python_source() -> torch.Tensor:
    """Text the adapters learn."""
    return byte_text(sorted((ROOT / "memopt").glob("*.py")))


def batch(text: torch.Tensor, seed: int) -> torch.Tensor:
    """Return BATCH pieces of the text; the same seed gives the same pieces."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([text[s : s + CONTEXT] for s in starts.tolist()])


def base_model(steps: int = 200) -> Any:
    """Train the base model on the English text."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        n_positions=CONTEXT,
        n_embd=96,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    _train(model, english(), steps, seed=0, rate=2e-3)
    return model


def with_adapter(base: Any, rank: int = 16) -> Any:
    """Return the model with a fresh LoRA adapter; the same one every time."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def adapter(model: Any) -> dict[str, np.ndarray]:
    """Return the adapter's tensors as numpy arrays."""
    return {
        name: value.detach().numpy().copy()
        for name, value in get_peft_model_state_dict(model).items()
    }


def load_adapter(model: Any, weights: dict[str, np.ndarray]) -> None:
    """Put tensors into the model's adapter."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    set_peft_model_state_dict(model, tensors)


def train(model: Any, text: torch.Tensor, steps: int, *, seed: int, rate: float = 1e-3) -> float:
    """Train the adapter; return the mean loss of the last steps."""
    return _train(model, text, steps, seed=seed, rate=rate)


def loss(model: Any, text: torch.Tensor) -> float:
    """Return the loss on held-out pieces, in nats per byte."""
    model.eval()
    with torch.no_grad():
        values = [
            float(model(input_ids=b, labels=b).loss)
            for b in (batch(text, 10**6 + number) for number in range(8))
        ]
    return float(np.mean(values))


def _train(model: Any, text: torch.Tensor, steps: int, *, seed: int, rate: float) -> float:
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate)
    losses = []
    for number in range(steps):
        ids = batch(text, seed * 100_000 + number)
        value = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return float(np.mean(losses[-5:])) if losses else float("nan")
