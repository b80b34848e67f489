"""Models go to the Hub and come back, through huggingface_hub, whose server stands in this process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import helpers
from tests.integrations.small_hub import small_hub
from torch import nn

pytest.importorskip("transformers")
import transformers
from huggingface_hub import constants, hf_api
from transformers import AutoModelForCausalLM

from kronblocks import KronblocksError, from_pretrained, push_to_hub, sparsify_
from kronblocks.deploy.cards import MARK

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with small_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.chdir(tmp_path)
        yield server


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    sparsify_(model, helpers.config("static", block_size=4))
    return model


def test_any_model_goes_there_and_back(hub):
    model, _ = helpers.made("packed")
    address = push_to_hub(model, "me/small", token="hf_x", metadata={"accuracy": "0.5"})
    assert address.startswith(f"{hub.url}/me/small/") and set(hub.repositories["me/small"]) > {"kronblocks.json", "README.md"}
    assert b"| accuracy | 0.5 |" in hub.repositories["me/small"]["README.md"]
    hub.repositories["me/small"]["code.py"] = b"raise SystemExit"
    again = from_pretrained("me/small", lambda: helpers.mlp(32, 32, 16))
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), model.parameters(), strict=True))


def test_transformers_models_use_their_own_calls(hub):
    model, tokens = llama(), torch.arange(6).view(1, 6)
    model.push_to_hub("me/decoder", token="hf_x", max_shard_size="2KB")
    files = hub.repositories["me/decoder"]
    assert "model.safetensors.index.json" in files and MARK in files["README.md"].decode()
    for again in (AutoModelForCausalLM.from_pretrained("me/decoder"), from_pretrained("me/decoder")):
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, model(tokens).logits)
    hub.repositories["me/decoder"]["README.md"] = b"---\ntags: [mine]\n---\nmine"
    model.push_to_hub("me/decoder", token="hf_x")
    assert b"mine" in files["README.md"] and MARK not in files["README.md"].decode()


def test_what_is_not_there_is_said(hub):
    with pytest.raises(KronblocksError, match="there is no folder 'me/nothing', and the Hub's repository of that name"):
        from_pretrained("me/nothing", nn.Linear(2, 2))
    with pytest.raises(KronblocksError, match="holds no kronblocks.json"):
        from_pretrained("no-folder", nn.Linear(2, 2))
