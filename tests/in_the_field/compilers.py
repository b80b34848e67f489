"""Compilers, exporters and tracers."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.in_the_field.cases import limited, works
from tests.in_the_field.trial import batch, same_output, trained
from torch import nn

from kronblocks import densify_, export

COMPILERS = "compilers and exporters"


@works(COMPILERS, "torch.compile of a trained model", "one graph, no breaks")
def compiled_once() -> None:
    torch._dynamo.reset()
    model = trained().model.eval()
    assert same_output(torch.compile(model, backend="eager", fullgraph=True), model)
    torch._dynamo.reset()


@works(COMPILERS, "torch.export", "of the model as it is, or of `kronblocks.export(...).model`")
def exported() -> None:
    model = trained().model.eval()
    x = batch()[0]
    for each in (model, export(model, x).model):
        program = torch.export.export(each, (x,))
        assert same_output(program.module(), model, x)


@works(COMPILERS, "kronblocks.export", "each layer in the form that is fastest here, checked against the model")
def own_export() -> None:
    model = trained().model.eval()
    for form in ("dense", "packed", "bsr"):
        assert same_output(export(model, batch()[0], form=form).model, model)


@limited(COMPILERS, "ONNX", "dense or factored: ONNX has no block-sparse product", "onnx", "onnxscript", "onnxruntime")
def onnx(folder: Path) -> None:
    import onnxruntime

    from kronblocks.integrations.onnx import save_onnx

    model = trained().model.eval()
    x = batch()[0]
    file = save_onnx(model, x, folder / "model.onnx")
    session = onnxruntime.InferenceSession(file.path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)


@works(COMPILERS, "torch.jit.trace", "in eval")
def traced(folder: Path) -> None:
    model = trained().model.eval()
    x = batch()[0]
    torch.jit.save(torch.jit.trace(model, x), str(folder / "traced.pt"))
    assert same_output(torch.jit.load(str(folder / "traced.pt")), model, x)


@works(COMPILERS, "torch.jit.script of a dense copy", "`densify_` first")
def scripted_dense() -> None:
    model = trained().model.eval()
    densify_(model)
    assert same_output(torch.jit.script(model), model)


@works(COMPILERS, "torch.func.vmap over inputs", "as it is")
def over_inputs() -> None:
    model = trained().model
    x = torch.randn(3, 8, 32)
    assert torch.allclose(torch.vmap(model)(x), model(x), atol=1e-5)


@works(COMPILERS, "backward of backward (`create_graph=True`)", "as often as one likes")
def derivatives() -> None:
    model = nn.Sequential(*trained().model, nn.Tanh()).double()
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(model, (x,))
