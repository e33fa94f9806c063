"""KServe's model server serving ONNX files by a custom model: `kserve_server.py HTTP_PORT GRPC_PORT NAME=FILE…`.

Runs in an environment of its own (`benchmarks/peers/environments.py`), where Wherry is not installed.
"""

from __future__ import annotations

import sys

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class OnnxModel(Model):
    """One session with one thread, as Wherry's worker has it."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        """Answer one request."""
        del headers, response_headers
        inputs = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        results = self._session.run(self._outputs, inputs)
        binary = bool(payload.parameters and payload.parameters.get("binary_data_output"))
        outputs = []
        for name, array in zip(self._outputs, results, strict=True):
            output = InferOutput(name=name, shape=list(array.shape), datatype="FP32")
            output.set_data_from_numpy(array, binary_data=binary)
            outputs.append(output)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=outputs)


def main() -> None:
    http_port, grpc_port, *models = sys.argv[1:]
    served = [OnnxModel(*text.split("=", 1)) for text in models]
    ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1, enable_latency_logging=False).start(
        served
    )


if __name__ == "__main__":
    main()
