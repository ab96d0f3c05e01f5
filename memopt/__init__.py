"""memopt: the fastest file that still gives the right answers, on the device at hand.

>>> import memopt
>>> memopt.__version__.count(".")
2
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memopt.moved import find_moved
from memopt.onuse import names_on_use

# onnxruntime (since 1.32) and openvino report usage over the network. Nobody asked for that; and
# the thread that does it, started by the import, leaves a child of fork() hanging when it exits.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OPENVINO_TELEMETRY_DISABLED", "1")

find_moved()
__version__ = "0.1.0"
__all__ = [
    "ArrowEngine",
    "Bundle",
    "Classifier",
    "Detector",
    "Generator",
    "LateEncoder",
    "MaskFiller",
    "QuestionAnswerer",
    "Reranker",
    "Rewriter",
    "SparseEncoder",
    "TokenClassifier",
    "Transcriber",
    "ZeroShotClassifier",
    "__version__",
    "open_bundle",
    "open_task",
]

if TYPE_CHECKING:
    from memopt.bundle import Bundle, open_bundle
    from memopt.runtimes.engine import ArrowEngine
    from memopt.runtimes.engines.answerer import QuestionAnswerer
    from memopt.runtimes.engines.classifier import Classifier
    from memopt.runtimes.engines.detector import Detector
    from memopt.runtimes.engines.filler import MaskFiller
    from memopt.runtimes.engines.generator import Generator
    from memopt.runtimes.engines.late import LateEncoder
    from memopt.runtimes.engines.reranker import Reranker
    from memopt.runtimes.engines.rewriter import Rewriter
    from memopt.runtimes.engines.sparse import SparseEncoder
    from memopt.runtimes.engines.tagger import TokenClassifier
    from memopt.runtimes.engines.transcriber import Transcriber
    from memopt.runtimes.engines.zero_shot import ZeroShotClassifier
    from memopt.runtimes.task_engine import open_task

# Loaded on first use, so that `import memopt` costs nothing.
__getattr__ = names_on_use(
    __name__,
    {
        "runtimes.engine": ("ArrowEngine",),
        "runtimes.engines.answerer": ("QuestionAnswerer",),
        "runtimes.engines.classifier": ("Classifier",),
        "runtimes.engines.detector": ("Detector",),
        "runtimes.engines.filler": ("MaskFiller",),
        "runtimes.engines.generator": ("Generator",),
        "runtimes.engines.late": ("LateEncoder",),
        "runtimes.engines.reranker": ("Reranker",),
        "runtimes.engines.rewriter": ("Rewriter",),
        "runtimes.engines.sparse": ("SparseEncoder",),
        "runtimes.engines.tagger": ("TokenClassifier",),
        "runtimes.engines.transcriber": ("Transcriber",),
        "runtimes.engines.zero_shot": ("ZeroShotClassifier",),
        "runtimes.task_engine": ("open_task",),
        "bundle": ("Bundle", "open_bundle"),
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
