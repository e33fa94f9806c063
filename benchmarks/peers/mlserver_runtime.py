"""MLServer serving an ONNX file by a custom runtime: the peer as its own documentation says to set it up.

Runs in an environment of its own (`benchmarks/peers/environments.py`), where Wherry is not installed.
"""

from __future__ import annotations

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """One session with one thread, as Wherry's worker has it."""

    async def load(self) -> bool:
        """Open the file that the settings name."""
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, settings, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request."""
        inputs = {tensor.name: self.decode(tensor, default_codec=NumpyCodec) for tensor in payload.inputs}
        results = self._session.run(self._outputs, inputs)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(self._outputs, results, strict=True)]
        return InferenceResponse(model_name=self.name, model_version=self.version, id=payload.id, outputs=outputs)
