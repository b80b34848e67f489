"""Compilers, exporters and tracers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.helpers import STEPS
from tests.in_the_field.cases import limited, refused, works
from tests.in_the_field.trial import Trial, batch, loss_of, same_output, trained
from torch import nn

from kronblocks import BlockSparseLinear, KroneckerBlockLinear, densify_
from kronblocks.deploy import export
from kronblocks.nn.base import BlockLayer

COMPILERS = "compilers and exporters"


@works(
    COMPILERS, "torch.compile in training, with validation and a short last batch", "stays below torch's limit of recompilations"
)
def compiled() -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    dynamo.reset()
    trial = Trial()
    counter = CompileCounterWithBackend("eager")
    # with fullgraph the limit is an error; without, training would go on uncompiled
    model: Any = torch.compile(trial.model, backend=counter, fullgraph=True)
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        loss = loss_of(model.train(), rows=20 if trial.sparsifier.step % 10 == 9 else 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.note(loss)
        if trial.sparsifier.step % 10 == 0:
            with torch.no_grad():
                loss_of(model.eval())
    trial.check()
    assert counter.frame_count < dynamo.config.recompile_limit
    dynamo.reset()


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


@refused(COMPILERS, "torch.jit.script", "script a `densify_`-ed copy, or use torch.export", "densify_|export")
def scripted() -> None:
    torch.jit.script(trained().model.eval())


@works(COMPILERS, "torch.jit.script of a dense copy", "`densify_` first")
def scripted_dense() -> None:
    model = trained().model.eval()
    densify_(model)
    assert same_output(torch.jit.script(model), model)


@works(COMPILERS, "torch.fx.symbolic_trace", "block layers are leaves")
def fx() -> None:
    model = trained().model.eval()
    graph = torch.fx.symbolic_trace(model)
    assert same_output(graph, model)
    assert isinstance(graph.get_submodule("0"), BlockLayer)


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


@works(COMPILERS, "torch.func.grad, jacrev, jvp", "layers build the dense weight there, and compute at its cost")
def functional_derivatives() -> None:
    for layer in (BlockSparseLinear(32, 16, 8, plan="packed"), KroneckerBlockLinear(32, 16, 8, 2, plan="tile_first")):
        x, weight = torch.randn(4, 32), layer.dense_weight().detach()
        assert torch.allclose(torch.func.jacrev(layer)(x[0]), weight, atol=1e-6)
        assert torch.allclose(torch.func.grad(lambda x, layer=layer: layer(x).sum())(x), weight.sum(0).expand(4, 32), atol=1e-5)
        assert torch.allclose(torch.func.jvp(layer, (x,), (x,))[1], x @ weight.T, atol=1e-5)


@works(COMPILERS, "torch.autograd.forward_ad", "layers build the dense weight there, and compute at its cost")
def forward_mode() -> None:
    forward = torch.autograd.forward_ad
    for layer in (BlockSparseLinear(32, 16, 8, plan="packed"), KroneckerBlockLinear(32, 16, 8, 2, plan="tile_first")):
        x, dx, weight = torch.randn(4, 32), torch.randn(4, 32), layer.dense_weight().detach()
        for wants_grad in (True, False):
            with torch.set_grad_enabled(wants_grad), forward.dual_level():
                dy = forward.unpack_dual(layer(forward.make_dual(x, dx))).tangent
            assert dy is not None and torch.allclose(dy, dx @ weight.T, atol=1e-5)
