"""Operators of our own in `torch.ops.rwkv_bone`, so that autograd and torch.compile take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch


def define(name: str, schema: str, function: Callable, fake: Callable) -> Callable[..., Any]:
    """Make `torch.ops.rwkv_bone.<name>` of `function`, on every device, and return it. It has no derivative.

    schema: "(Tensor x, int n) -> Tensor", with "Tensor(a!) x" for an argument that it changes. fake: gives the results
    without their values, from tensors that have none.

    torch.library.custom_op would do the same. But it imports the compiler of PyTorch when it is first called, without
    torch.compile too, which takes a second and 60 MB of memory.
    """
    qualified = f"rwkv_bone::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", function)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.rwkv_bone, name).default


Function = TypeVar("Function", bound=Callable)


def constant(function: Function) -> Function:
    """Have torch.compile call a function while it traces, and take the result for a constant: it builds or loads.

    This is torch.compiler.assume_constant_result, which would import the compiler for it, at every start.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
