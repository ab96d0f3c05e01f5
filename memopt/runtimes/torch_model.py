"""Build the torch model that a bundle's ``config.json`` names, with the bundle's own weights.

Nothing is initialised and the checkpoint is never opened: parameters are made on the meta device
and replaced, one by one, by the tensors of the Parquet file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memopt.bundle import Bundle, read_json
from memopt.errors import ExportError, first_line
from memopt.extras import require
from memopt.runtimes.chain import step_weights
from memopt.runtimes.conversions import Converted
from memopt.runtimes.heads import TaskHead
from memopt.runtimes.image import image_shape
from memopt.runtimes.static_model import StaticConfig, static_model
from memopt.runtimes.torch_weights import assign, match_names
from memopt.tasks.table import Task, task_of
from memopt.weights.chain import TOKENS, DenseStep, Step, UnitStep
from memopt.weights.kinds import DUAL, STATIC
from memopt.weights.late import PROJECTION
from memopt.weights.modules import WEIGHED
from memopt.weights.reader import WeightLoader
from memopt.weights.sentence import CHAINED, Sentence, read_sentence
from memopt.weights.splade import read_splade

# Classes that differ from what AutoModel would pick; (model type, task) -> transformers class.
CLASSES = {
    ("t5", "embedding"): "T5EncoderModel",
    ("mt5", "embedding"): "MT5EncoderModel",
    ("umt5", "embedding"): "UMT5EncoderModel",
    ("longt5", "embedding"): "LongT5EncoderModel",
    ("switch_transformers", "embedding"): "SwitchTransformersEncoderModel",
    ("clip", "embedding"): "CLIPTextModelWithProjection",
    ("clip_text_model", "embedding"): "CLIPTextModelWithProjection",
    ("clip", "image-embedding"): "CLIPVisionModelWithProjection",
    ("clip_vision_model", "image-embedding"): "CLIPVisionModelWithProjection",
    ("siglip", "embedding"): "SiglipTextModel",
    ("siglip", "image-embedding"): "SiglipVisionModel",
    ("siglip_vision_model", "image-embedding"): "SiglipVisionModel",
    ("siglip2", "embedding"): "Siglip2TextModel",
    ("clap", "embedding"): "ClapTextModelWithProjection",
    ("whisper", "audio-embedding"): "WhisperModel",
}
# Only the part below this attribute is exported.
PARTS = {("whisper", "audio-embedding"): "encoder", ("moonshine", "audio-embedding"): "encoder"}
# Models of encoder and decoder whose encoder sentence-transformers takes; of the others it takes
# what AutoModel gives, the states of a decoder that is fed the text itself.
ENCODERS = frozenset(
    {
        *("blenderbot", "blenderbot-small", "m2m_100", "marian", "pegasus", "pegasus_x"),
        *("prophetnet", "t5gemma"),
    }
)
# How a model of two towers without classes of their own is asked for one.
TOWERS = {"embedding": "get_text_features", "image-embedding": "get_image_features"}
# wav2vec2's is for training. A pooler is left out of the checkpoints of models with another head;
# it may only be missing where the embedding is pooled from the hidden states.
TRAINING_ONLY = "masked_spec_embed"
POOLER = "pooler."


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A torch module in float32, its config, and how its parameters are called in the file."""

    module: Any
    config: Any
    names: dict[str, str]  # parameter name of the module -> weight name of the file
    head: TaskHead = field(default_factory=TaskHead)
    # (channels, height, width) that the bundle's image front end gives; None without one.
    picture: tuple[int, int, int] | None = None
    # The method of the module that answers; "" is the module itself.
    method: str = ""

    @property
    def call(self) -> Any:
        """What takes the model's inputs by name and gives its output."""
        return getattr(self.module, self.method or "forward")


def load_config(folder: Path) -> Any:
    """Return the transformers config of a bundle.

    Raises:
        ExportError: transformers does not know the model type, or the config is unusable.
    """
    transformers = require("transformers", extra="export", why="build the model")
    stated = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if stated.get("model_type") == STATIC:
        return StaticConfig(stated["vocab_size"], stated["hidden_size"])
    try:
        # Code that came with a model is never run, and nobody is asked whether it should be.
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError, TypeError) as error:
        where = folder / "config.json"
        if "custom code" in str(error):
            raise ExportError(
                f"{where} is of a model with Python code of its own, which memopt never runs",
                fix="use a model whose architecture is part of transformers",
            ) from error
        raise ExportError(
            f"{where} is not a model config transformers knows: {first_line(error)[:300]}",
            fix="check model_type and architectures",
        ) from error


def load_model(
    bundle: Bundle, task: str, weights: Path | None = None, *, attention: str | None = "eager"
) -> LoadedModel:
    """Return the model for ``task`` with the weights of the bundle, in float32, eval mode.

    Args:
        bundle: a converted bundle.
        task: one of ``memopt.bundle.TASKS``.
        weights: the Parquet file; None takes the bundle's float weights.
        attention: transformers' name of the implementation; None takes its fastest. Eager is plain
            matrix products and a softmax: its graph is regular and portable.

    Raises:
        ExportError: the config is unusable, a weight the architecture needs is missing or has
            another shape, or the file has one that the architecture has no place for (one layer
            more than config.json says); the message names it. Weights of a part that is not
            exported (a language model's head, the other tower) are left alone. Nothing is ever
            left at a random value.
        WeightsError: the weight file is damaged.
    """
    if bundle.imported:
        raise ExportError(
            f"{bundle.path} was imported: its graph is its source, and its weights are the graph's",
            fix="use another device, or convert the model's safetensors",
        )
    require("torch", extra="export", why="build the model")
    row, config = task_of(task), load_config(bundle.path)
    module, config = _construct(config, row, attention)
    late = row.name == "late-interaction"
    sentence = read_sentence(bundle.path) if row.embeds or late else None
    with WeightLoader(weights or bundle.weights) as loader:
        if row.answer in ("classes", "tokens") and (
            count := _stored_labels(module, config, loader)
        ):
            config.num_labels = count  # and their names, which are not complete
            module, config = _construct(config, row, attention)
        head = _head(bundle, row, sentence, loader)
        weights_now = Converted(loader, module, without=_prefixes(sentence, head))
        part = PARTS.get((config.model_type, task))
        if part:
            module = getattr(module, part)
        names = match_names(module, weights_now.names)
        pooler = bundle.manifest.pooling == "model" or not (row.embeds or late)
        optional = (TRAINING_ONLY,) if pooler else (TRAINING_ONLY, POOLER)
        encoder = task == "embedding" and config.model_type in ENCODERS
        if encoder:
            optional = (*optional, "decoder.")
        assign(module, names, weights_now, optional)
        # A tied parameter is one tensor under two names, of which a checkpoint has one.
        stored = {id(module.get_parameter(name)): weight for name, weight in names.items()}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in stored:
                names.setdefault(name, stored[id(parameter)])
        if encoder:
            # Only now: its embeddings are shared with the decoder's, under whose name they lie.
            module, names = _encoder(module, names)
    picture = image_shape(bundle) if row.modality == "image" else None
    method = TOWERS.get(task, "") if (config.model_type, task) not in CLASSES else ""
    method = method if config.model_type in DUAL else ""
    return LoadedModel(module.eval(), config, names, head, picture, method)


def _stored_labels(module: Any, config: Any, loader: WeightLoader) -> int:
    """Return how many labels the head's weights have, where config.json names fewer or more.

    transformers counts names: of a map with gaps it would build a smaller head than was trained.
    """
    stored = Converted(loader, module, without=())
    found = set()
    for name, weight in match_names(module, stored.names).items():
        built, kept = tuple(module.get_parameter(name).shape), stored.shape(weight)
        if kept != built and kept[1:] == built[1:] and built[0] == config.num_labels:
            found.add(kept[0])
    return int(found.pop()) if len(found) == 1 else 0


def _encoder(module: Any, names: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """Return the encoder of a model and the weights of its parameters."""
    weights = {id(module.get_parameter(name)): weight for name, weight in names.items()}
    part = module.get_encoder()
    found = part.named_parameters(remove_duplicate=False)
    return part, {name: weights[id(p)] for name, p in found if id(p) in weights}


def reset(module: Any, config: Any) -> None:
    """Undo what a model did to itself: after one short text BigBird no longer attends in blocks."""
    if config.model_type == "big_bird":
        module.set_attention_type(config.attention_type)


def _head(bundle: Bundle, row: Task, sentence: Sentence | None, loader: WeightLoader) -> TaskHead:
    """Return what is done with the model's output for an answer."""
    # A head that is asked for beside the bundle's own task (CLIP's text tower) is pooled too.
    pooling = "mean" if bundle.manifest.pooling == "none" else bundle.manifest.pooling
    head = TaskHead(row.name, pooling, bundle.manifest.normalize)
    if row.name == "sparse-embedding":
        return replace(head, splade=read_splade(bundle.path))
    if row.name == "late-interaction":
        chain = sentence.chain if sentence else _projected(loader)
        return replace(head, chain=chain, weights=step_weights(chain, loader))
    if pooling == CHAINED:
        if sentence is None:
            raise ExportError(
                f"{bundle.path} has pooling {CHAINED!r} and no modules.json that says which",
                fix="convert the model again",
            )
        head = replace(head, chain=sentence.chain, weights=step_weights(sentence.chain, loader))
    if sentence is None or row.name != "embedding":
        return head
    return replace(head, include_prompt=sentence.include_prompt, keep=sentence.truncate_dim)


def _projected(loader: WeightLoader) -> tuple[Step, ...]:
    """Return the head of Stanford's ColBERT, whose projection lies beside the encoder's weights."""
    unit = UnitStep(TOKENS, TOKENS)
    if PROJECTION not in loader:
        return (unit,)
    outputs, inputs = loader.info(PROJECTION).shape
    linear = DenseStep(
        prefix="", inputs=inputs, outputs=outputs, bias=False, activation="Identity",
        takes=TOKENS, gives=TOKENS,
    )  # fmt: skip
    return linear, unit


def _prefixes(sentence: Sentence | None, head: TaskHead) -> tuple[str, ...]:
    """Return what the names of the modules' weights begin with, which are not the model's."""
    if sentence is None:
        return tuple(head.weights)
    modules = sentence.modules[1:]
    return tuple(module.prefix for module in modules if module.kind in WEIGHED)


def _construct(config: Any, row: Task, attention: str | None) -> tuple[Any, Any]:
    import transformers

    task = row.name
    name = CLASSES.get((config.model_type, task))
    plain = (name or "").removesuffix("WithProjection")
    if plain in (getattr(config, "architectures", None) or ()):
        name = plain  # saved without the projection, as in what draws pictures
    try:
        with _meta_parameters():
            if isinstance(config, StaticConfig):
                module = static_model(config)
            elif name:
                cls = getattr(transformers, name)
                wanted = cls.config_class
                if not isinstance(config, wanted):
                    config = _tower(config, wanted)
                module = cls._from_config(config, attn_implementation=attention)
            else:
                auto = getattr(transformers, row.model)
                module = auto.from_config(config, attn_implementation=attention)
    except ImportError as error:
        package = re.search(r"pip install ([\w.-]+)", str(error))
        needed = package[1] if package else first_line(error)[:300]
        raise ExportError(
            f"the code of {config.model_type} needs a package that is not installed: {needed}",
            fix="install it and run the command again",
        ) from error
    except Exception as error:
        raise ExportError(
            f"transformers cannot build {config.model_type!r} for task {task!r} from config.json: "
            f"{first_line(error)[:300]}",
            fix="choose another --task, or check config.json",
        ) from error
    return module, config


def _tower(config: Any, wanted: Any) -> Any:
    for name in ("text_config", "vision_config"):
        part: Any = getattr(config, name, None)
        if isinstance(part, wanted):
            if getattr(config, "projection_dim", None):
                part.projection_dim = config.projection_dim
            return part
    raise ValueError(f"the config has no {wanted.__name__}")


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Make every parameter on the meta device, and every buffer for real.

    Buffers such as rotary frequencies are computed in the constructor and are in no checkpoint.
    """
    import torch

    register = torch.nn.Module.register_parameter

    def on_meta(self: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"),
                requires_grad=False,
            )
        register(self, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register
