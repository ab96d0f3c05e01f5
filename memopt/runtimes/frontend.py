"""Which front end a bundle's kind of input has."""

from __future__ import annotations

from collections.abc import Sequence

from memopt.bundle import Bundle
from memopt.runtimes.batching import FrontEnd


def make_front_end(bundle: Bundle, inputs: Sequence[str]) -> FrontEnd:
    """Return what turns this bundle's kind of input into its graph's ``inputs``."""
    modality = bundle.manifest.modality
    if modality == "text":
        from memopt.runtimes.text import TextFrontEnd

        return TextFrontEnd(bundle, inputs)
    if modality == "image":
        from memopt.runtimes.image import ImageFrontEnd

        return ImageFrontEnd(bundle)
    from memopt.runtimes.audio import AudioFrontEnd

    return AudioFrontEnd(bundle, inputs)
