"""`layer.weight` of a block layer: built when something is computed from it. Writing into it raises, since it would be lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from kronblocks.core.errors import KronblocksError


def is_transformed() -> bool:
    """Whether torch.func is at work (vmap, grad, jvp), or forward-mode autograd: neither sees into operators of one's own."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class _AnyTensor(type(Tensor)):
    """Makes every tensor an instance, since torch.testing.assert_close refuses to compare tensors of unrelated types."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class BuiltWeight(Tensor, metaclass=_AnyTensor):
    """A weight that has been built. It reads like an ordinary tensor and is part of the autograd graph.

    Its views and its `data` have this class too; results computed from it are ordinary tensors.

    Raises:
        KronblocksError: a method or operator writes into it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def of(cls, weight: Tensor) -> Tensor:
        """Give a built weight this class; tracers' tensors stay as they are."""
        traced = torch.compiler.is_compiling() or is_transformed() or type(weight) is not Tensor
        return weight if traced else weight.as_subclass(cls)

    def built(self) -> Tensor:
        """The weight itself."""
        return self

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(proto)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)


_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "requires_grad",
    "is_cpu",
    "is_cuda",
    "is_meta",
    "is_nested",
    "is_sparse",
)
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device", "__len__")
_KNOWN: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.is_floating_point]
)
"""Properties of a weight that are known before it is built."""


class UnbuiltWeight(BuiltWeight):
    """The result of `layer.weight`: built at every use, but not for its dtype, device or shape.

    Models such as T5 read these at each call. Torch's fast paths read weights too, to bypass the layers. They do not use
    tensors with a `__torch_function__`, so this class has one.

    Args:
        build: returns the weight.
        sources: the tensors that it is built from, with the weight's dtype and device; at least one.
        shape: of the weight.

    Raises:
        KronblocksError: it is used after its sources have changed, or written into.
    """

    _build: Callable[[], Tensor]
    _sources: Sequence[Tensor]
    _seen: list[tuple[int, int]]

    @staticmethod
    def __new__(cls, build: Callable[[], Tensor], sources: Sequence[Tensor], shape: Sequence[int]) -> UnbuiltWeight:
        first, trained = sources[0], torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device, requires_grad=trained)
        made._build, made._sources, made._seen = build, sources, _versions(sources)
        return made

    def built(self) -> Tensor:
        """Build the weight."""
        if _versions(self._sources) != self._seen:
            raise KronblocksError(
                "the layer has changed since its weight was read, but the weight is only built when it is used: read "
                "layer.weight again, or keep a copy, layer.weight.detach().clone()"
            )
        with contextlib.ExitStack() as stack:
            if torch.amp.is_autocast_available(device := self._sources[0].device.type):
                stack.enter_context(torch.autocast(device, enabled=False))  # a weight has its parameters' dtype
            weight = self._build()
        return BuiltWeight.of(weight) if weight.layout is torch.strided else weight

    def mapped(self, function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
        """The weight rearranged by a function to this shape, also unbuilt."""
        return UnbuiltWeight(lambda: function(self.built()), self._sources, shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        args, given = tree_map(lambda each: each.built() if type(each) is cls else each, (args, given))
        return func(*args, **given)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        raise KronblocksError(f"{func} cannot use layer.weight, which is built when it is used: give it layer.dense_weight()")


class _Traced(Tensor):
    """A weight in code that torch.compile traces; unused ones are dropped. It keeps torch's fast paths away, too."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def weight_of(build: Callable[[], Tensor], sources: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """A layer's weight: unbuilt, but built for tracers, transforms and shards."""
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return build().as_subclass(_Traced)
    ordinary = all(type(source) in (Tensor, nn.Parameter) for source in sources)
    if torch.compiler.is_compiling() or is_transformed() or not ordinary:
        return BuiltWeight.of(build())
    return UnbuiltWeight(build, sources, shape)


def rearranged(weight: Tensor, function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """Rearrange a layer's weight by a function; unbuilt if the weight is."""
    return weight.mapped(function, shape) if type(weight) is UnbuiltWeight else function(weight)


def _versions(sources: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(source), 0 if source.is_inference() else source._version) for source in sources]


class HasBuiltWeight(nn.Module):
    """A module whose `weight` is a property that builds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise _refusal("weight = ...")
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse to make the built weight a parameter, as torch.nn.utils.prune tries to."""
        if name != "weight_orig" or isinstance(param, nn.Parameter | None):
            return super().register_parameter(name, param)
        raise KronblocksError(
            f"{name}: torch.nn.utils.prune cannot mask this weight, which is built when it is read. Kill whole blocks by "
            "layer.set_block_mask_(mask), or prune further in a training by kronblocks.sparsify_(model, config), or call "
            "kronblocks.densify_(model) before torch.nn.utils.prune"
        )

    @property
    def weight(self) -> Tensor:
        """The dense weight, built at every use; writing into it is an error."""
        raise NotImplementedError


def _refusal(how: str) -> KronblocksError:
    return KronblocksError(
        f"{how}: this weight is built when it is read, so writing into it would change nothing. Write into the layer's "
        "parameters (layer.named_parameters()), make a new layer with from_dense or from_linear, or copy: layer.weight.clone()"
    )


def _refused(name: str) -> Any:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _refusal(name)

    return method


def _viewing(read: Any) -> Any:
    def method(self: BuiltWeight, *args: Any, **kwargs: Any) -> Any:
        weight = self.built()
        result = read(weight, *args, **kwargs)
        if isinstance(result, tuple | list):
            return tuple(map(BuiltWeight.of, result))
        shares = result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        return BuiltWeight.of(result) if shares else result

    return method


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul")
_WRITES = ["__setitem__", *(f"__i{name}__" for name in _OPERATORS)]
_WRITES += [name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")]
_VIEWS = ["__getitem__", "detach", "view", "reshape", "flatten", "unflatten", "t", "transpose", "permute", "narrow", "select"]
_VIEWS += ["squeeze", "unsqueeze", "expand", "diagonal", "unbind", "split", "chunk", "as_strided", "view_as"]

for _name in _WRITES:
    setattr(BuiltWeight, _name, _refused(_name))
for _name in _VIEWS:
    setattr(BuiltWeight, _name, _viewing(getattr(Tensor, _name)))
for _name in ("data", "T", "mT"):
    setattr(BuiltWeight, _name, property(_viewing(getattr(Tensor, _name).__get__), _refused(f"{_name} = ...")))
