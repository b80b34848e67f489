"""What a layer computes follows from its parameters and buffers alone, whoever writes into them or replaces them."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from kronblocks import BlockSparseLinear, KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.mixture import BlockMixtureLinear
from kronblocks.ops import BlockSize

pytestmark = pytest.mark.usefixtures("compiles_afresh")

OTHER = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0]], dtype=torch.bool)


def other(make, **settings) -> BlockLayer:
    """As many live blocks as `make.pruned()`, elsewhere; in a layer of free values in slots that changed their blocks."""
    layer = make(**settings)
    mask = OTHER.to(layer.block_mask.device)
    if isinstance(layer, BlockSparseLinear):
        layer = pruned(make, **settings)
        layer.set_block_mask_(make.live & OTHER)
        layer.set_block_mask_(mask)
        with torch.no_grad():
            layer.values.normal_()
    layer.set_block_mask_(mask)
    return layer


def pruned(make, **settings) -> BlockLayer:
    """With no dead slots, as after compact_."""
    layer = make.pruned(**settings)
    if isinstance(layer, BlockSparseLinear):
        layer.compact_()
    return layer


def computed(function, layer, expected_weight, rows: int = 5) -> None:
    """y = x W^T + bias with W from the present parameters and buffers by the formulas; sums of at most 45 fp32 products."""
    x = torch.randn(rows, 15)
    wanted = nn.functional.linear(x, expected_weight(layer), layer.bias)
    torch.testing.assert_close(function(x), wanted, rtol=1e-5, atol=1e-5)


def copied_in_place(layer, source, *_):
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            value.copy_(source.state_dict()[name])


def copied_in_inference_mode(layer, source, *_):
    with torch.inference_mode():
        copied_in_place(layer, source)


def replaced(layer, source, *_):
    for name, value in source.named_buffers():
        setattr(layer, name, value.clone())
    for name, value in source.named_parameters():
        setattr(layer, name, nn.Parameter(value.detach().clone()))


def loaded(layer, source, assign=False):
    layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)


def assigned(layer, source, *_):
    loaded(layer, source, assign=True)


WRITES = [copied_in_place, copied_in_inference_mode, replaced, loaded, assigned]


@pytest.mark.parametrize("write", WRITES)
def test_a_layer_computes_with_what_its_buffers_hold(make, write, expected_weight):
    layer, source = pruned(make), other(make)
    layer(torch.randn(5, 15))
    write(layer, source)
    computed(layer, layer, expected_weight)
    torch.testing.assert_close(layer.dense_weight(), expected_weight(source), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.block_norms(), source.block_norms())
    assert torch.equal(layer.nonzero_blocks(), OTHER)


ALL = [(kind, plan) for kind in ("kron", "kron-groups", "kron-gate") for plan in ("dense", "tile_first", "coeff_first", "packed")]
ALL += [("free", "dense"), ("free", "packed")]
# one layer of each storage and way to multiply; what differs between the others is not compiled, or is in the whole list
FEW = [("kron", "packed"), ("kron-gate", "tile_first"), ("free", "packed")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "write"),
    [(make, write) for write in WRITES for make in (ALL if write is loaded else FEW)],
    indirect=["make"],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value.__name__,
)
def test_so_does_compiled_code(make, write, expected_weight):
    """The operators look, since compiled code cannot: forward and backward agree with a layer that was made like this."""
    layer, source = pruned(make), other(make)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(5, 15))
    write(layer, source)
    computed(compiled, layer, expected_weight)
    x = torch.randn(5, 15)
    gradients = []
    for function, module in ((compiled, layer), (source, source)):
        function(x).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for one, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-4)  # sums of at most 75 fp32 products


@pytest.mark.slow
def test_writes_of_the_same_shapes_do_not_compile_again(make, expected_weight):
    """Averages write at every step."""
    layer, sources = pruned(make), [other(make), pruned(make), other(make)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(5, 15))
    with torch.compiler.set_stance("fail_on_recompile"):
        for source in sources:
            copied_in_place(layer, source)
            computed(compiled, layer, expected_weight)


@pytest.mark.slow
@pytest.mark.parametrize("make", [(kind, "packed") for kind in ("kron", "kron-groups", "kron-gate")], ids="-".join, indirect=True)
def test_more_live_blocks_than_compiled_code_has_room_for_are_refused(make):
    """Only the packed plan of factors has a list of live blocks that grows."""
    layer = make.pruned()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(5, 15))
    layer.block_mask.fill_(True)
    with pytest.raises((KronblocksError, RuntimeError), match="was written into: it has 12 live blocks now, .* made for 7"):
        compiled(torch.randn(5, 15))
    x = torch.randn(5, 15)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "where", "compile_"),
    [(make, where, compile_) for compile_ in (False, True) for where in ("cpu", "meta") for make in (FEW if compile_ else ALL)],
    indirect=["make"],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_functional_call_with_the_state_of_another(make, where, compile_, expected_weight):
    """The module may be a skeleton without values, as in torch's recipe for ensembles."""
    skeleton = copy.deepcopy(pruned(make)).to(where)

    def call(state, x):
        return functional_call(skeleton, state, (x,))

    called = torch.compile(call, backend="aot_eager") if compile_ else call
    for layer in (other(make), pruned(make)):
        state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        computed(lambda x, state=state: called(state, x), layer, expected_weight)
    if where == "cpu":
        computed(skeleton, skeleton, expected_weight)


def test_vmap_over_stacked_layers(make, expected_weight):
    layers = [pruned(make), other(make), other(make)]
    parameters, buffers = stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")
    x = torch.randn(5, 15)
    ys = torch.vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
    for y, layer in zip(ys, layers, strict=True):
        wanted = nn.functional.linear(x, expected_weight(layer), layer.bias)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_derivatives_by_torch_func(make):
    layer, x, dx = make.pruned(), torch.randn(5, 15), torch.randn(5, 15)
    weight = layer.dense_weight().detach()
    dy = torch.func.jvp(layer, (x,), (dx,))[1]
    torch.testing.assert_close(dy, dx @ weight.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), weight.sum(0).expand(5, 15), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_buffers_broadcast_to_replicas(make, expected_weight):
    """DataParallel's replicas share everything but parameters and buffers, and run in threads of their own."""
    layer, source = pruned(make), other(make)
    layer(torch.randn(5, 15))
    replica = layer._replicate_for_data_parallel()
    replica._buffers = {name: value.clone() for name, value in source.named_buffers()}
    replica._parameters = dict(source.named_parameters())
    computed(replica, source, expected_weight)
    computed(layer, layer, expected_weight)


@pytest.mark.slow
def test_a_copy_of_a_layer_that_was_written_into(make, expected_weight):
    layer, source = pruned(make), other(make)
    copied_in_place(layer, source)
    again = copy.deepcopy(layer)
    computed(torch.compile(again, backend="aot_eager"), source, expected_weight)
    computed(again, source, expected_weight)
    again.to(torch.float64).to(torch.float32)
    computed(again, source, expected_weight)


@pytest.mark.slow
def test_exported_programs_hold_the_mask_of_that_moment(make, expected_weight):
    layer, source = pruned(make), other(make)
    copied_in_place(layer, source)
    program = torch.export.export(layer, (torch.randn(5, 15),))
    computed(program.module(), source, expected_weight)


def test_a_block_that_comes_alive_is_zero_though_somebody_else_killed_it(make):
    layer = make.pruned()
    layer.block_mask[1] = False
    layer.set_block_mask_(make.live)
    assert (layer.grid.to_blocks(layer.dense_weight())[1] == 0).all()


def test_a_layer_made_and_changed_in_inference_mode(make, expected_weight):
    """Such tensors count no versions."""
    with torch.inference_mode():
        layer, source = pruned(make), other(make)
        computed(layer, layer, expected_weight)
        copied_in_place(layer, source)
        computed(layer, source, expected_weight)
    with torch.no_grad():
        computed(layer, source, expected_weight)


def test_what_inference_mode_derived_serves_in_training(make):
    layer, source = pruned(make), other(make)
    copied_in_place(layer, source)
    x = torch.randn(5, 15)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_mixture_follows_too():
    blocks = {"3x5": BlockSize(3, 5), "4x3": BlockSize(4, 3)}
    one, two = (BlockMixtureLinear(15, 12, blocks, rank=2) for _ in range(2))
    for layer in two.candidates.values():
        layer.block_mask[0] = False
    for layer in one.candidates.values():
        layer.use_plan_("packed")
    copied_in_place(one, two)
    x = torch.randn(5, 15)
    torch.testing.assert_close(one(x), nn.functional.linear(x, two.weight, two.bias), rtol=1e-5, atol=1e-5)
