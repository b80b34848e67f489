"""From a trained model: ranks by its weights, live blocks by their norms, and learning from its outputs."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from kronblocks import (
    BlockSparseLinear,
    Distillation,
    KronblocksError,
    KroneckerBlockLinear,
    LayerOverride,
    ScheduleConfig,
    SparsityConfig,
    parameter_groups,
    sparsify_,
)
from kronblocks.config import RankChoice
from kronblocks.core.errors import KronblocksWarning
from kronblocks.ops import BlockGrid, BlockSize, nearest_kronecker_sum
from kronblocks.ops.nearest import spectrum
from kronblocks.surgery.ranks import choose_ranks


def trained(*sizes: int, seed: int = 0) -> nn.Sequential:
    """Layers whose weights have a few strong directions, as training gives them."""
    torch.manual_seed(seed)
    layers = []
    for n, m in itertools.pairwise(sizes):
        linear = nn.Linear(n, m)
        linear.weight.data += sum(torch.outer(torch.randn(m), torch.randn(n)) * 0.5 / (k + 1) for k in range(3))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("block", "groups"), [("2x3", 1), ("2x3", 4), ("4x2", 2), ("8x6", 1)])
def test_the_spectrum_is_that_of_the_nearest_sum(block, groups):
    grid = BlockGrid(16, 12, BlockSize.parse(block))
    weight = torch.randn(16, 12, dtype=torch.float64)
    squares = spectrum(weight, grid, groups)
    assert float(squares.sum()) == pytest.approx(1)
    for rank in range(1, len(squares) + 1):
        _, _, error = nearest_kronecker_sum(weight, grid, rank, tile_groups=groups)
        assert float(squares[rank:].sum()) ** 0.5 == pytest.approx(error, abs=1e-7)


@pytest.mark.parametrize("max_error", [0.8, 0.5, 0.2, 0.0])
def test_the_least_rank_within_an_error(max_error):
    model = trained(48, 32, 16)
    config = SparsityConfig(block_size=4, rank=RankChoice(max_error=max_error), init="nearest", tile_groups=1)
    weights = [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        surgery = sparsify_(model, config).surgery
    for each, weight in zip(surgery.selected, weights, strict=True):
        errors = {rank: nearest_kronecker_sum(weight, each.grid, rank)[2] for rank in (each.rank - 1, each.rank) if rank}
        assert errors.pop(each.rank) <= max_error + 1e-6 and all(error > max_error for error in errors.values())
        assert f"rank {each.rank}" in str(surgery)
        layer = model.get_submodule(each.name)
        assert layer.rank == each.rank
        now = float((layer.dense_weight().detach() - weight).norm() / weight.norm())
        assert each.error == pytest.approx(now, abs=1e-5) and f"within {each.error:.3f}" in str(surgery)


def test_a_budget_is_kept_and_no_other_ranks_within_it_are_much_better():
    layers = [(torch.randn(m, n) + torch.ones(m, n), BlockGrid.fit(m, n, BlockSize(4, 2)), g) for m, n, g in
              ((16, 8, 1), (24, 16, 6), (8, 32, 2))]  # fmt: skip
    costs = [grid.blocks + g * grid.block.area for _, grid, g in layers]
    spectra = [spectrum(*layer) for layer in layers]

    def error(ranks):
        return sum(float(squares[rank:].sum()) for squares, rank in zip(spectra, ranks, strict=True))

    for share in (0.3, 0.5, 0.9):
        budget = share * sum(grid.weights for _, grid, _ in layers)
        ranks = choose_ranks(RankChoice(max_parameters=share), layers)
        possible = [
            each
            for each in itertools.product(range(1, 9), repeat=3)
            if sum(r * c for r, c in zip(each, costs, strict=True)) <= budget
        ]
        assert tuple(ranks) in possible
        term = max(float(squares[rank - 1]) for squares, rank in zip(spectra, ranks, strict=True))
        assert error(ranks) <= min(map(error, possible)) + term  # greedy: at most one term short


def test_ranks_that_cannot_be_chosen():
    with pytest.raises(KronblocksError, match="either max_error"):
        RankChoice()
    with pytest.raises(KronblocksError, match="either max_error"):
        RankChoice(max_error=0.1, max_parameters=0.5)
    with pytest.raises(KronblocksError, match="0 to below 1"):
        RankChoice(max_error=1.5)
    model = trained(16, 16)
    with pytest.raises(KronblocksError, match="already, above"):
        sparsify_(model, SparsityConfig(block_size=2, rank=RankChoice(max_parameters=0.1), init="nearest"))
    assert isinstance(model[0], nn.Linear)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(KronblocksError, match="meta device"):
        sparsify_(model, SparsityConfig(block_size=2, rank=RankChoice(max_error=0.1), init="nearest"))


def test_a_rank_of_an_override_stays():
    model = trained(16, 32, 16)
    overrides = {"2": LayerOverride(rank=3)}
    choice = RankChoice(max_error=0.7)
    config = SparsityConfig(block_size=4, rank=choice, init="nearest", overrides=overrides, target_sparsity=0.5)
    assert SparsityConfig.from_json(config.to_json()) == config
    selected = sparsify_(model, config).surgery.selected
    assert selected[1].rank == 3 and selected[0].rank != 3


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("method", ["static", "rigl"])
def test_live_blocks_of_greatest_norm(method, storage):
    model = trained(32, 32, 16)
    before = copy.deepcopy(model)
    config = SparsityConfig(method=method, block_size=4, target_sparsity=0.75, init="nearest", storage=storage)
    sparsifier = sparsify_(model, config)
    assert sum(int(target.mask.sum()) for target in sparsifier.targets) == sum(t.mask.numel() for t in sparsifier.targets) // 4
    for i, target in zip((0, 2), sparsifier.targets, strict=True):
        norms = target.grid.norms(before[i].weight)
        alone = target.mask & (target.mask.sum(1, keepdim=True) == 1) & (i == 2)  # the head keeps a block in every row
        assert norms[target.mask & ~alone].min() >= norms[~target.mask].max()
        assert torch.equal(norms[alone], norms.amax(1)[alone.any(1)])
    for i, target in zip((0, 2), sparsifier.targets, strict=True):
        kept = before[i].weight * target.grid.expand(target.mask)
        layer = model[i]
        assert torch.equal(layer.dense_weight() if isinstance(layer, BlockSparseLinear) else layer.weight, kept)
    if storage == "packed":
        error = sparsifier.surgery.selected[0].error
        kept = model[0].dense_weight()
        assert error == pytest.approx(float(((before[0].weight - kept).norm() / before[0].weight.norm()).detach()), abs=1e-6)


def test_live_blocks_are_shared_out_as_the_distribution_says():
    for distribution in ("uniform", "erk"):
        config = SparsityConfig(method="static", block_size=4, target_sparsity=0.75, init="nearest", distribution=distribution)
        densities = [float(target.mask.double().mean()) for target in sparsify_(trained(32, 32, 16), config).targets]
        assert densities == [0.25, 0.25] if distribution == "uniform" else densities[0] < densities[1]


@pytest.mark.parametrize("method", ["magnitude", "iterative"])
def test_pruning_live_blocks_is_pruning_the_dense_layer(method):
    results = []
    torch.manual_seed(1)
    x, y = torch.randn(64, 16, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
    for storage in ("dense", "packed"):
        model = trained(16, 32, 8).double()
        schedule = ScheduleConfig(update_every=3)
        config = SparsityConfig(method=method, block_size=4, target_sparsity=0.8, storage=storage, schedule=schedule)
        sparsifier = sparsify_(model, config)
        assert isinstance(model[0], BlockSparseLinear if storage == "packed" else nn.Linear)
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, lifted_lr_scale=1.0))
        sparsifier.attach(optimizer, total_steps=40)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        assert sparsifier.sparsity == 39 / 48
        results.append((model(x).detach(), [target.mask for target in sparsifier.targets], model))
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(results[1][0], results[0][0])
    values = sum(layer.values.numel() for layer in results[1][2] if isinstance(layer, BlockSparseLinear))
    assert values == sum(16 * int(mask.sum()) for mask in results[1][1])  # what is dead takes no memory in the end


def test_dropping_trained_weights_is_said():
    for method in ("two-phase", "rigl", "static"):
        with pytest.warns(KronblocksWarning, match=r"the weight of 0 looks trained.*init='nearest'"):
            sparsify_(trained(64, 64), SparsityConfig(method=method, target_sparsity=0.5))


@pytest.mark.parametrize("seed", range(3))
def test_new_weights_and_wanted_starts_are_quiet(seed):
    torch.manual_seed(seed)
    inits = (
        lambda weight: None,
        lambda weight: nn.init.trunc_normal_(weight, std=0.02),
        nn.init.kaiming_normal_,
        nn.init.orthogonal_,
        nn.init.zeros_,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for init, (m, n) in itertools.product(inits, ((32, 32), (64, 256), (512, 128))):
            model = nn.Sequential(nn.Linear(n, m))
            init(model[0].weight)
            sparsify_(model, SparsityConfig(target_sparsity=0.5))
        for start in ("nearest", "random"):
            sparsify_(trained(64, 64), SparsityConfig(target_sparsity=0.5, init=start))
        sparsify_(trained(64, 64), SparsityConfig(method="magnitude", target_sparsity=0.5))


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_distillation_is_its_formula(shape):
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 7).double(), nn.Linear(4, 7).double()
    x = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    loss = student(x).square().mean()
    given = Distillation(teacher, weight=0.3, temperature=3.0)(loss, student(x), x)
    p, q = ((each(x) / 3).softmax(-1).reshape(-1, 7) for each in (teacher, student))
    wanted = 0.7 * loss + 0.3 * 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(given, wanted)
    ours, theirs = (torch.autograd.grad(each, student.weight, retain_graph=True)[0] for each in (given, wanted))
    torch.testing.assert_close(ours, theirs)
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters()), "the copy is asked, not the model"


def test_the_teacher_is_the_model_as_it_was_and_stays_out_of_it():
    model = trained(16, 32, 4)
    before = copy.deepcopy(model)
    distillation = Distillation.of(model, weight=1)
    sparsify_(model, SparsityConfig(block_size=4, target_sparsity=0.5, init="nearest"))
    model.distillation = distillation
    assert isinstance(model[0], KroneckerBlockLinear) and not any("teacher" in name for name in model.state_dict())
    x = torch.randn(8, 16)
    assert float(distillation(torch.zeros(()), before(x), x).detach()) == pytest.approx(0, abs=1e-6)
    assert float(distillation(torch.zeros(()), model(x), x).detach()) > 1e-4


def test_distillation_of_transformers_and_in_half_precision():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, pixel_values, labels=None):
            return {"logits": self.linear(pixel_values), "loss": labels}

    model = Model().bfloat16()
    distillation = Distillation.of(model, weight=1)
    batch = {"pixel_values": torch.ones(2, 4, dtype=torch.bfloat16), "labels": torch.zeros(2)}
    value = distillation(torch.zeros(()), model(**batch), **batch)
    assert value.dtype == torch.float32 and float(value.detach()) == pytest.approx(0, abs=1e-6)


def test_distillation_that_cannot_be():
    x = torch.ones(2, 4)
    distillation = Distillation(nn.Linear(4, 3))
    with pytest.raises(KronblocksError, match="use a teacher of this task"):
        distillation(torch.zeros(()), torch.zeros(2, 5), x)
    with pytest.raises(KronblocksError, match="without any"):
        distillation(torch.zeros(()), ("no", "logits"), x)
    for wrong in ({"weight": 1.5}, {"weight": -0.1}, {"temperature": 0.0}):
        with pytest.raises(KronblocksError, match=next(iter(wrong))):
            Distillation(nn.Linear(4, 3), **wrong)
    with pytest.raises(KronblocksError, match="at least two classes"):
        Distillation(nn.Linear(4, 1))(torch.zeros(()), torch.zeros(2, 1), x)
    with pytest.raises(KronblocksError, match="must be a model"):
        Distillation(lambda x: x)  # type: ignore[arg-type]
    empty = distillation(torch.zeros(()), torch.zeros(0, 3), torch.zeros(0, 4))
    assert float(empty) == 0


def test_the_model_itself_may_be_the_teacher():
    """A copy is asked: the student is not frozen by it."""
    model = trained(16, 32, 4)
    distillation = Distillation(model)
    sparsify_(model, SparsityConfig(block_size=4, target_sparsity=0.5, init="nearest"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    distillation(torch.zeros(()), model(torch.randn(8, 16)), torch.randn(8, 16)).backward()
    assert model[0].coeff.grad is not None


def test_what_the_weights_must_decide_they_must_be_there_for():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(KronblocksError, match="on the meta device"):
        sparsify_(model, SparsityConfig(method="rigl", init="nearest", block_size=8))
    with pytest.raises(KronblocksError, match="a RankChoice is for all layers"):
        LayerOverride(rank=RankChoice(max_error=0.1))  # type: ignore[arg-type]


def test_a_layer_wrapped_after_surgery_is_lifted_inside_its_wrapper():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=6)
    wrapper = model[0] = nn.Sequential(model[0])
    before = wrapper[0].dense_weight().detach()
    for _ in range(6):
        before = wrapper[0].dense_weight().detach()
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert isinstance(wrapper[0], BlockSparseLinear)
    assert sparsifier.sparsity == 0.5
    assert not torch.equal(wrapper[0].dense_weight(), before), "the values are trained"
