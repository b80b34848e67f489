"""What methods are trained with: each one's optimiser settings, and which settings of a training it has."""

from __future__ import annotations

from typing import NamedTuple, get_args

from kronblocks.config.methods import METHODS, Setting, spec_of
from kronblocks.surgery.groups import FACTOR_LR_SCALE, LIFTED_LR_SCALE, TILE_LR_SCALE

OF_SPARSITY = tuple(name for name in get_args(Setting) if "." not in name and name != "penalty")
"""Settings of a `SparsityConfig` that only some methods have; parts of its schedule and its penalty apart."""

OF_FACTORS = ("factor_lr_scale", "tile_lr_scale", "factor_weight_decay")
"""Optimiser settings for factors."""

OF_FREE_VALUES = ("lifted_lr_scale", "lifted_weight_decay")
"""Those for values of live blocks, which methods that may work on the nn.Linear itself have with storage "packed" only."""

OF_SOME_METHODS = (*OF_SPARSITY, *OF_FACTORS, *OF_FREE_VALUES)


def has_setting(method: str, name: str) -> bool:
    """Whether a method has one of `OF_SOME_METHODS`, or a penalty; one that is not known here, such as another's, has none."""
    spec = METHODS.get(method)
    if spec is None:
        return False
    if name in (*OF_SPARSITY, "penalty"):
        return name in spec.settings
    if name in OF_FACTORS:
        return spec.is_factored
    return spec.is_lifted or "storage" in spec.settings


class Recipe(NamedTuple):
    """Rates and decays of a method's parameter groups."""

    lr: float = 2e-3  # of what is not sparse
    weight_decay: float = 0.0
    factor_weight_decay: float = 0.0
    factor_lr_scale: float = FACTOR_LR_SCALE  # rate of factors, relative to what their shapes ask for
    tile_lr_scale: float = TILE_LR_SCALE  # rate of tiles, relative to that of the other factors
    lifted_lr_scale: float = LIFTED_LR_SCALE  # rate of free block values, relative to what the density asks for
    lifted_weight_decay: float | None = None  # of free block values; None: as dense weights


RECIPES: dict[str, Recipe] = {
    "kron-l1": Recipe(factor_weight_decay=0.05),  # decay on A and B is what gives L1 on S its meaning (equation 15)
}
"""Of methods that need one of their own; the library knows no learning rates, so they are here and not in `METHODS`."""


_OF_MODELS: dict[str, dict[str, float]] = {
    "decoder": {"lr": 2e-3, "weight_decay": 0.1},
    "vit": {"lr": 1e-3, "weight_decay": 0.05},
}
"""What models train with instead, whatever the method."""


def recipe_of(method: str, model: str = "mlp") -> Recipe:
    """The rates and decays that a method is trained with."""
    spec_of(method)
    return RECIPES.get(method, Recipe())._replace(**_OF_MODELS.get(model, {}))


class Course(NamedTuple):
    """What a training has in common over all its parameter groups: AdamW, linear warm-up, then a cosine."""

    beta2: float = 0.999  # of AdamW; its beta1 is 0.9
    clip: float | None = None  # largest norm of all gradients together; None: any
    warm_up: float = 0.1  # share of the steps
    final_lr: float = 0.0  # where the cosine ends, as a share of the rate


_COURSES: dict[str, Course] = {
    "decoder": Course(beta2=0.99, clip=1.0, final_lr=0.1),
    "vit": Course(clip=1.0),
}


def course_of(model: str) -> Course:
    """How a model is trained."""
    return _COURSES.get(model, Course())
