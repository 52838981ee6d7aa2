"""What every adapter layer has in common.

An adapter layer takes the place of an `nn.Linear` and keeps its weight under the old key; its own tensor is one more
parameter, `bone`, beside it. So a base checkpoint still loads strictly, and adapter tensors are named `<module>.bone`
as in the field's files.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rwkv_bone.errors import UserError


class AdapterLinear(nn.Linear):
    """A frozen projection with a trainable update: x [..., in] -> [..., out].

    Takes over `base.weight` and `base.bias` (the same parameters, now frozen). `bone` is fp32 and zero, so the layer
    starts out equal to its base; arithmetic is in x's dtype (autocast's under autocast). `name` is for messages only.

    A subclass gives `function` (x [T, in], weight, bias, bone -> y [T, out], with its own backward), `bone_shape`,
    `check` and `merged`. Parameters are read in this forward only, and `function` must keep the parameters themselves
    for backward, never a cast or transposed copy of the weight: that would be as large as the weight, and under ZeRO
    stage 3 only the parameter itself is gathered again.
    """

    function: ClassVar[type[torch.autograd.Function]]

    def __init__(self, base: nn.Linear, r: int, name: str = ""):
        self.check(base.in_features, base.out_features, r, name)
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a second weight
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias if base.bias is None else base.bias.requires_grad_(False)
        shape = self.bone_shape(self.in_features, self.out_features, r)
        self.bone = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.function.apply(x.reshape(-1, self.in_features), self.weight, self.bias, self.bone)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}"

    @staticmethod
    def bone_shape(in_features: int, out_features: int, r: int) -> tuple[int, ...]:
        """The shape of `bone`."""
        raise NotImplementedError

    @staticmethod
    def merged(weight: Tensor, bone: Tensor) -> Tensor:
        """The weight [out, in] of a plain linear equal to this layer: computed in fp32, rounded once to its dtype."""
        raise NotImplementedError

    @classmethod
    def check(cls, in_features: int, out_features: int, r: int, name: str = "") -> None:
        """UserError, naming the layer and its sizes, when r does not fit."""
        if r < 1:
            raise UserError(f"--bone_r {r}: expected at least 1")
        if r > in_features:
            raise UserError(
                f"--bone_r {r} is larger than the {in_features} inputs of {name or 'a layer'}: use a smaller r"
            )


def weight_grads(
    g: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias of y = x W^T + bias when either is trained beside the adapter, else None.

    g [T, out], x [T, in] what multiplied the weight.
    """
    grad_weight = (g.t() @ x).to(weight.dtype) if needed[0] else None
    grad_bias = g.sum(dim=0).to(bias.dtype) if needed[1] else None
    return grad_weight, grad_bias


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """At least fp32: the dtype in which gradients accumulate and merges are computed."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
