"""`BoneConfig`: which layers of a model get an adapter, and of which kind. Fields and meanings are PEFT's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from enum import Enum
from typing import Any

from rwkv_bone.adapters.peft_format import PEFT_TYPES, miss_config
from rwkv_bone.errors import UserError

ATTENTION = ["q_proj", "v_proj"]
# PEFT's own choice for a model that names no target_modules, by the model's model_type.
TARGETS = {
    "llama": ATTENTION,
    "llama4": ATTENTION,
    "mistral": ATTENTION,
    "mixtral": ATTENTION,
    "gemma": ATTENTION,
    "gemma2": ATTENTION,
    "gemma3_text": ATTENTION,
    "qwen2": ATTENTION,
    "qwen3": ATTENTION,
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
ALL_LINEAR = "all-linear"
# name of a mode -> kind of adapter
MODES = {"bone": "bone", "bat-col": "bat-col", "bat-row": "bat"}
# Fields of PEFT's that change nothing here, and the only value that each may have.
UNUSED = {"bias": "none", "miss_dropout": 0.0, "mini_r": 1}
# What `adapter_config.json` holds besides BoneConfig's fields: its kind, and who wrote it.
WRITERS_FIELDS = {"peft_type", "peft_version"}


class TaskType(str, Enum):
    """PEFT's names of tasks. They are recorded; no adapter depends on them."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class BoneConfig:
    """What `get_bone_model` does to a model.

    r: block size. target_modules: names, which match a module that is called so or ends in `.name`; a regular
    expression for whole names; "all-linear", every linear layer but the output's; None, PEFT's choice for the model's
    architecture. exclude_modules: the same, to leave out. layers_to_transform: numbers of layers.
    modules_to_save: names of modules that are trained whole and saved with the adapter.

    init_weights: True, zeros; False, random (for tests); "bat", PEFT's Bat. mode says the same and more: "bone",
    "bat-col" (PEFT's Bat, whose blocks follow the outputs) or "bat-row" (RWKV-PEFT's, faster, which PEFT cannot load).

    base_model_name_or_path, revision, auto_mapping, task_type: recorded in the adapter's configuration. bias,
    miss_dropout, mini_r: only PEFT's defaults. An argument that is none of these is a UserError that names it.

    Where peft is installed, what is made is a `peft.MissConfig` as well (`peft_config.py`), for peft's own
    `get_peft_model` and for trainers with a `peft_config`, such as TRL's SFTTrainer.
    """

    r: int = 64
    target_modules: Collection[str] | str | None = None
    task_type: str | None = None
    init_weights: bool | str = True
    mode: str = ""
    exclude_modules: Collection[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    miss_dropout: float = 0.0
    mini_r: int = 1
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> BoneConfig:
        check_names("BoneConfig", kwargs, [spec.name for spec in fields(cls)])
        try:
            from rwkv_bone.hf.peft_config import PeftBoneConfig
        except ImportError:  # no peft, or one without MiSS
            return super().__new__(cls)
        return super().__new__(PeftBoneConfig if cls is BoneConfig else cls)

    def __post_init__(self):
        if not isinstance(self.r, int) or self.r < 1:
            raise UserError(f"BoneConfig: r {self.r!r}, expected a whole number of at least 1")
        if self.init_weights not in (True, False, "bat"):
            hint = " (a mini adapter can be loaded, not trained)" if self.init_weights == "mini" else ""
            raise UserError(f"BoneConfig: init_weights {self.init_weights!r}, expected True, False or 'bat'{hint}")
        if self.mode not in ("", *MODES):
            hint = ": 'bat' has two meanings, bat-col is PEFT's" if self.mode == "bat" else ""
            raise UserError(f"BoneConfig: mode {self.mode!r}, expected one of {', '.join(MODES)}{hint}")
        if self.init_weights == "bat" and self.mode not in ("", "bat-col"):
            raise UserError(
                f"BoneConfig: init_weights 'bat' is mode bat-col, but mode is {self.mode!r}: give one of them"
            )
        if self.init_weights is False and self.kind != "bone":
            raise UserError("BoneConfig: init_weights False (random) exists for bone only")
        for name, only in UNUSED.items():
            if getattr(self, name) != only:
                raise UserError(f"BoneConfig: {name} {getattr(self, name)!r} is not supported, expected {only!r}")
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type).value
            except ValueError:
                raise UserError(
                    f"BoneConfig: task_type {self.task_type!r}, expected one of {', '.join(TaskType.__members__)}"
                ) from None
        if self.task_type in ("SEQ_CLS", "TOKEN_CLS") and not self.modules_to_save:
            raise UserError(
                f"BoneConfig: task_type {self.task_type} has a new head, which must be trained: name it in "
                "modules_to_save, such as ['score']"
            )
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError("BoneConfig: layers_to_transform needs target_modules as a list, not as an expression")
        if self.kind == "bat-col":
            self.init_weights = "bat"  # where PEFT looks for it

    @property
    def kind(self) -> str:
        """The adapter's name in rwkv_bone.adapters.ADAPTERS."""
        return MODES[self.mode or ("bat-col" if self.init_weights == "bat" else "bone")]

    @property
    def method(self) -> str:
        """The `peft_type` of the directories that we write."""
        return PEFT_TYPES[self.kind]

    @property
    def peft_type(self) -> str:
        """The same, but where peft is installed, it is for peft alone (`peft_config.py`)."""
        return self.method

    def to_peft(self) -> dict:
        """`adapter_config.json`, as PEFT writes it for inference."""
        # PEFT makes sets of the lists of names; JSON has none.
        sets = {name: sorted(value) for name, value in asdict(self).items() if isinstance(value, set)}
        others = asdict(self) | sets
        for name in ("mode", "init_weights", "inference_mode"):
            del others[name]
        return miss_config(self.kind, others.pop("r"), others.pop("target_modules"), **others)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], kind: str, is_trainable: bool, source: str) -> BoneConfig:
        """From `adapter_config.json` of an adapter of this kind. Warns of fields that say something unknown.

        source: the adapter's folder, for messages.
        """
        # What these say is in the kind, or in the tensors (mini_r), or concerns training alone.
        known = {spec.name for spec in fields(cls)}
        read = known - {"init_weights", "mode", "inference_mode", "mini_r", "miss_dropout"}
        unknown = [f"{name} {value!r}" for name, value in config.items() if name not in known | WRITERS_FIELDS]
        if unknown:
            warnings.warn(
                f"{source}: adapter_config.json has fields that are not known here and do nothing: "
                f"{', '.join(unknown)}. If one of them changes what the adapter computes, load it with peft",
                stacklevel=3,
            )
        if is_trainable and config.get("miss_dropout"):
            warnings.warn(
                f"{source}: it was trained with miss_dropout {config['miss_dropout']}, and here it trains without",
                stacklevel=3,
            )
        mode = next(name for name, value in MODES.items() if value == kind)
        given = {name: value for name, value in config.items() if name in read}
        return cls(**given, mode=mode, inference_mode=not is_trainable)


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """UserError if one of the given arguments is not among the known ones."""
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{what} has no argument {name!r}{meant}; there are {', '.join(known)}")


def choose(config: BoneConfig, names: Iterable[str], model_type: str | None) -> set[str]:
    """The names that the configuration targets, by PEFT's rules; "all-linear" takes them all.

    UserError when it says nothing for this architecture, or when a name in target_modules matches nothing.
    """
    targets = config.target_modules
    if targets is None:
        if model_type not in TARGETS:
            raise UserError(
                f"BoneConfig: no target_modules, and none are built in for model_type {model_type}: name the layers "
                "to adapt, or 'all-linear'"
            )
        targets = TARGETS[model_type]
    names = list(names)
    if targets == ALL_LINEAR:
        found = set(names)
    else:
        if isinstance(targets, str):
            unmatched = [] if any(name_matches(name, targets) for name in names) else [targets]
        else:
            unmatched = [target for target in targets if not any(name_matches(name, [target]) for name in names)]
        if unmatched:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names})[:40])
            raise UserError(f"BoneConfig: target_modules {unmatched[0]!r} matches no module; there are {there}")
        found = {name for name in names if name_matches(name, targets)}
    found = {name for name in found if not (config.exclude_modules and name_matches(name, config.exclude_modules))}
    found = {name for name in found if _in_layers(name, config)}
    if not found:
        raise UserError("BoneConfig: exclude_modules and layers_to_transform leave no module to adapt")
    return found


def name_matches(name: str, targets: Collection[str] | str) -> bool:
    """PEFT's rule: one of several is the name or its end, `.target`; an expression is the whole name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(name: str, config: BoneConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False
