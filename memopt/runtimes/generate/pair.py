"""An encoder and a decoder opened on a provider: sources in, then tokens in and logits out.

What the encoder gives stays where the decoder reads it: in values bound to its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memopt.bundle import Bundle
from memopt.errors import BundleError, DeviceError
from memopt.extras import require
from memopt.runtimes.base import Placement, Settings
from memopt.runtimes.cpu import usable_cpus
from memopt.runtimes.generate.decoders import latency_options, ort_value
from memopt.runtimes.keys_values import BEAM, PAST, PRESENT, encoder_of
from memopt.runtimes.onnx import OnnxBackend
from memopt.runtimes.openvino_core import compile_known, open_core

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK, _SOURCE_MASK = "attention_mask", "encoder_attention_mask"
Source = Mapping[str, Any]


class PairDecoder(Protocol):
    """An encoder, a decoder, and the texts that the latter has read so far, one a row."""

    def encode(self, source: Source) -> None:
        """Read the sources, one a row, and forget every text.

        Args:
            source: the encoder's inputs by name, each (batch, ...).
        """

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read (batch, new) more tokens; return the logits (batch, vocabulary) of the last."""

    def info(self) -> dict[str, Any]:
        """Return what :meth:`Engine.device_info` shows."""

    def close(self) -> None:
        """Free the sessions."""


def open_pair(bundle: Bundle, candidate: Placement, settings: Settings) -> PairDecoder:
    """Open a variant of two graphs on a provider.

    Raises:
        BundleError: the variant has no graph of an encoder.
        DeviceError: it does not run there.
    """
    variant = candidate.variant
    encoder = encoder_of(variant.companions)
    if candidate.provider == "torch" or (
        candidate.provider == "openvino" and variant.format != "openvino"
    ):
        raise DeviceError(
            f"{candidate} writes no text", fix="use an OpenVINO variant there, or ONNX Runtime"
        )
    if encoder is None:
        raise BundleError(
            f"{variant.name} of {bundle.path} has no graph of an encoder",
            fix=f"run: memopt export {bundle.path} --format {variant.format}",
        )
    if candidate.provider == "openvino":
        return OpenvinoPair(bundle, candidate, encoder, settings)
    return OnnxPair(bundle, candidate, encoder, settings)


class OnnxPair:
    """Two graphs of ONNX Runtime; the present of one step is the past of the next."""

    def __init__(
        self, bundle: Bundle, candidate: Placement, encoder: str, settings: Settings
    ) -> None:
        settings = replace(settings, streams=1)
        variant = candidate.variant
        first = replace(variant, file=encoder, output=f"{PRESENT}0.encoder.key")
        self._encoder = OnnxBackend(bundle, replace(candidate, variant=first), settings)
        self._decoder = OnnxBackend(bundle, candidate, settings)
        self.inputs = self._encoder.inputs
        self._shapes = {
            item.name: (item.shape[1], item.shape[3])
            for item in self._decoder.session.get_inputs()
            if item.name.startswith(PAST) and ".decoder." in item.name
        }
        self._names = [item.name for item in self._encoder.session.get_outputs()]
        self._fixed: dict[str, Any] = {}
        self._own: dict[str, Any] = {}

    def encode(self, source: Source) -> None:
        """Run the encoder; see :class:`PairDecoder`."""
        session = self._encoder.session
        binding = session.io_binding()
        for name, array in source.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._names:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        names = [PAST + name.removeprefix(PRESENT) for name in self._names]
        self._fixed = dict(zip(names, binding.get_outputs(), strict=True))
        if _SOURCE_MASK in self._decoder.inputs:
            self._fixed[_SOURCE_MASK] = ort_value(np.ascontiguousarray(source[_MASK]))
        batch = len(next(iter(source.values())))
        self._own = {
            name: ort_value(np.zeros((batch, heads, 0, size), np.float32))
            for name, (heads, size) in self._shapes.items()
        }

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the decoder once; see :class:`PairDecoder`."""
        session = self._decoder.session
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        for name, value in (*self._fixed.items(), *self._own.items()):
            binding.bind_ortvalue_input(name, value)
        for name in self._own:
            binding.bind_output(PRESENT + name.removeprefix(PAST))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        *present, logits = binding.get_outputs()
        self._own = dict(zip(self._own, present, strict=True))
        return np.asarray(logits.numpy()[:, -1], np.float32)

    def info(self) -> dict[str, Any]:
        """Return what the backend tells."""
        return self._decoder.info()

    def close(self) -> None:
        """Free values and sessions."""
        self._fixed, self._own = {}, {}
        self._encoder.close()
        self._decoder.close()


class OpenvinoPair:
    """Two models of OpenVINO; the decoder keeps its own keys and values as states."""

    def __init__(
        self, bundle: Bundle, candidate: Placement, encoder: str, settings: Settings
    ) -> None:
        ov = require("openvino", extra="openvino", why="run OpenVINO variants")
        self._threads = settings.threads or usable_cpus()
        options = latency_options(candidate.variant, self._threads)
        core = open_core()
        files = (bundle.path / encoder, bundle.file(candidate.variant))
        # Nothing compiled is kept alive but by its requests.
        self._requests = [
            compile_known(core, file, "CPU", options).create_infer_request() for file in files
        ]
        self._tensor = ov.Tensor
        first, second = (request.get_compiled_model() for request in self._requests)
        self.inputs = tuple(n for port in first.inputs for n in port.get_names())
        self._takes = tuple(n for port in second.inputs for n in port.get_names())
        self._names = [n for port in first.outputs for n in port.get_names()]
        if BEAM not in self._takes:
            raise BundleError(
                f"{candidate.variant.name} of {bundle.path} has no states",
                fix=f"run: memopt export {bundle.path} --format openvino",
            )

    def encode(self, source: Source) -> None:
        """Run the encoder; see :class:`PairDecoder`."""
        encoder, decoder = self._requests
        encoder.infer({name: np.ascontiguousarray(array) for name, array in source.items()})
        for name in self._names:
            # A copy: the encoder writes over its own at the next source.
            kept = self._tensor(np.array(encoder.get_tensor(name).data))
            decoder.set_tensor(PAST + name.removeprefix(PRESENT), kept)
        if _SOURCE_MASK in self._takes:
            mask = np.array(source[_MASK], np.int64)
            decoder.set_tensor(_SOURCE_MASK, self._tensor(mask))
        decoder.reset_state()

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the decoder once; see :class:`PairDecoder`."""
        decoder = self._requests[1]
        rows = np.arange(len(ids), dtype=np.int32)
        decoder.infer({"input_ids": np.ascontiguousarray(ids), BEAM: rows})
        return np.array(decoder.get_tensor("logits").data[:, -1], np.float32)

    def info(self) -> dict[str, Any]:
        """Return what runs it."""
        return {"runtime": "openvino", "threads": self._threads, "streams": 1}

    def close(self) -> None:
        """Free the models."""
        self._requests = []
