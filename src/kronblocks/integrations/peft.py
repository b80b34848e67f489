"""LoRA beside block-sparse layers: the update stays apart from the zeros."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from kronblocks.errors import KronblocksError
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear


class BlockLora(LoraLinear):
    """A trained low-rank update of a block layer, which itself stays frozen and as sparse as it is.

    The two are computed one after the other, `layer(x) + B A x`. The update has no zero blocks, so merging would make the layer
    dense: that is refused.
    """

    def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # it has in_features, out_features and weight
            super().__init__(base_layer, adapter_name, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            KronblocksError: always.
        """
        raise KronblocksError(
            "a LoRA update has no zero blocks, so merging it would make the block-sparse layer dense: keep it apart, or call "
            "kronblocks.densify_ on the base model before get_peft_model"
        )


def with_block_layers(config: LoraConfig) -> LoraConfig:
    """Let a LoraConfig take block layers: `get_peft_model(model, with_block_layers(LoraConfig(target_modules=[...])))`."""
    config._register_custom_module({KroneckerBlockLinear: BlockLora, BlockSparseLinear: BlockLora})
    return config
