"""What every adapter layer has in common.

An adapter layer takes the place of a projection. Of an `nn.Linear` it keeps the weight under the old key; its own
tensors are parameters beside it. So a base checkpoint still loads strictly, and adapter tensors are named
`<module>.bone`, `<module>.lora_A` as in the field's files. Any other projection, such as a quantised one, stays whole
as `base` and is only ever called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.errors import UserError

Tensors = Mapping[str, Tensor]  # an adapter's tensors for one projection, under their names


class AdapterLinear(nn.Linear):
    """A frozen projection with a trainable update: x [..., in] -> [..., out].

    base: an `nn.Linear`, whose weight and bias are taken over (the same parameters, now frozen), or another module with
    `in_features` and `out_features`, kept as `self.base`. The adapter's tensors are fp32 and such that the layer starts
    out equal to its base; arithmetic is in x's dtype (autocast's under autocast). `name` is for messages only;
    `initialise=False` leaves all tensors zero, for a caller who fills them; `generator` draws those that are random.

    A subclass names its tensors (`parameter_names` are trained, `frozen_names` are stored with them) and gives
    `shapes`, `compute`, `around`, `merged` and `unmerged`, and where the tensors do not start at zero `initialise`.
    `compute` must keep the parameters themselves for backward, never a cast or transposed copy of the weight: that
    would be as large as the weight, and under ZeRO stage 3 only the parameter itself is gathered again.
    """

    parameter_names: ClassVar[tuple[str, ...]]
    frozen_names: ClassVar[tuple[str, ...]] = ()
    r_flag: ClassVar[str] = "bone_r"

    def __init__(
        self,
        base: nn.Module,
        settings: AdapterSettings,
        name: str = "",
        *,
        initialise: bool = True,
        generator: torch.Generator | None = None,
    ):
        self.check(base.in_features, base.out_features, settings, name)
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a second weight
        self.in_features, self.out_features, self.settings = base.in_features, base.out_features, settings
        base.requires_grad_(False)
        plain = has_plain_weight(base)
        self.base = None if plain else base
        self.register_parameter("weight", base.weight if plain else None)
        self.register_parameter("bias", base.bias if plain else None)
        device = next(chain(base.parameters(), base.buffers())).device
        for key, shape in self.shapes(self.in_features, self.out_features, settings).items():
            tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=key in self.parameter_names))
        if initialise and device.type != "meta":
            with torch.no_grad():
                self.initialise(generator)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's own tensors under their names."""
        return {name: getattr(self, name) for name in (*self.parameter_names, *self.frozen_names)}

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat, dropout = x.reshape(-1, self.in_features), self.settings.dropout if self.training else 0.0
        if self.base is None and not dropout:
            y = self.compute(flat, self.weight, self.bias, self.tensors(), self.settings)
        else:
            y = self.around(self.base or self._plain, flat, self.tensors(), self.settings, dropout)
        return y.view(*x.shape[:-1], self.out_features)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.settings.describe()}"

    def initialise(self, generator: torch.Generator | None) -> None:
        """Give the tensors their first values, from zeros: the layer must equal its base."""

    @staticmethod
    def shapes(in_features: int, out_features: int, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor that is stored, trained or not."""
        raise NotImplementedError

    @staticmethod
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        """The layer on a plain weight: x [T, in], weight [out, in], bias [out] or None -> y [T, out]. No dropout."""
        raise NotImplementedError

    @staticmethod
    def around(
        base: Callable[[Tensor], Tensor], x: Tensor, tensors: Tensors, settings: AdapterSettings, dropout: float
    ) -> Tensor:
        """The layer around any projection `base`, of whose inside nothing is known: x [T, in] -> y [T, out]."""
        raise NotImplementedError

    @staticmethod
    def merged(weight: Tensor, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        """The weight [out, in] of a plain linear equal to this layer: computed in fp32, rounded once to its dtype."""
        raise NotImplementedError

    @staticmethod
    def unmerged(weight: Tensor, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        """The inverse of `merged`, up to rounding. A half-precision base does not come back: keep the original."""
        raise NotImplementedError

    @classmethod
    def check(cls, in_features: int, out_features: int, settings: AdapterSettings, name: str = "") -> None:
        """UserError, naming the layer and its sizes, when r does not fit."""
        if settings.r < 1:
            raise UserError(f"--{cls.r_flag} {settings.r}: expected at least 1")


def check_block(in_features: int, r: int, name: str) -> None:
    """UserError when a block of r inputs is larger than the layer."""
    if r > in_features:
        raise UserError(f"--bone_r {r} is larger than the {in_features} inputs of {name or 'a layer'}: use a smaller r")


def has_plain_weight(module: nn.Module) -> bool:
    """Whether a projection's weight is there as numbers [out, in], and not packed in some way."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, nn.Linear)
        and isinstance(weight, Tensor)
        and weight.is_floating_point()
        and weight.shape == (module.out_features, module.in_features)
    )


def weight_of(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a projection in this dtype: its own, or that of a quantised one, dequantised anew."""
    return base.weight.to(dtype) if has_plain_weight(base) else base.dequantize(dtype)


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
