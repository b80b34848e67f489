"""A dense weight that is built when it is read, so that writing into it would be lost: it is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]

from kronblocks.errors import KronblocksError


def is_transformed() -> bool:
    """Whether torch.func is at work (vmap, grad, jvp), which cannot see into operators of one's own."""
    return not torch.compiler.is_dynamo_compiling() and peek_interpreter_stack() is not None


class _AnyTensor(type(Tensor)):
    """torch.testing.assert_close compares tensors of related types only, and parameters should be among them."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class BuiltWeight(Tensor, metaclass=_AnyTensor):
    """The result of `layer.weight`: an ordinary tensor for whoever reads it, part of the graph of autograd.

    Its views and its `data` are such tensors too; what is computed from it is an ordinary one. A subclass without
    `__torch_function__`, so that torch's fused paths still take it.

    Raises:
        KronblocksError: somebody writes into it, by a method or an operator.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def of(cls, weight: Tensor) -> Tensor:
        """A weight just built; tracers' tensors stay as they are."""
        traced = torch.compiler.is_compiling() or is_transformed() or type(weight) is not Tensor
        return weight if traced else weight.as_subclass(cls)

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(proto)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)


class HasBuiltWeight(nn.Module):
    """A module whose `weight` is a property that builds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise _refusal("weight = ...")
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The dense weight, built at every access; writing into it is an error."""
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
        result = read(self, *args, **kwargs)
        if isinstance(result, tuple | list):
            return tuple(map(BuiltWeight.of, result))
        shares = result.untyped_storage().data_ptr() == self.untyped_storage().data_ptr()
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
