"""What follows the model in a sentence-transformers folder, as data: a tuple of frozen steps.

Steps read and write named features, as sentence-transformers' modules do: ``token_embeddings``
(batch, tokens, width) and ``sentence_embedding`` (batch, width). They are run in torch by
:mod:`memopt.runtimes.heads`, and in numpy, a second time, by :mod:`memopt.exporters.answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memopt.errors import WeightsError
from memopt.weights.modules import MODULES, Module

TOKENS = "token_embeddings"
VECTOR = "sentence_embedding"
IO = "module_input_name"  # the key that says what a module works on
# The mode of a model that pools by itself; sentence-transformers has no module for it.
OWN = "model"
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# In the order that they are concatenated in.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# torch.nn classes that need no argument and work on each value alone.
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU", "ELU", "LeakyReLU", "Mish")


@dataclass(frozen=True, slots=True)
class PoolStep:
    """Tokens to a vector, in one or several of ``MODES`` (or ``OWN``), side by side."""

    modes: tuple[str, ...]
    include_prompt: bool = True
    width: int | None = None  # of the token vectors, as the file says


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseStep:
    """A linear layer, an activation and, with ``residual``, what went in added to what comes out.

    ``prefix`` begins the names of its weights: ``linear.weight`` (outputs, inputs) and, where they
    are there, ``linear.bias`` and ``residual.weight``.
    """

    prefix: str
    inputs: int
    outputs: int
    bias: bool = True
    activation: str = "Tanh"
    takes: str = VECTOR
    gives: str = VECTOR
    residual: bool = False

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of each of its weights."""
        shapes = {"linear.weight": (self.outputs, self.inputs)}
        named: dict[str, tuple[int, ...]] = dict(shapes)
        if self.bias:
            named["linear.bias"] = (self.outputs,)
        if self.residual and self.inputs != self.outputs:
            named["residual.weight"] = shapes["linear.weight"]
        return {self.prefix + name: shape for name, shape in named.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class NormStep:
    """Layer normalisation of the vector; weights ``norm.weight`` and ``norm.bias``."""

    prefix: str
    width: int

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of each of its weights."""
        return {f"{self.prefix}norm.{name}": (self.width,) for name in ("weight", "bias")}


@dataclass(frozen=True, slots=True)
class UnitStep:
    """Makes vectors unit length."""

    takes: str = VECTOR
    gives: str = VECTOR


Step = PoolStep | DenseStep | NormStep | UnitStep


def read_chain(
    folder: Path, modules: Sequence[Module], begin: Sequence[Step] = (), *, gives: str = VECTOR
) -> tuple[Step, ...]:
    """Return what is done with the model's output, checked to give one vector an input.

    Args:
        folder: where ``modules.json`` lies.
        modules: those after the first.
        begin: what the model itself gives a vector by; nothing, if it gives tokens.
        gives: the feature that is the answer; where that is the tokens', a Dense module that does
            not say what it takes works on these.

    Raises:
        WeightsError: a key that memopt does not honour, or a step without what it works on.
    """
    steps = list(begin)
    known = {VECTOR if begin else TOKENS}
    for module in modules:
        if module.kind == "Dropout":
            continue  # it drops values in training only
        if module.kind not in _READERS:
            raise WeightsError(
                f"{folder / MODULES} has a {module.kind} module, which makes no vector a text",
                fix=f"known: {', '.join(_READERS)}",
            )
        step = _READERS[module.kind](folder, module)
        if gives == TOKENS and isinstance(step, DenseStep) and not module.config(folder).get(IO):
            step = replace(step, takes=TOKENS, gives=TOKENS)
        takes, made = _features(step)
        if isinstance(step, UnitStep) and takes not in known:
            continue  # sentence-transformers passes over it without a word
        if takes not in known:
            raise WeightsError(
                f"{folder / MODULES}: the {module.kind} module in {module.path!r} works on "
                f"{takes}, which is not there yet: an order memopt does not run",
                fix="put it behind the module that makes it",
            )
        known.add(made)
        steps.append(step)
    if gives not in known:
        raise WeightsError(
            f"{folder / MODULES} has no Pooling module, so there is no vector a text",
            fix="add the Pooling module the model was trained with",
        )
    return tuple(steps)


def weight_shapes(steps: Sequence[Step]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight that ``steps`` have.

    >>> weight_shapes((NormStep(prefix="2_LayerNorm.", width=4),))
    {'2_LayerNorm.norm.weight': (4,), '2_LayerNorm.norm.bias': (4,)}
    """
    layers = [step for step in steps if isinstance(step, DenseStep | NormStep)]
    return {name: shape for step in layers for name, shape in step.weights.items()}


def chain_width(steps: Sequence[Step], width: int | None) -> int | None:
    """Return the length of the vector that ``steps`` make of tokens of ``width`` values.

    >>> chain_width((PoolStep(("cls", "mean")), UnitStep()), 384)
    768
    """
    widths: dict[str, int | None] = {TOKENS: width, VECTOR: width}
    for step in steps:
        if isinstance(step, PoolStep):
            tokens = step.width or widths[TOKENS]
            widths[VECTOR] = tokens * len(step.modes) if tokens else None
        elif isinstance(step, DenseStep):
            widths[step.gives] = step.outputs
        elif isinstance(step, UnitStep):
            widths[step.gives] = widths[step.takes]
    return widths[VECTOR]


def _features(step: Step) -> tuple[str, str]:
    if isinstance(step, PoolStep):
        return TOKENS, VECTOR
    return (VECTOR, VECTOR) if isinstance(step, NormStep) else (step.takes, step.gives)


def _pooling(folder: Path, module: Module) -> PoolStep:
    path = folder / module.path / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder / MODULES} names {path}, which is missing")
    config = module.config(folder)
    known = {"embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt"}
    _only(config, known | set(_FLAGS), path)
    flagged = [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = config.get("pooling_mode", flagged)
    modes = [modes] if isinstance(modes, str) else list(modes)
    if not modes or not set(modes) <= set(MODES):
        raise WeightsError(
            f"{path} asks for pooling {' + '.join(map(str, modes)) or 'none'}, which memopt does "
            "not do",
            fix=f"known: {', '.join(MODES)}",
        )
    width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    prompt = config.get("include_prompt", True) is not False
    return PoolStep(tuple(modes), prompt, width if type(width) is int else None)


def _dense(folder: Path, module: Module) -> DenseStep:
    path, config = folder / module.path / "config.json", module.config(folder)
    names = {"in_features", "out_features", "bias", "activation_function", "use_residual"}
    _only(config, names | {"module_input_name", "module_output_name"}, path)
    whole = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = whole.rpartition(".")[2]
    if not whole.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise WeightsError(
            f"{path} asks for the activation {whole!r}, which memopt does not know",
            fix=f"known, of torch.nn: {', '.join(ACTIVATIONS)}",
        )
    takes = config.get("module_input_name") or VECTOR
    return DenseStep(
        prefix=module.prefix,
        inputs=_count(config, "in_features", path),
        outputs=_count(config, "out_features", path),
        bias=bool(config.get("bias", True)),
        activation=activation,
        takes=str(takes),
        gives=str(config.get("module_output_name") or takes),
        residual=bool(config.get("use_residual", False)),
    )


def _layer_norm(folder: Path, module: Module) -> NormStep:
    path, config = folder / module.path / "config.json", module.config(folder)
    _only(config, {"dimension"}, path)
    return NormStep(prefix=module.prefix, width=_count(config, "dimension", path))


def _normalize(folder: Path, module: Module) -> UnitStep:
    config = module.config(folder)
    takes = config.get("module_input_name") or VECTOR
    return UnitStep(str(takes), str(config.get("module_output_name") or takes))


def _only(config: dict[str, Any], known: set[str], path: Path) -> None:
    if unknown := sorted(set(config) - known):
        raise WeightsError(f"{path}: key {unknown[0]!r} is not known, so it is not honoured")


def _count(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise WeightsError(f"{path}: {key} {value!r} is not a whole number above 0")
    return value


_READERS: dict[str, Any] = {
    "Pooling": _pooling,
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
}
