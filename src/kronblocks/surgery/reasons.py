"""Why models, linear layers or other weights cannot become sparse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from kronblocks.core.errors import KronblocksError
from kronblocks.core.shards import is_sharded, rows_here
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.unfolded import UnfoldedConv, is_transposed

FUSED_ATTENTION = (
    "nn.MultiheadAttention passes its weights to one fused function and calls no layer; write the attention with nn.Linear "
    "layers and scaled_dot_product_attention, as transformers does"
)
_CONVOLUTION = "a convolution: convolutions=True treats them as linear layers over patches"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_model(model: nn.Module, *, replaces: bool) -> None:
    """Refuse models that cannot be changed in place.

    Args:
        model: any model.
        replaces: whether layers will be replaced, not masked by the sparsifier.

    Raises:
        KronblocksError: the model is a single layer, in TorchScript, made in inference mode, or wrapped for several processes.
    """
    if isinstance(model, nn.Linear) or is_transposed(model) or is_convolution(model):
        raise KronblocksError(
            f"the model itself is {_a(model)}, which cannot be replaced in place: wrap it in nn.Sequential(...)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise KronblocksError("layers of a TorchScript module cannot be replaced: call sparsify_ on the model before torch.jit")
    for name, module in model.named_modules():
        what = f"the model is wrapped in {type(module).__name__}" + (f" (at {name!r})" if name else "")
        if replaces and isinstance(module, DistributedDataParallel):
            raise KronblocksError(f"{what}, which would keep the old weights: call sparsify_ first, then wrap the model")
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise KronblocksError(f"{what}, which flattens weights: call sparsify_ first, then fully_shard(model)")
    if strange := [name for name, each in model.named_parameters() if is_ready(each) and each.is_inference()]:
        raise KronblocksError(
            f"{strange[0]} was made under torch.inference_mode() and cannot be trained: make or load the model outside of it"
        )


def why_not(name: str, module: nn.Module, shared: dict[int, list[str]], *, convolutions: bool, replaces: bool) -> str:
    """Why a linear layer, convolution or Conv1D stays dense whatever its sizes; "" if it need not.

    Args:
        name: the module's name.
        module: the module.
        shared: what `shared_weights` found in the model.
        convolutions: whether convolutions may become sparse.
        replaces: whether the layer would be replaced, not masked by the sparsifier.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return FUSED_ATTENTION
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if not all(is_ready(each) for each in (weight, bias) if each is not None):
        return f"{type(module).__name__} has no sizes yet: run one batch through the model first"
    if is_convolution(module) and (reason := UnfoldedConv.why_not(module) or ("" if convolutions else _CONVOLUTION)):
        return reason
    if isinstance(module, BlockLayer):
        weight = module.block_parameters()[0]
    elif nn.utils.parametrize.is_parametrized(module) or any(_is_computed(module, each) for each in ("weight", "bias")):
        return "its weight or bias is computed from others (spectral_norm, weight_norm or prune), which a block layer would drop"
    elif isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear, whose code may need its weight as it is"
    elif replaces and (more := [each for each in (*module._parameters, *module._buffers) if each not in ("weight", "bias")]):
        return f"it holds more than a weight and a bias ({', '.join(more)}), which a block layer would drop"
    if replaces and "forward" in vars(module):
        return "its forward was replaced (as Accelerate's hooks do), which a block layer would drop: replace it after sparsify_"
    assert weight is not None
    return _unusual(weight) or _empty(module, weight, bias) or _tied(name, weight, shared)


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether a module has a tensor of this name that is not its parameter."""
    return name not in module._parameters and isinstance(getattr(module, name, None), Tensor)


def _unusual(weight: Tensor) -> str:
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}, but blocks need real floating-point numbers"
    if weight.layout != torch.strided:
        return f"its weight has the layout {weight.layout}, not a dense one"
    kind = type(weight.data)
    return (
        "" if kind is Tensor or is_sharded(weight) else f"its weight is a {kind.__name__}, whose values a block layer cannot hold"
    )


def _empty(module: nn.Module, weight: Tensor, bias: Tensor | None) -> str:
    if isinstance(module, nn.Linear) and 0 in (module.out_features, module.in_features):
        return f"a weight of {module.out_features}x{module.in_features} has no values"
    if weight.numel() == 0:
        return f"its weight has no values here (sizes {tuple(weight.shape)}), as under DeepSpeed's ZeRO-3"
    if isinstance(module, nn.Linear):
        found = [tuple(weight.shape), *([tuple(bias.shape)] if bias is not None else [])]
        wanted = [(module.out_features, module.in_features), (module.out_features,)][: len(found)]
        if found != wanted:
            sizes = " and ".join(map(str, found))
            return f"its weight and bias have the sizes {sizes}, not those of a layer of {wanted[0][0]}x{wanted[0][1]}"
    return ""


def _tied(name: str, weight: Tensor, shared: dict[int, list[str]]) -> str:
    others = [other for other in shared.get(id(weight), []) if other.rpartition(".")[0] != name]
    return f"its weight is tied to {', '.join(others)}" if others else ""


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """For the id of each parameter, the names of those that are the same object or share its memory."""
    owners: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{name}" if module_name else name)
            parameters[id(parameter)] = parameter
    shared = {key: names for key, names in owners.items() if len(names) > 1}
    reach, together = ("", 0), []  # end of the memory so far, and the parameters in it
    for (device, start, end), key in sorted((span, key) for key, each in parameters.items() if (span := _span(each))):
        overlaps = reach[0] == device and start < reach[1]
        together, reach = [*together, key] if overlaps else [key], (device, max(end, reach[1]) if overlaps else end)
        if overlaps:
            names = sorted(name for each in together for name in owners[each])
            shared |= dict.fromkeys(together, names)
    return shared


def _span(parameter: nn.Parameter) -> tuple[str, int, int] | None:
    """Device, first and last address of a tensor's values; None if they have no ordinary memory."""
    if not is_ready(parameter) or type(parameter.data) is not Tensor or parameter.is_meta:
        return None
    if parameter.layout != torch.strided or not parameter.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return str(parameter.device), parameter.data_ptr(), parameter.data_ptr() + (last + 1) * parameter.element_size()


def check_values(name: str, module: nn.Module, *, replaces: bool) -> None:
    """Raise KronblocksError if a selected layer's values are not finite, or are sharded."""
    for what, tensor in module.named_parameters(recurse=False):
        if is_sharded(tensor):
            if replaces:
                raise KronblocksError(
                    f"this process holds only a part of the {what} of {name}: call sparsify_ first, then fully_shard(model)"
                )
            rows_here(tensor)  # refuses other cuts than by rows
        elif not tensor.is_meta and not torch.isfinite(tensor).all():
            raise KronblocksError(f"the {what} of {name} has values that are not finite (NaN or infinity): fix or reload it")


def outside(model: nn.Module, inside: set[str]) -> Iterator[tuple[str, nn.Module, list[nn.Parameter], str]]:
    """Modules with weights of two or more dimensions outside linear layers: name, module, these weights, why they stay dense.

    Args:
        model: any model.
        inside: names of modules to skip, with their submodules.
    """
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(".".join(parts[: i + 1]) in inside for i in range(len(parts))):
            continue
        own = {key: p for key, p in module._parameters.items() if p is not None and is_matrix(p)}
        if not own:
            continue
        if isinstance(module, nn.MultiheadAttention):
            yield f"{name}.in_proj".lstrip("."), module, list(own.values()), FUSED_ATTENTION
        else:
            yield name, module, list(own.values()), _why_outside(module, list(own))


def _why_outside(module: nn.Module, names: list[str]) -> str:
    kind = type(module).__name__
    if is_embedding(module):
        return f"{kind}: rows of a table are looked up, not multiplied"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"{kind} computes with its weights itself and calls no nn.Linear"
    return f"{kind} computes with weights of its own ({', '.join(names)}), and only nn.Linear layers are reached"


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is an embedding."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter has two or more dimensions above 1, unlike biases and factors per channel."""
    return is_ready(parameter) and sum(size > 1 for size in parameter.shape) > 1


def is_ready(parameter: Tensor) -> bool:
    """Whether a parameter has sizes. Lazy layers get them from the first batch."""
    return not isinstance(parameter, nn.UninitializedParameter)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is any convolution of torch."""
    return isinstance(module, _ConvNd)


def _a(module: nn.Module) -> str:
    return "an nn.Linear" if isinstance(module, nn.Linear) else f"a {type(module).__name__}"


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of the weight of a linear layer or transformers' Conv1D; None for other modules."""
    if isinstance(module, nn.Linear | BlockLayer):
        return module.out_features, module.in_features
    if is_transposed(module):
        cols, rows = module.get_parameter("weight").shape
        return rows, cols
    return None
