"""`get_bone_model`: adapters in a model that stays what it is.

The model is not wrapped. Its targeted linear layers become adapter layers, and its class gets the methods of
`BoneModel` in front of its own: it is still a `LlamaForCausalLM`, with the same parameter names, so `generate`,
`transformers.Trainer`, gradient checkpointing and everything else work as before. `unload` and `merge_and_unload`
restore the class.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from rwkv_bone.adapters import peft_format
from rwkv_bone.adapters.layer import AdapterLinear, check_weight, has_plain_weight
from rwkv_bone.adapters.registry import ADAPTERS
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.checkpoints import match_keys
from rwkv_bone.errors import UserError
from rwkv_bone.hf.config import ALL_LINEAR, BoneConfig, check_names, choose, name_matches

TRAINER_WEIGHTS = "model.safetensors"
# Arguments of PEFT's `get_peft_model` and `PeftModel.from_pretrained`, and the values that mean what is done here.
PEFT_ARGUMENTS = {
    "autocast_adapter_dtype": (True,),  # adapters are fp32
    "low_cpu_mem_usage": (True, False),  # nothing is made twice
    "mixed": (False,),
    "revision": (None,),
    "config": (None,),
    "key_mapping": (None,),
    "ephemeral_gpu_offload": (False,),
}
# Linear layers that are not called, by class and end of name: the layer above reads their weight.
READ_PAST = {"NonDynamicallyQuantizableLinear": "", "RWKV7Linear": ".w_lora.lora.2"}


def get_bone_model(
    model: nn.Module, peft_config: BoneConfig, adapter_name: str = "default", **peft_arguments: Any
) -> BoneModel:
    """Put adapters into `model`, freeze everything else, and return it: the same object, now a BoneModel too.

    Adapters are fp32 and start so that the model computes what it did. UserError, with the model as it was, for targets
    that do not exist or cannot be adapted, and for an r that does not fit. peft_arguments: those of PEFT's
    `get_peft_model`, where they ask for what is done here; others are a UserError.
    """
    _check_arguments("get_bone_model", peft_arguments, "model", "peft_config", "adapter_name")
    adapted = _inject(model, peft_config, adapter_name)
    if peft_config.init_weights is False:
        for layer in adapted.bone.layers.values():
            nn.init.kaiming_uniform_(layer.get_parameter("bone"), a=math.sqrt(5))
    return adapted


@dataclass
class _Bone:
    """What a BoneModel remembers. It is not an nn.Module, so that nothing in it becomes part of the model."""

    config: BoneConfig
    name: str
    layers: dict[str, AdapterLinear]
    replaced: dict[str, nn.Linear]  # the layers whose places they took
    originals: dict[str, Tensor]  # parameters of modules_to_save as they were, by name
    trained: dict[str, Tensor] | None = None  # their trained values, while the adapter is disabled


class BoneModel(nn.Module):
    """What `get_bone_model` adds to a model. One adapter at a time."""

    bone: _Bone
    # With this attribute transformers makes inputs require gradients for checkpointing, and trains on a quantised base.
    _hf_peft_config_loaded = True

    @property
    def peft_config(self) -> dict[str, BoneConfig]:
        return {self.bone.name: self.bone.config}

    @property
    def active_adapter(self) -> str:
        return self.bone.name

    @property
    def active_adapters(self) -> list[str]:
        return [self.bone.name]

    @property
    def peft_type(self) -> str:
        return self.bone.config.method

    def get_base_model(self) -> nn.Module:
        """This very model: it is not wrapped. `disable_adapter` gives its behaviour without the adapter."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, the adapter's included."""
        # Under ZeRO stage 3 a parameter is empty, and its size is in ds_numel.
        counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.parameters()]
        return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def adapter_keys(self) -> list[str]:
        """The keys of `state_dict` that are the adapter's: its tensors, and those of modules_to_save."""
        if self.bone.trained is not None:
            raise UserError("the adapter is disabled, and not a part of the model now: enable_adapters() first")
        keys = [f"{module}.{name}" for module, layer in self.bone.layers.items() for name in layer.tensors()]
        return [*keys, *self.bone.originals]

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the adapter as a PEFT directory, over one that is there.

        state_dict: the model's tensors where they are not at hand here, as under ZeRO stage 3. `transformers.Trainer`
        says whether this is the main process, and reloads nothing but `model.safetensors`, so for that caller the
        adapter is written under this name too. Files are safetensors, and safe_serialization=False is refused.
        """
        if not safe_serialization:
            raise UserError("adapters are saved as safetensors only: leave safe_serialization=False out")
        if is_main_process is False:
            return
        source = self.state_dict() if state_dict is None else state_dict
        saved = {key: source[key] for key in self.adapter_keys()}
        extra = {key: saved.pop(key) for key in self.bone.originals}
        config = self.bone.config
        if config.base_model_name_or_path is None:
            name = getattr(getattr(self, "config", None), "_name_or_path", None)
            config = replace(config, base_model_name_or_path=name or None)
        peft_format.write_peft(save_directory, self._peft_config(config), saved, extra, overwrite=True)
        if is_main_process:
            tensors = peft_format.join_keys(saved, extra, config.method)
            peft_format.save_tensors(Path(save_directory) / TRAINER_WEIGHTS, tensors)

    def _peft_config(self, config: BoneConfig) -> dict:
        """PEFT's configuration, with the targets that were chosen where PEFT might choose others."""
        if config.target_modules in (None, ALL_LINEAR):
            config = replace(config, target_modules=sorted(self.bone.layers), layers_to_transform=None)
        return config.to_peft()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **peft_arguments: Any,
    ) -> BoneModel:
        """Put the adapter of a local PEFT directory (MISS or BONE, of peft 0.14 to 0.21, or ours) into its base model.

        The adapter is frozen unless is_trainable. UserError unless every tensor fits and none is missing, and for
        arguments of PEFT's that ask for something else.
        """
        known = ("model", "model_id", "adapter_name", "is_trainable")
        _check_arguments("BoneModel.from_pretrained", peft_arguments, *known)
        if not isinstance(model, nn.Module):
            raise UserError(f"BoneModel.from_pretrained takes the base model and the adapter's folder, got {model!r}")
        adapter = peft_format.read_peft(model_id)
        if adapter.kind == "lora":
            raise UserError(f"{model_id} is a LoRA: load it with peft")
        config = BoneConfig.from_peft(adapter.config, adapter.kind, is_trainable, str(model_id))
        # PEFT takes names that a model does not have, such as the heads of all architectures.
        whole = [
            name for name in config.modules_to_save or [] if any(f".{name}." in f".{key}" for key in adapter.extra)
        ]
        config = replace(config, modules_to_save=whole or None)
        if isinstance(config.target_modules, list):
            modules = {key.rpartition(".")[0] for key in adapter.state}
            used = [name for name in config.target_modules if any(name_matches(module, [name]) for module in modules)]
            config = replace(config, target_modules=used)
        adapted = _inject(model, config, adapter_name)
        try:
            adapted._fill(adapter)
        except UserError:
            adapted.unload()
            raise
        adapted.eval()
        return adapted

    def load_adapter(self, model_id: str | Path, adapter_name: str | None = None, is_trainable: bool = False) -> None:
        """Replace this adapter's tensors by those of a directory with the same targets, kind and r."""
        adapter = peft_format.read_peft(model_id)
        kind, r = self.bone.config.kind, self.bone.config.r
        if (adapter.kind, adapter.r) != (kind, r):
            raise UserError(f"{model_id} is {adapter.kind} with r {adapter.r}, the model has {kind} with r {r}")
        self._fill(adapter)

    def _fill(self, adapter: peft_format.PeftAdapter) -> None:
        adapter = adapter.expanded({name: layer.out_features for name, layer in self.bone.layers.items()})
        self._copy({**adapter.state, **adapter.extra}, adapter.path)

    def _copy(self, tensors: Mapping[str, Tensor], source: str) -> None:
        state = self.state_dict()
        match_keys({key: state[key] for key in self.adapter_keys()}, tensors, source)
        with torch.no_grad():
            for key, tensor in tensors.items():
                state[key].copy_(tensor)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As in any module, but a checkpoint may leave out the frozen parameters of the base. Keys may be PEFT's."""
        state, extra = peft_format.split_keys(state_dict, self.bone.config.method)
        tensors, own, adapter = {**state, **extra}, self.state_dict(), self.adapter_keys()
        if tensors.keys() >= own.keys() or not tensors.keys() <= own.keys():
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        found = {key: tensors[key] for key in adapter if key in tensors}
        match_keys({key: own[key] for key in adapter}, found, "the checkpoint")
        result = super().load_state_dict(tensors, strict=False, assign=assign)
        result.missing_keys.clear()  # the base's, which are left out on purpose
        return result

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is its base, modules_to_save included."""
        self.disable_adapters()
        try:
            yield
        finally:
            self.enable_adapters()

    def disable_adapters(self) -> None:
        """Put the base's own layers and tensors back, until `enable_adapters`."""
        if self.bone.trained is not None:
            raise UserError("the adapter is disabled already")
        self._place(self._replaced())
        self.bone.trained = self._exchange(self.bone.originals)

    def enable_adapters(self) -> None:
        """The inverse of `disable_adapters`."""
        if self.bone.trained is None:
            raise UserError("the adapter is not disabled")
        self._place(self.bone.layers)
        self._exchange(self.bone.trained)
        self.bone.trained = None

    def unload(self) -> nn.Module:
        """The base without the adapter: the same object, whose class and layers are as they were."""
        if self.bone.trained is None:
            self.disable_adapters()
        return self._release()

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False) -> nn.Module:
        """The base with the adapter in its weights, computed in fp32 and rounded once. No longer a BoneModel.

        safe_merge: check first that every merged weight is finite; if not, UserError, and the model is as it was.
        A merged weight belongs to its layer alone: where it was shared, as the output layer's with the embedding, the
        sharing ends, and the configuration says so.
        """
        if self.bone.trained is not None:
            self.enable_adapters()
        for name, layer in self.bone.layers.items():
            if layer.base is not None:
                raise UserError(f"{name} is quantised: load the model in bf16 or fp32, and the adapter, to merge it")
        if safe_merge:
            for name, layer in self.bone.layers.items():
                if not torch.stack(_merged(layer).aminmax()).isfinite().all():
                    raise UserError(f"the merged weight of {name} would hold NaN or infinity: nothing was merged")
        tied = _shared_weights(self)
        for name in list(self.bone.layers):
            layer, linear = self.bone.layers.pop(name), self.bone.replaced[name]  # popped, to free its weight
            ends_sharing = id(layer.weight) in tied
            linear.weight = nn.Parameter(_merged(layer), requires_grad=False)
            linear.bias = layer.bias
            self.set_submodule(name, linear)
            if ends_sharing:
                _untie(self)
        return self._release()

    def _replaced(self) -> dict[str, nn.Linear]:
        for name, module in self.bone.replaced.items():
            layer = self.bone.layers[name]
            if layer.base is None:
                # The same parameters, unless something such as a change of device has made new ones.
                module.weight, module.bias = layer.weight, layer.bias
        return self.bone.replaced

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            module.train(self.training)
            self.set_submodule(name, module)

    def _exchange(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Set these parameters, and return what they were."""
        before = {key: self.get_parameter(key).detach().clone() for key in tensors}
        with torch.no_grad():
            for key, tensor in tensors.items():
                self.get_parameter(key).copy_(tensor)
        return before

    def _release(self) -> nn.Module:
        for key in self.bone.originals:
            self.get_parameter(key).requires_grad_(False)
        del self.bone
        self.__class__ = type(self).__bases__[1]
        return self


def _check_arguments(what: str, given: Mapping[str, Any], *own: str) -> None:
    """UserError for arguments that are not `what`'s own, unless they are PEFT's and ask for what is done here."""
    check_names(what, given, [*own, *PEFT_ARGUMENTS])
    for name, value in given.items():
        if value not in PEFT_ARGUMENTS[name]:
            only = PEFT_ARGUMENTS[name][0]
            raise UserError(f"{what}: {name} {value!r} exists in PEFT only, expected {only!r}: leave it out")


def _inject(model: nn.Module, config: BoneConfig, adapter_name: str) -> BoneModel:
    """Make a BoneModel of the model, with new adapters. UserError, and the model as it was, if that cannot be."""
    if isinstance(model, BoneModel):
        raise UserError("the model has an adapter already: unload() or merge_and_unload() it first")
    if not isinstance(config, BoneConfig):
        raise UserError(f"expected a BoneConfig of rwkv_bone.hf, got {type(config).__module__}.{type(config).__name__}")
    modules = dict(model.named_modules())
    whole = _modules_to_save(model, modules, config)
    chosen = _choose(model, modules, config, whole)
    settings = AdapterSettings(config.kind, config.r)
    layer_class = ADAPTERS[config.kind]
    for name, module in chosen.items():
        try:
            layer_class.check(module.in_features, module.out_features, settings, name)
            if layer_class.needs_weight:
                check_weight(module, name)
        except UserError as error:
            # The layers' messages name the flags of train.py.
            words = str(error).replace("--bone_r ", "r ").replace("--bone_mode bone", "mode 'bone'")
            raise UserError(f"BoneConfig: {words}") from None

    model.requires_grad_(False)
    layers = {}
    for name, module in chosen.items():
        layers[name] = layer_class(module, settings, name).requires_grad_(False)
        for own in layer_class.parameter_names:
            layers[name].get_parameter(own).requires_grad_(not config.inference_mode)
        layers[name].train(module.training)
        model.set_submodule(name, layers[name])
    originals = {}
    for key, parameter in model.named_parameters():
        if any(key.startswith(f"{name}.") for name in whole):
            originals[key] = parameter.detach().clone()
            parameter.requires_grad_(not config.inference_mode)
    own_class = type(model)
    # The same name: transformers looks up what a model is by the name of its class.
    model.__class__ = type(own_class.__name__, (BoneModel, own_class), {"__module__": own_class.__module__})
    assert isinstance(model, BoneModel)
    model.bone = _Bone(config, adapter_name, layers, chosen, originals)
    return model


def _choose(
    model: nn.Module, modules: Mapping[str, nn.Module], config: BoneConfig, whole: list[str]
) -> dict[str, nn.Linear]:
    """The layers to adapt, by name. A quantised one need not be an nn.Linear, but has the attributes of one."""
    all_linear = config.target_modules == ALL_LINEAR
    if all_linear:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = {name for name, module in modules.items() if _is_linear(module) and module is not head}
    else:
        names = modules.keys() - {""}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    found = choose(config, [name for name in modules if name in names], model_type)
    # What is trained whole needs no adapter, as in PEFT.
    found = {name for name in found if not any(f"{name}.".startswith(f"{other}.") for other in whole)}
    obstacles = {name: _obstacle(name, modules[name]) for name in modules if name in found}
    chosen = {name: modules[name] for name, obstacle in obstacles.items() if not obstacle}
    refused = [obstacle for obstacle in obstacles.values() if obstacle]
    if refused and not (all_linear and chosen):
        raise UserError(refused[0])
    if refused:
        warnings.warn(f"all-linear leaves {len(refused)} of {len(found)} linear layers out: {refused[0]}", stacklevel=4)
    return cast("dict[str, nn.Linear]", chosen)


def _is_linear(module: nn.Module) -> bool:
    """Whether PEFT counts it as a linear layer: `nn.Linear` and GPT-2's `Conv1D`, which is one transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _obstacle(name: str, module: nn.Module) -> str:
    """Why this module cannot have an adapter; empty if it can. UserError where nothing can be said yet."""
    kind = type(module).__name__
    if kind in READ_PAST and name.endswith(READ_PAST[kind]):
        return f"{name} belongs to a layer that reads its weight past it, so an adapter would do nothing"
    if any(parameter.is_meta or not parameter.numel() for parameter in module.parameters()):
        raise UserError(
            f"{name} has no data here (it is offloaded, or cut up by ZeRO stage 3): load the whole model first, with "
            "ZeRO stage 3 before making TrainingArguments"
        )
    packed = hasattr(module, "in_features") and not has_plain_weight(module)
    if isinstance(module, AdapterLinear) or not (packed or _computes_as_linear(module)):
        return f"{name} is a {kind}: expected a linear layer, or one that is quantised"
    return ""


@torch.no_grad()
def _computes_as_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, or another in form only: Falcon's and RWKV-7's have a `forward` of their own."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    weight = module.weight
    numbers = torch.randn(1, 2, module.in_features, generator=torch.Generator().manual_seed(0))
    x = numbers.to(weight.device, weight.dtype)
    try:
        found, expected = module.forward(x), F.linear(x, weight, module.bias)
    except Exception:
        return False  # a forward of its own may want anything
    return found.shape == expected.shape and bool((found - expected).norm() <= 0.02 * expected.norm())


def _modules_to_save(model: nn.Module, modules: Mapping[str, nn.Module], config: BoneConfig) -> list[str]:
    """Names of the modules that are trained whole."""
    found = []
    tied = _shared_weights(model)
    for wanted in config.modules_to_save or []:
        names = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not names:
            raise UserError(f"BoneConfig: modules_to_save {wanted!r} matches no module of this model")
        for name in names:
            if any(id(parameter) in tied for parameter in modules[name].parameters()):
                raise UserError(
                    f"{name} shares its weight with another layer, and training it would change both: load the model "
                    "with tie_word_embeddings=False, or leave it out of modules_to_save"
                )
        found += names
    return found


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _untie(model: nn.Module) -> None:
    """Say in a model's configuration that its output layer has a weight of its own, so that it is saved and loaded."""
    config = getattr(model, "config", None)
    for section in (config, getattr(config, "text_config", None)):
        if section is not None and getattr(section, "tie_word_embeddings", False):
            section.tie_word_embeddings = False


@torch.no_grad()
def _merged(layer: AdapterLinear) -> Tensor:
    return layer.merged(layer.weight, layer.tensors(), layer.settings)
