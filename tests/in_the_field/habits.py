"""What scripts do around a loop: stop, go on, validate, begin again, and call things in another order."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import torch
from tests.helpers import STEPS, check_layers_agree
from tests.in_the_field.cases import limited, refused, works
from tests.in_the_field.trial import SPARSITY, Trial, config, loss_of, mlp, same_output
from torch import Tensor, nn

from kronblocks import densify_, parameter_groups, sparsify_
from kronblocks.surgery import lift_

LOOPS = "loops"


@works(LOOPS, "exceptions and Ctrl-C in mid-step", "a step counts when the optimiser has made it; go on, or load the last state")
def interrupted() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        if trial.sparsifier.step % 5 == 4 and len(trial.losses) % 2:
            try:
                loss_of(trial.model).backward()
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                trial.losses.append(trial.losses[-1])
        trial.step(optimizer)
    trial.check()


@limited(LOOPS, "early stopping", "ends at the sparsity that is reached: count only epochs in phase `heal`")
def early_stopping() -> None:
    trial = Trial()
    optimizer = trial.adam()
    for _ in range(8):
        trial.step(optimizer)
    assert trial.sparsifier.phase == "discover" and 0 < trial.sparsifier.sparsity < SPARSITY
    best, bad = float("inf"), 0
    while trial.sparsifier.step < STEPS and bad < 3:
        trial.step(optimizer)
        if trial.sparsifier.phase == "heal":
            best, bad = min(best, trial.losses[-1]), 0 if trial.losses[-1] < best else bad + 1
    trial.check(falls=False)


@works(LOOPS, "cross-validation, sweeps", "a new model, sparsifier and optimiser each")
def folds() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        trial = Trial()
        trial.train(trial.adam())


class Estimator:
    """As skorch and scikit-learn do it: made by `fit`, cloned, pickled."""

    def fit(self) -> Estimator:
        self.trial = Trial()
        self.trial.train(self.trial.adam())
        self.module_ = self.trial.model
        return self


@works(
    LOOPS, "skorch and scikit-learn: fit, clone, pickle", "`sparsify_` where the module is made, `attach` where the optimiser is"
)
def estimators() -> None:
    found = Estimator().fit()
    cloned, pickled = copy.deepcopy(found.module_), pickle.loads(pickle.dumps(found.module_))  # noqa: S301
    assert same_output(found.module_, cloned) and same_output(found.module_, pickled)
    Estimator().fit()


@works(LOOPS, "save, and go on later", "sparsifier's state first, then the model's, then the optimiser's: the same bits")
def resumed() -> None:
    torch.manual_seed(5)
    whole = Trial()
    optimizer, file = whole.adam(), io.BytesIO()
    for step in range(STEPS):
        if step == 14:  # after the lift
            state = {"sparsifier": whole.sparsifier.state_dict(), "model": whole.model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, file)
        whole.step(optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Trial()
    again.sparsifier.load_state_dict(saved["sparsifier"])
    again.model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(parameter_groups(again.model, lr=1e-2))
    optimizer.load_state_dict(saved["optimizer"])
    again.attach(optimizer)
    torch.set_rng_state(saved["random"])
    again.train(optimizer)
    for (name, one), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@works(LOOPS, "a layer's learning rate set to 0, warm restarts", "rates change zeros only through the optimiser")
def rates() -> None:
    trial = Trial()
    optimizer = trial.adam()
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5)
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        schedule.step()
        if trial.sparsifier.step == 20:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
    trial.check()


@works(LOOPS, "an own schedule of lifting", "`lift_(model, optimizer)` at any step")
def lifted_by_hand() -> None:
    trial = Trial()
    optimizer = trial.adam()
    for _ in range(5):
        trial.step(optimizer)
    lift_(trial.model, optimizer)
    trial.train(optimizer)


@refused(LOOPS, "a model that is trained twice with one sparsifier", "call `remove()` on the first handle", "attached already")
def attached_twice() -> None:
    trial = Trial()
    trial.adam()
    trial.adam()


@refused(
    LOOPS,
    "`sparsify_` again while the first sparsifier still prunes",
    "call `remove()` on its handle first, or wait for `heal`",
    "another sparsifier, which is attached, follows 0, 2",
)
def sparsified_twice() -> None:
    trial = Trial()
    trial.adam()
    sparsify_(trial.model, config("rigl"))


@works(LOOPS, "back to dense for further work", "`densify_`: the same outputs, zeros included")
def dense_again() -> None:
    trial = Trial()
    trial.train(trial.adam())
    before = copy.deepcopy(trial.model)
    densify_(trial.model)
    assert same_output(before, trial.model) and type(trial.model[0]) is nn.Linear
    assert int((trial.model[0].weight == 0).sum()) >= 0.5 * trial.model[0].weight.numel()


@works(LOOPS, "`sparsify_` under torch.no_grad()", "parameters train all the same")
def without_gradients() -> None:
    with torch.no_grad():
        trial = Trial()
    trial.train(trial.adam())


@refused(LOOPS, "`sparsify_` under torch.inference_mode()", "call it outside", "under torch.inference_mode")
def in_inference_mode() -> None:
    with torch.inference_mode():
        Trial()


@works(LOOPS, "two models in two threads", "the same bits as one after the other")
def threads() -> None:
    found: dict[tuple[int, int], Tensor] = {}

    def run(seed: int, turn: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        model = mlp()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        trial = Trial(model, config("magnitude", storage="packed"))
        optimizer = trial.adam()
        for _ in range(STEPS):
            loss = model(torch.randn(16, 32, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert trial.sparsifier.sparsity == SPARSITY
        found[seed, turn] = model(torch.ones(1, 32)).detach()

    for seed in (1, 2):
        run(seed, 0)
    started = [threading.Thread(target=run, args=(seed, 1)) for seed in (1, 2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert all(torch.equal(found[seed, 0], found[seed, 1]) for seed in (1, 2))


@works(LOOPS, "detect_anomaly, use_deterministic_algorithms", "as they are")
def modes() -> None:
    for method in ("two-phase", "rigl"):
        try:
            torch.use_deterministic_algorithms(True)
            trial = Trial(settings=config(method))
            with torch.autograd.set_detect_anomaly(True):
                trial.train(trial.adam())
        finally:
            torch.use_deterministic_algorithms(False)


@refused(LOOPS, "LBFGS", "its line search expects a fixed set of weights: use an optimiser of one gradient a step", "LBFGS")
def lbfgs() -> None:
    trial = Trial()
    trial.attach(torch.optim.LBFGS(trial.model.parameters()))


@refused(LOOPS, "the optimiser made before `sparsify_`", "make it afterwards", "make the optimiser after sparsify_")
def too_early() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsify_(model, config()).attach(optimizer, total_steps=STEPS)


@works(LOOPS, "no_grad and inference_mode around validation", "each few steps, over the lift")
def validation() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                loss_of(trial.model.eval(), rows=7)
        trial.model.train()
        check_layers_agree(trial.model)
    trial.check()
