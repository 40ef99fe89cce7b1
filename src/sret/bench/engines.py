"""A model under an engine: what makes a module answer for one fixed batch, in evaluation or as a step of training.

    eager        the module as it was created
    fused        ours alone: `sret.models.fuse`, then as eager
    compile      torch.compile with frozen weights; of ours the fused form. In training, of ours, `SReT.compile`
    cudagraphs   compile, its kernels recorded once and replayed; on CUDA
    onnxruntime  exported to ONNX, ours as `sret export` does; on the CPU
    openvino     the same ONNX, read by OpenVINO; on the CPU

What `sret export` wrote brings its engine along, and runs under no other. All of them take as many threads as torch.
"""

import copy
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cached_property
from io import StringIO

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sret.export.onnx import to_onnx
from sret.export.runtime import Exported, import_openvino, openvino_runner
from sret.models.fuse import fuse
from sret.models.sret import SReT

Run = Callable[[], Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_ONLY = ("onnxruntime", "openvino")
ENGINES = ("eager", "fused", "compile", "cudagraphs", *CPU_ONLY)
TRAINED = ("eager", "compile")
LEARNING_RATE = 1e-4  # small: the same images are shown again and again


def own_engine(model: Exported) -> tuple[str, str]:
    """The engine and dtype that an exported model runs in."""
    return {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}[model.engine], model.dtype


def objection(engine: str, dtype: str, device: torch.device, is_training: bool) -> str:
    """Why no model can run so, or an empty string."""
    if is_training and engine not in TRAINED:
        return f"trains nothing; {' and '.join(TRAINED)} do"
    if is_training and dtype == "float16":
        return "training in float16 needs its loss scaled; take bfloat16"
    if device.type == "cuda" and engine in CPU_ONLY:
        return "runs on the CPU here; take --device cpu"
    if device.type != "cuda" and engine == "cudagraphs":
        return "needs --device cuda"
    if device.type != "cuda" and dtype == "float16":
        return "float16 needs --device cuda; on a CPU take bfloat16"
    if engine == "onnxruntime" and dtype != "float32":
        return f"onnxruntime has no {dtype} on a CPU"
    return ""


class Subject:
    """One model and its batch; what several engines need of it is made once.

    Args:
        model: a classifier in float32.
        images: (B, C, H, W) float32 on the model's device.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model.eval(), images

    @cached_property
    def fused(self) -> nn.Module:
        """Ours fused, its permutations known; any other model as it is."""
        if not isinstance(self.model, SReT):
            return self.model
        fused = fuse(self.model)
        with torch.no_grad():
            fused(self.images[:1])  # a compiler would take what is remembered within a graph for the graph's own
        return fused

    @cached_property
    def onnx(self) -> bytes:
        """In ONNX: ours as `sret export` writes it, any other model for this batch alone."""
        import onnxscript  # noqa: F401  (torch would report a missing one at length)

        _hush("torch.onnx", "onnxscript", "onnx_ir")
        with redirect_stdout(StringIO()):  # it tells its progress
            if isinstance(self.model, SReT):
                return to_onnx(self.model, (self.images.shape[2], self.images.shape[3])).SerializeToString()
            program = torch.onnx.export(self.model, (self.images,), dynamo=True, verbose=False)
        assert program is not None
        return program.model_proto.SerializeToString()

    def ready(self, engine: str, dtype: str) -> Run:
        """A callable that gives (B, K) logits. What is made or compiled lazily is made by its first call."""
        if isinstance(self.model, Exported):
            return lambda: self.model(self.images)
        if engine == "onnxruntime":
            return _onnxruntime(self.onnx, self.images)
        if engine == "openvino":
            return _openvino(self.onnx, self.images, dtype)
        model, images = self.model if engine == "eager" else self.fused, self.images
        if dtype != "float32":
            model, images = copy.deepcopy(model).to(DTYPES[dtype]), images.to(DTYPES[dtype])
        if engine in ("compile", "cudagraphs"):
            return _compiled(model, images, engine == "cudagraphs")

        @torch.no_grad()
        def run() -> Tensor:
            return model(images)

        return run

    def ready_to_train(self, engine: str, dtype: str) -> Run:
        """A callable that takes a step and gives the loss before it: forward, cross-entropy, backward, AdamW.

        bfloat16 is autocast over float32 weights. Labels are drawn from one seed, so that all engines see the same.
        """
        model, images = copy.deepcopy(self.model).train(), self.images
        with torch.no_grad():
            num_classes = self.model(images[:1]).shape[1]
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(num_classes, (len(images),), generator=generator).to(images.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        _hush("torch.utils.cpp_extension")  # which misses CUDA on a machine without
        forward: Callable[[Tensor], Tensor] = model
        if engine == "compile" and isinstance(model, SReT):
            model.compile()  # its passes
        elif engine == "compile":
            forward = torch.compile(model, dynamic=False)

        def run() -> Tensor:
            with torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "float32"):
                loss = cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return run


def _hush(*loggers: str) -> None:
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)


def _compiled(model: nn.Module, images: Tensor, has_graphs: bool) -> Run:
    _hush("torch.utils.cpp_extension")  # which misses CUDA on a machine without
    # Not dynamic: the second of two models of one class would else get slower kernels that fit any shape.
    compiled = torch.compile(model, dynamic=False, options={"freezing": True, "triton.cudagraphs": has_graphs})

    @torch.no_grad()
    def run() -> Tensor:
        if has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(images)

    return run


def _onnxruntime(onnx: bytes, images: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(onnx: bytes, images: Tensor, dtype: str) -> Run:
    core = import_openvino().Core()
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    run = openvino_runner(core, core.read_model(onnx), options, onnx)
    return lambda: torch.from_numpy(run(images.numpy()))
