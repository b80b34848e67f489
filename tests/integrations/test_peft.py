"""LoRA beside block layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kronblocks import KronblocksError, SparsityConfig, lift_, sparsify_
from kronblocks.integrations.peft import BlockLora, with_block_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("lifted", [False, True])
def test_only_the_update_is_trained_and_the_zeros_stay(lifted):
    model = Net()
    sparsify_(model, SparsityConfig(block_size=4, rank=2, method="two-phase", target_sparsity=0.5))
    mask = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    model.up.set_block_mask_(mask)
    if lifted:
        lift_(model)
    x = torch.randn(64, 16)
    before, weight = model(x).detach(), model.up.weight.detach().clone()
    adapted = get_peft_model(model, with_block_layers(LoraConfig(r=2, target_modules=["up", "down"])))
    assert isinstance(model.up, BlockLora) and torch.allclose(adapted(x), before, atol=1e-6)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (adapted(x) - x[:, :8]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(model.up.base_layer.weight, weight)
    with pytest.raises(KronblocksError, match="no zero blocks"):
        adapted.merge_and_unload()
