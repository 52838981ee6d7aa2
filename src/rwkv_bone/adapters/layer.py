"""The base class of every adapter layer.

An adapter layer takes the place of a projection. It computes one function on two paths:

    forward_fused     The base is a plain weight. Base and adapter are one autograd step with a hand-written backward,
                      which is faster and keeps nothing of the weight's size.
    forward_wrapped   The base can only be called: its weight is quantised, or dropout acts on the adapter's input and
                      not on the base's. The adapter calls the base as it is, and adds its update.

Tests hold the two to the same outputs and gradients.

Of an `nn.Linear` the layer keeps `weight` under its old key, and its own tensors are parameters beside it. So a base
checkpoint still loads strictly, and adapter tensors are named `<module>.bone`, `<module>.lora_A`, as in other projects'
files. Any other projection is kept as `base`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar, Protocol, TypeGuard, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.errors import UserError

Tensors = Mapping[str, Tensor]  # an adapter's tensors for one projection, under their names
Product = Callable[[Tensor], Tensor]
Within = Callable[[Product, Tensor], Tensor]


class Projection(Protocol):
    """A module that an adapter can replace: an `nn.Linear`, or another that states its sizes and is called like one."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor, /) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def requires_grad_(self, requires_grad: bool = True) -> object: ...


@runtime_checkable
class QuantizedProjection(Projection, Protocol):
    """`quantization.QuantLinear`: a projection whose weight is stored as codes, `quantized`."""

    @property
    def quantized(self) -> Any: ...
    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


class AdapterLinear(nn.Linear):
    """A frozen projection with a trainable update: x [..., in] -> [..., out].

    base: an `nn.Linear`, whose weight and bias are taken over (the same parameters, now frozen), or another projection,
    kept as `self.base`. The adapter's tensors are fp32, and at the start the layer equals its base. Arithmetic is in
    x's dtype (autocast's under autocast). `name` is for messages only. `initialise=False` leaves all tensors zero, for
    a caller who fills them; `generator` draws the random ones.

    A subclass names its tensors (`parameter_names` are trained, `frozen_names` are stored with them) and gives
    `shapes`, `forward_fused`, `forward_wrapped` and `merged`, and `initialise` if the tensors do not start at zero.
    `forward_fused` must keep the parameters themselves for backward, never a cast or transposed copy of the weight: a
    copy is as large as the weight, and ZeRO stage 3 gathers again only the parameter itself.
    """

    parameter_names: ClassVar[tuple[str, ...]]
    frozen_names: ClassVar[tuple[str, ...]] = ()
    r_flag: ClassVar[str] = "bone_r"
    keeps_input: ClassVar[bool] = True  # whether backward needs the input itself
    needs_weight: ClassVar[bool] = False  # whether a base that can only be called is not enough: see `weight_of`
    base: Projection | None

    def __init__(
        self,
        base: Projection,
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
        if has_plain_weight(base):
            self.base = None
            self.register_parameter("weight", cast(nn.Parameter, base.weight))
            self.register_parameter("bias", cast("nn.Parameter | None", base.bias))
        else:
            self.base = base
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        device = next(chain[Tensor](base.parameters(), base.buffers())).device
        for key, shape in self.shapes(self.in_features, self.out_features, settings).items():
            tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=key in self.parameter_names))
        if initialise and device.type != "meta":
            with torch.no_grad():
                self.initialise(generator)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's own tensors under their names."""
        return {name: getattr(self, name) for name in (*self.parameter_names, *self.frozen_names)}

    def forward(self, x: Tensor, *, within: Within | None = None) -> Tensor:
        """x [..., in] -> y [..., out].

        within: a function of this product and x, which may take products of parts of x, and whose result is returned.
        To ZeRO's stage 3 that is one pass through the layer: its tensors are whole from its begin to its end.
        """
        return self.product(x) if within is None else within(self.product, x)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows, dropout = x.reshape(-1, self.in_features), self.settings.dropout if self.training else 0.0
        if self.base is None and not dropout:
            y = self.forward_fused(rows, self.weight, self.bias, self.tensors(), self.settings)
        else:
            base = self._plain if self.base is None else self.base
            y = self.forward_wrapped(base, rows, self.tensors(), self.settings, dropout)
        return y.view(*x.shape[:-1], self.out_features)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.settings.describe()}"

    def initialise(self, generator: torch.Generator | None) -> None:
        """Give the tensors, which are zero, their first values. The layer must equal its base afterwards."""

    @staticmethod
    def shapes(in_features: int, out_features: int, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor that is stored, trained or not."""
        raise NotImplementedError

    @staticmethod
    def forward_fused(
        x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, settings: AdapterSettings
    ) -> Tensor:
        """The layer on a plain weight: x [T, in], weight [out, in], bias [out] or None -> y [T, out]. No dropout."""
        raise NotImplementedError

    @staticmethod
    def forward_wrapped(
        base: Callable[[Tensor], Tensor], x: Tensor, tensors: Tensors, settings: AdapterSettings, dropout: float
    ) -> Tensor:
        """The layer around a projection `base` that is only called: x [T, in] -> y [T, out]."""
        raise NotImplementedError

    @staticmethod
    def merged(weight: Tensor, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        """The weight [out, in] of a plain linear equal to this layer: computed in fp32, rounded once to its dtype."""
        raise NotImplementedError

    @staticmethod
    def for_outputs(tensors: Tensors, outputs: slice) -> Tensors | None:
        """The adapter's tensors for these outputs of the layer alone.

        None where `merged` of a part of the weight need not give the same numbers, to the bit, as of the whole.
        """
        return None

    @classmethod
    def check(cls, in_features: int, out_features: int, settings: AdapterSettings, name: str = "") -> None:
        """UserError, naming the layer and its sizes, when r does not fit."""
        if settings.r < 1:
            raise UserError(f"--{cls.r_flag} {settings.r}: expected at least 1")


def check_block(in_features: int, r: int, name: str) -> None:
    """UserError when a block of r inputs is larger than the layer."""
    if r > in_features:
        raise UserError(f"--bone_r {r} is larger than the {in_features} inputs of {name or 'a layer'}: use a smaller r")


def is_projection(module: object) -> TypeGuard[Projection]:
    """Whether an adapter can take the module's place: it is an `nn.Linear`, or states its sizes in the same way."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def has_plain_weight(module: object) -> TypeGuard[nn.Linear]:
    """Whether a projection's weight is there as numbers [out, in], and not packed in some way."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, nn.Linear)
        and isinstance(weight, Tensor)
        and weight.is_floating_point()
        and weight.shape == (module.out_features, module.in_features)
    )


def weight_of(base: Projection, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a projection in this dtype; that of a quantised one is dequantised anew.

    Quantised are the layers of `quantization` and the 4-bit ones of bitsandbytes. UserError for others.
    """
    if has_plain_weight(base):
        return base.weight.to(dtype)
    if isinstance(base, QuantizedProjection):
        return base.dequantize(dtype)
    packed = getattr(base, "weight", None)
    state = getattr(packed, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise UserError(
            f"a {type(base).__name__} whose weight cannot be read: expected plain numbers, or 4 bits of bitsandbytes "
            "that it has not packed anew for inference (adapt the model before it runs, in training mode)"
        )
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state).to(dtype)


def check_weight(base: Projection, name: str) -> None:
    """UserError, naming the layer, if `weight_of` cannot read its weight."""
    try:
        weight_of(base, torch.float32)
    except UserError as error:
        raise UserError(
            f"{name or 'a layer'} is {error}; or use --bone_mode bone, which only calls the layer"
        ) from None


def weight_grads(
    g: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias of y = x W^T + bias, each None unless it is trained beside the adapter.

    g [T, out]; x [T, in] is what multiplied the weight, None if the weight's gradient is not needed.
    """
    grad_weight = grad_bias = None
    if needed[0]:
        assert x is not None
        grad_weight = (g.t() @ x).to(weight.dtype)
    if needed[1]:
        assert bias is not None
        grad_bias = g.sum(dim=0).to(bias.dtype)
    return grad_weight, grad_bias


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """At least fp32: the dtype in which gradients accumulate and merges are computed."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
