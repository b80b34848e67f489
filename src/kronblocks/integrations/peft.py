"""LoRA for block-sparse layers, by PEFT's own calls: `import kronblocks.integrations.peft` enables it.

The import wraps two methods of PEFT's tuners, so that every call that makes or loads adapters finds block layers. Models without
block layers are not affected.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType, TaskType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn

from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import BlockLayer

_WRITE_TO_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


class BlockLora(LoraLinear):
    """A trained low-rank update of a block layer: `layer(x) + B A x`. The layer stays frozen and sparse.

    Merging is refused: the update has no zero blocks, so the layer would become dense.
    """

    def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # it has in_features, out_features and weight
            super().__init__(base_layer, adapter_name, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raise KronblocksError."""
        raise KronblocksError(
            "a LoRA update has no zero blocks, so merging it would make the block-sparse layer dense: keep it apart, or call "
            "kronblocks.densify_ on the base model before get_peft_model"
        )


def with_block_layers(config: LoraConfig) -> LoraConfig:
    """Make one LoraConfig accept block layers, for code that calls `LoraModel` directly."""
    config._register_custom_module({BlockLayer: BlockLora})
    return config


def _prepare(model: nn.Module, config: Any) -> None:
    """Register a model's block layers with PEFT, before it changes anything.

    Raises:
        KronblocksError: the method, or its start, does not work on block layers.
    """
    blocks = [name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, BlockLayer)]
    if not blocks:
        return
    everything = str(getattr(config, "target_modules", None)).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if config.peft_type == PeftType.LORA:
        if everything:
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = {*config.target_modules, *blocks} - _heads(model, config)
        with_block_layers(config)
    targets = blocks if everything else [name for name in blocks if _is_target(config, name)]
    if targets and config.peft_type != PeftType.LORA:
        raise KronblocksError(
            f"{config.peft_type.value} does not support block-sparse layers, such as {targets[0]}: use LoRA, name only dense "
            "layers in target_modules, or call kronblocks.densify_ on the model first"
        )
    if targets:
        _check_lora(config, targets[0])


def _is_target(config: Any, name: str) -> bool:
    return getattr(config, "target_modules", None) is not None and bool(check_target_module_exists(config, name))


def _heads(model: nn.Module, config: LoraConfig) -> set[str]:
    """Names of block layers that make a transformers model's outputs. "all-linear" excludes them, as it does for dense ones."""
    embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    heads = [embeddings()]
    if heads == [None] and config.task_type == TaskType.SEQ_CLS:
        heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    return {name for name, module in model.named_modules() if isinstance(module, BlockLayer) and any(module is h for h in heads)}


def _check_lora(config: LoraConfig, target: str) -> None:
    """Refuse options that read or change the dense weights, which block layers do not have."""
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_WRITE_TO_THE_BASE):
        raise KronblocksError(
            f"init_lora_weights={start!r} starts from the base weights, but those of {target} are block-sparse: leave "
            'it at True, or use "gaussian", "orthogonal" or "eva"'
        )
    if config.use_dora:
        raise KronblocksError(
            f"use_dora=True divides by the norm of each output's weights, which may be 0 in {target}, a block-sparse layer: "
            "leave use_dora out"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise KronblocksError(f"kasa_config= changes the base weights, but those of {target} are block-sparse: leave it out")


def _looking_first(method: Callable[..., Any], config_of: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of PEFT's tuners, so that block layers are registered first."""

    @functools.wraps(method)
    def looking(tuner: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _prepare(model, config_of(tuner, model, *args, **kwargs))
        return method(tuner, model, *args, **kwargs)

    return looking


def _first_config(tuner: BaseTuner, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    return peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]


def _added_config(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """The config, with PEFT's default targets for a transformers model if it names none."""
    return tuner._prepare_adapter_config(tuner.peft_config[adapter_name], tuner.get_model_config(model))


_tuner: Any = BaseTuner
_tuner.__init__ = _looking_first(BaseTuner.__init__, _first_config)
_tuner.inject_adapter = _looking_first(BaseTuner.inject_adapter, _added_config)
