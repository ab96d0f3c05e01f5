"""Train a joint layer: contrastive over every pair of modalities present (torch, lazily).

The loss is InfoNCE (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748) in the symmetric
form of CLIP (Radford et al. 2021, section 2.3) with a learned temperature. Rows that mean the same
(equal content, or equal ``group``) are positives of each other as in Khosla et al. 2020, equation
2, instead of false negatives. Each row is seen as each of its modalities alone and as a random
combination of them, so that a query of any kind lands near a memory of any kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import ConfigurationError, InputError
from memopt.extras import require
from memopt.joint.model import JOINT_MODALITIES, JointConfig, network
from memopt.joint.pairs import Pairs
from memopt.runtimes.vectors import unit_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

# CLIP starts at 1 / 0.07 and never goes past 100.
_FIRST_TEMPERATURE = 0.07
_LARGEST_SCALE = 100.0
# A held-out part larger than this only costs time: its loss compares all rows with all rows.
_MOST_HELD_OUT = 512
_FEWEST_HELD_OUT = 2
Progress = Callable[[int, int, float], None]  # epoch, of, held-out loss


@dataclass(frozen=True, slots=True, kw_only=True)
class JointRecipe:
    """How to train.

    Attributes:
        epochs: at most this many passes over the pairs.
        patience: stop when the held-out loss did not improve for so many epochs.
        holdout: share of the rows that is never trained on.
        dropout: share of activations dropped while training.
        noise: standard deviation of the noise on every input vector, relative to its length.

    >>> JointRecipe(holdout=0.9)
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: holdout is 0.9; give a number from 0.01 to 0.5
    """

    seed: int = 0
    epochs: int = 60
    patience: int = 6
    batch_size: int = 256
    learning_rate: float = 5e-4
    weight_decay: float = 1e-2
    holdout: float = 0.1
    dropout: float = 0.1
    noise: float = 0.1

    def __post_init__(self) -> None:
        bounds = {
            "seed": (0, 2**32 - 1),
            "epochs": (1, 10_000),
            "patience": (1, 10_000),
            "batch_size": (4, 65_536),
            "learning_rate": (1e-8, 1.0),
            "weight_decay": (0.0, 1.0),
            "holdout": (0.01, 0.5),
            "dropout": (0.0, 0.9),
            "noise": (0.0, 10.0),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = bounds[field.name]
            whole = isinstance(low, int)
            right_type = type(value) is int or (not whole and type(value) is float)
            if not right_type or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise ConfigurationError(
                    f"{field.name} is {value!r}", fix=f"give {kind} from {low} to {high}"
                )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedJoint:
    """A trained layer: its weights by name, and how the training went.

    Attributes:
        report: rows, held-out rows, epochs run, best epoch, losses before and after, and
            ``recall_at_1`` of each direction on the held-out rows with its chance level.
    """

    config: JointConfig
    recipe: JointRecipe
    weights: dict[str, NDArray[np.float32]]
    report: dict[str, Any]


def train_joint(
    pairs: Pairs,
    config: JointConfig | None = None,
    recipe: JointRecipe | None = None,
    on_epoch: Progress | None = None,
) -> TrainedJoint:
    """Train a joint layer on pairs; the same pairs, recipe and thread count give the same weights.

    Args:
        pairs: from :func:`memopt.joint.pairs.read_pairs` or ``make_pairs``.
        config: dimensions; by default 512, 384, 384 -> 768, each modality as long as its vectors.
        recipe: how to train.
        on_epoch: called after every epoch with (epoch, epochs, held-out loss).

    Raises:
        InputError: the vectors do not have the lengths ``config`` says, or too few rows.
        MissingExtra: torch is not installed.

    >>> from memopt.joint.pairs import make_pairs
    >>> rng = np.random.default_rng(0)
    >>> pairs = make_pairs({"text": rng.normal(size=(32, 4)), "audio": rng.normal(size=(32, 3))})
    >>> config = JointConfig(vision=2, audio=3, text=4, joint=8, hidden=8, heads=2)
    >>> train_joint(pairs, config, JointRecipe(epochs=1)).report["epochs"]
    1
    """
    torch = require("torch", extra="export", why="train a joint layer")
    recipe = recipe or JointRecipe()
    config = config or JointConfig.from_dict(pairs.dims)
    _check_dims(pairs, config)
    learn, held = _split(pairs, recipe)
    # Leaves the caller's generator as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = network(config, dropout=recipe.dropout)
        run = _Run(torch, model, config, pairs, recipe)
        state, report = run.fit(learn, held, on_epoch)
    weights = {name: value.numpy().copy() for name, value in state.items()}
    report = {
        "rows": len(pairs),
        "rows_skipped": pairs.skipped,
        "rows_held_out": len(held),
        "modalities": {n: int(pairs.present[:, c].sum()) for c, n in enumerate(JOINT_MODALITIES)},
        **report,
        "recipe": asdict(recipe),
    }
    return TrainedJoint(config=config, recipe=recipe, weights=weights, report=report)


class _Run:
    """One training: the model, the data as tensors, and the generator of everything random."""

    def __init__(
        self, torch: Any, model: Any, config: JointConfig, pairs: Pairs, recipe: JointRecipe
    ) -> None:
        self.torch, self.model, self.recipe = torch, model, recipe
        self.generator = np.random.default_rng(recipe.seed)
        count = len(pairs)
        self.vectors = {
            name: torch.from_numpy(unit_rows(pairs.vectors[name]))
            if name in pairs.vectors
            else torch.zeros(count, width)
            for name, width in config.dims.items()
        }
        self.present = pairs.present
        self.same = torch.from_numpy(pairs.same)
        self.scale = torch.nn.Parameter(torch.tensor(float(np.log(1 / _FIRST_TEMPERATURE))))

    def fit(
        self, learn: NDArray[np.intp], held: NDArray[np.intp], on_epoch: Progress | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        torch, recipe = self.torch, self.recipe
        optimizer = torch.optim.AdamW(
            [*self.model.parameters(), self.scale],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        first = best = self._held_loss(held)
        best_epoch, epoch, state = 0, 0, self._state()
        for epoch in range(1, recipe.epochs + 1):
            self._epoch(learn, optimizer)
            loss = self._held_loss(held)
            if on_epoch is not None:
                on_epoch(epoch, recipe.epochs, loss)
            if not np.isfinite(loss):
                raise InputError(
                    f"the training diverged in epoch {epoch}", fix="lower the learning rate"
                )
            if loss < best:
                best, best_epoch, state = loss, epoch, self._state()
            elif epoch - best_epoch >= recipe.patience:
                break
        self.model.load_state_dict(state)
        return state, {
            "epochs": epoch,
            "best_epoch": best_epoch,
            "held_out_loss_before": first,
            "held_out_loss": best,
            "recall_at_1": self._recall(held),
        }

    def _state(self) -> dict[str, Any]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _epoch(self, learn: NDArray[np.intp], optimizer: Any) -> None:
        torch, recipe = self.torch, self.recipe
        self.model.train()
        order = self.generator.permutation(learn)
        for start in range(0, len(order), recipe.batch_size):
            rows = order[start : start + recipe.batch_size]
            if len(rows) < 2:
                continue
            loss = self._loss(rows, self._views(rows, training=True))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                self.scale.clamp_(max=float(np.log(_LARGEST_SCALE)))

    def _views(self, rows: NDArray[np.intp], *, training: bool) -> dict[str, Any]:
        """Embed the rows as each modality alone and as a combination; one pass for all."""
        torch, width = self.torch, len(JOINT_MODALITIES)
        masks: dict[str, NDArray[np.bool_]] = {}
        for column, name in enumerate(JOINT_MODALITIES):
            mask = np.zeros((len(rows), width), bool)
            mask[:, column] = self.present[rows, column]
            if mask.any():
                masks[name] = mask
        masks["together"] = self._combination(self.present[rows]) if training else (
            self.present[rows]
        )  # fmt: skip
        index = torch.from_numpy(np.tile(rows, len(masks)))
        present = torch.from_numpy(np.concatenate(list(masks.values())).astype(np.float32))
        inputs = [self.vectors[name][index] for name in JOINT_MODALITIES]
        if training and self.recipe.noise:
            # A standard normal vector of d numbers has length sqrt(d); ours have length 1.
            inputs = [
                x + torch.randn(x.shape) * (self.recipe.noise * x.shape[1] ** -0.5) for x in inputs
            ]
        joint = self.model(*inputs, present).reshape(len(masks), len(rows), -1)
        return {name: (joint[i], mask.any(axis=1)) for i, (name, mask) in enumerate(masks.items())}

    def _combination(self, present: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Keep all modalities of a row, or all but one that is drawn."""
        draws = np.where(present, self.generator.random(present.shape), np.inf)
        drop = np.zeros_like(present)
        drop[np.arange(len(present)), draws.argmin(axis=1)] = True
        drop &= (present.sum(axis=1) > 2)[:, None]
        drop &= (self.generator.random(len(present)) < 0.5)[:, None]
        kept: NDArray[np.bool_] = present & ~drop
        return kept

    def _loss(self, rows: NDArray[np.intp], views: dict[str, Any]) -> Any:
        torch = self.torch
        positive = self._positive(rows)
        scale = self.scale.exp()
        losses = []
        for one, other in combinations(views, 2):
            (a, has_a), (b, has_b) = views[one], views[other]
            both = torch.from_numpy(np.flatnonzero(has_a & has_b))
            if len(both) < 2:
                continue
            scores = scale * a[both] @ b[both].T
            target = positive[both][:, both]
            target = target / target.sum(dim=1, keepdim=True)
            cross = torch.nn.functional.cross_entropy
            losses.append((cross(scores, target) + cross(scores.T, target)) / 2)
        if not losses:  # no pair of this batch shares two modalities with another row
            return self.scale * 0.0
        return torch.stack(losses).mean()

    def _positive(self, rows: NDArray[np.intp]) -> Any:
        same = self.same[self.torch.from_numpy(rows)]
        equal = (same[:, None] == same[None]) & (same[:, None] >= 0)
        matrix = equal.any(dim=2)
        matrix.fill_diagonal_(True)
        return matrix.float()

    def _held_loss(self, held: NDArray[np.intp]) -> float:
        self.model.eval()
        with self.torch.no_grad():
            return float(self._loss(held, self._views(held, training=False)))

    def _recall(self, held: NDArray[np.intp]) -> dict[str, Any]:
        """Return, for each direction, how often the nearest held-out row means the same."""
        torch = self.torch
        self.model.eval()
        found: dict[str, Any] = {}
        with torch.no_grad():
            views = self._views(held, training=False)
        positive = self._positive(held)
        for one in JOINT_MODALITIES:
            for other in JOINT_MODALITIES:
                if one == other or one not in views or other not in views:
                    continue
                both = torch.from_numpy(np.flatnonzero(views[one][1] & views[other][1]))
                if not len(both):
                    continue
                target = positive[both][:, both]
                nearest = (views[one][0][both] @ views[other][0][both].T).argmax(dim=1)
                hits = target[torch.arange(len(both)), nearest]
                found[f"{one} -> {other}"] = {
                    "rows": len(both),
                    "recall": float(hits.mean()),
                    "chance": float(target.mean()),
                }
        return found


def _split(pairs: Pairs, recipe: JointRecipe) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    order = np.random.default_rng(recipe.seed).permutation(len(pairs))
    count = max(_FEWEST_HELD_OUT, min(_MOST_HELD_OUT, round(len(pairs) * recipe.holdout)))
    return np.sort(order[count:]), np.sort(order[:count])


def _check_dims(pairs: Pairs, config: JointConfig) -> None:
    for name, width in pairs.dims.items():
        if width != config.dims[name]:
            raise InputError(
                f"the {name} vectors have {width} dimensions, the layer takes {config.dims[name]}",
                fix=f"train with {name} {width}",
            )
