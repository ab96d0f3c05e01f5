"""The table of tasks: one row says what a model takes, what its graph gives, and who serves it.

Strings only, imported on use: the edge install reads this table before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memopt.errors import ConfigurationError
from memopt.registry import Entry, nearest

# What a graph's answer to one input is: a vector; one number a class; one row a token, of classes
# or of coordinates; one row a box, its classes and then its four edges; logits of the next token; a
# text that two graphs write.
ANSWERS = ("vector", "classes", "tokens", "boxes", "logits", "text", "any")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row.

    Attributes:
        name: as in ``memopt.json`` and behind ``--task``.
        summary: what its models answer, in a few words.
        modality: text, image, audio, joint, or any for a graph of no known task.
        takes: what one input is: ``one`` item, a ``pair`` of texts, or ``either``.
        model: the class of transformers that builds it, with its head.
        classes: endings of a checkpoint's class that say this task.
        outputs: of the graph; the last is the answer, the one that engines ask for.
        answer: one of ``ANSWERS``.
        engine: what serves it, ``module:class``.
        command: of the command line that serves it, "" for none.
        family: the module that loads, calls and checks models that are not transformers'.
    """

    name: str
    summary: str
    modality: str
    takes: str = "one"
    model: str = "AutoModel"
    classes: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("logits",)
    answer: str = "classes"
    engine: str = ""
    command: str = ""
    family: str = ""

    @property
    def embeds(self) -> bool:
        """Whether an input's answer is its one dense vector."""
        return self.answer == "vector" and self.outputs[-1] != "sparse_embedding"

    @property
    def serves(self) -> Entry:
        """The engine, to be loaded on use."""
        return Entry(name=self.name, target=self.engine, summary=self.summary)


_VECTOR = ("last_hidden_state", "sentence_embedding")
_ENCODER = "memopt.runtimes.engine:ArrowEngine"
_ROWS = (
    Task(
        name="embedding",
        summary="a vector for a text",
        modality="text",
        outputs=_VECTOR,
        answer="vector",
        engine=_ENCODER,
        command="embed",
    ),
    Task(
        name="image-embedding",
        summary="a vector for a picture",
        modality="image",
        outputs=_VECTOR,
        answer="vector",
        engine=_ENCODER,
        command="embed",
    ),
    Task(
        name="audio-embedding",
        summary="a vector for a sound",
        modality="audio",
        outputs=_VECTOR,
        answer="vector",
        engine=_ENCODER,
        command="embed",
    ),
    Task(
        name="text-generation",
        summary="the next token of a text",
        modality="text",
        model="AutoModelForCausalLM",
        classes=("ForCausalLM", "LMHeadModel"),
        answer="logits",
        engine="memopt.runtimes.engines.generator:Generator",
        command="generate",
        family="memopt.exporters.decoder",
    ),
    Task(
        name="text2text-generation",
        summary="a text made of a text: a translation, a summary",
        modality="text",
        model="AutoModelForSeq2SeqLM",
        classes=(
            *("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"),
            *("PegasusForConditionalGeneration", "BlenderbotForConditionalGeneration"),
            "BlenderbotSmallForConditionalGeneration",
        ),
        answer="text",
        engine="memopt.runtimes.engines.rewriter:Rewriter",
        command="generate",
        family="memopt.exporters.pair",
    ),
    Task(
        name="automatic-speech-recognition",
        summary="what is said in a sound",
        modality="audio",
        model="AutoModelForSpeechSeq2Seq",
        classes=("WhisperForConditionalGeneration",),
        answer="text",
        engine="memopt.runtimes.engines.transcriber:Transcriber",
        command="transcribe",
        family="memopt.exporters.pair",
    ),
    Task(
        name="joint-embedding",
        summary="one vector for a picture, a sound and a text together",
        modality="joint",
        outputs=("joint_embedding",),
        answer="vector",
        family="memopt.joint.graph",
    ),
    Task(
        name="text-classification",
        summary="a score for each label of a text, or of a pair of texts",
        modality="text",
        takes="either",
        model="AutoModelForSequenceClassification",
        classes=("ForSequenceClassification",),
        engine="memopt.runtimes.engines.classifier:Classifier",
        command="classify",
    ),
    Task(
        name="reranking",
        summary="how well a document answers a query",
        modality="text",
        takes="pair",
        model="AutoModelForSequenceClassification",
        engine="memopt.runtimes.engines.reranker:Reranker",
        command="rerank",
    ),
    Task(
        name="token-classification",
        summary="a label for each word of a text",
        modality="text",
        model="AutoModelForTokenClassification",
        classes=("ForTokenClassification",),
        answer="tokens",
        engine="memopt.runtimes.engines.tagger:TokenClassifier",
        command="tag",
    ),
    Task(
        name="question-answering",
        summary="the part of a text that answers a question",
        modality="text",
        takes="pair",
        model="AutoModelForQuestionAnswering",
        classes=("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
        outputs=("start_logits", "end_logits", "span_logits"),
        answer="tokens",
        engine="memopt.runtimes.engines.answerer:QuestionAnswerer",
        command="answer",
    ),
    Task(
        name="fill-mask",
        summary="the words that fit in a gap of a text",
        modality="text",
        model="AutoModelForMaskedLM",
        classes=("ForMaskedLM", "WithLMHeadModel"),
        answer="tokens",
        engine="memopt.runtimes.engines.filler:MaskFiller",
        command="fill",
    ),
    Task(
        name="sparse-embedding",
        summary="a weight for each word of the vocabulary (SPLADE)",
        modality="text",
        model="AutoModelForMaskedLM",
        outputs=("sparse_embedding",),
        answer="vector",
        engine="memopt.runtimes.engines.sparse:SparseEncoder",
        command="embed",
    ),
    Task(
        name="late-interaction",
        summary="a vector for each token, compared by MaxSim (ColBERT)",
        modality="text",
        classes=("HF_ColBERT",),
        outputs=("token_embeddings",),
        answer="tokens",
        engine="memopt.runtimes.engines.late:LateEncoder",
        command="embed",
    ),
    Task(
        name="image-classification",
        summary="a score for each label of a picture",
        modality="image",
        model="AutoModelForImageClassification",
        classes=("ForImageClassification", "ForImageClassificationWithTeacher"),
        engine="memopt.runtimes.engines.classifier:Classifier",
        command="classify",
    ),
    Task(
        name="object-detection",
        summary="the boxes of the things in a picture",
        modality="image",
        model="AutoModelForObjectDetection",
        classes=("ForObjectDetection",),
        outputs=("logits", "pred_boxes", "detections"),
        answer="boxes",
        engine="memopt.runtimes.engines.detector:Detector",
        command="detect",
    ),
    Task(
        name="audio-classification",
        summary="a score for each label of a sound",
        modality="audio",
        model="AutoModelForAudioClassification",
        classes=("ForAudioClassification",),
        engine="memopt.runtimes.engines.classifier:Classifier",
        command="classify",
    ),
    Task(
        name="voice-activity",
        summary="when somebody speaks in a sound",
        modality="audio",
        model="",
        outputs=("output",),
        answer="any",
        engine="memopt.runtimes.engines.voice:VoiceDetector",
        command="segments",
    ),
    Task(
        name="graph",
        summary="whatever a graph of somebody else gives",
        modality="any",
        model="",
        outputs=("output",),
        answer="any",
        engine="memopt.runtimes.engines.graph:GraphEngine",
        command="run",
    ),
)
TABLE: Mapping[str, Task] = {row.name: row for row in _ROWS}
TASKS = tuple(TABLE)
MODALITIES = tuple(dict.fromkeys(row.modality for row in _ROWS))


def task_of(name: str) -> Task:
    """Return the row of a task.

    Raises:
        ConfigurationError: there is none of that name.

    >>> task_of("reranking").command
    'rerank'
    >>> task_of("rerank")
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: task 'rerank' is not known; did you mean 'reranking'?
    """
    if name not in TABLE:
        raise ConfigurationError(f"task {name!r} is not known", fix=nearest(name, TASKS))
    return TABLE[name]


def task_of_class(architecture: str) -> Task | None:
    """Return the task that a checkpoint's class was trained for, None for a trunk without a head.

    >>> task_of_class("BertForSequenceClassification").name
    'text-classification'
    >>> task_of_class("BertModel") is None
    True
    """
    endings = [(ending, row) for row in _ROWS for ending in row.classes]
    # XLMWithLMHeadModel fills gaps, GPT2LMHeadModel goes on: the longer ending says more.
    fits = [(len(ending), row) for ending, row in endings if architecture.endswith(ending)]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None
