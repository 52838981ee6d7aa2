"""What was given, in layers: a saved run's settings, a script's variables, and what the user typed over them.

A setting that cannot act is never ignored in silence (`acts.py` says which can). What was typed is refused. What a
script or a saved run has, and something typed over it leaves without effect, is left out with a note. A variable of a
script that has no effect in the script itself is refused, unless it only repeats the default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv_bone.cards import AUTO
from rwkv_bone.config.acts import Table, When, asks, belonging
from rwkv_bone.config.fields import plain
from rwkv_bone.config.sections import AUTO as UNDECIDED
from rwkv_bone.errors import UserError
from rwkv_bone.launched import Launched

# The scripts put this between their own variables, as flags, and what their user typed.
TYPED = "--typed"


def split_argv(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(a script's flags, what the user typed)."""
    argv = list(argv)
    if TYPED not in argv:
        return [], argv
    place = argv.index(TYPED)
    return argv[:place], argv[place + 1 :]


@dataclass
class Layers:
    """{setting: value} of each layer, the later ones over the earlier ones.

    defaults: of every setting. source: the file that `saved` is from. config_in_script: the script names that file.
    by_hand: a person has written that file, so that what has no effect in it is refused, as in a script.
    """

    defaults: Mapping[str, Any]
    typed: dict[str, Any]
    script: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    config_in_script: bool = False
    by_hand: bool = False
    notes: list[str] = field(default_factory=list)
    overridden: dict[str, Any] = field(default_factory=dict)  # what a script has, and a file that was typed as well

    def values(self) -> dict[str, Any]:
        """Every setting."""
        return {**self.defaults, **self.saved, **self.script, **self.typed}

    def settle(self, table: Table) -> dict[str, Any]:
        """Leave out what cannot act, in place, with notes; the settings that are left. UserError for what was typed."""
        self._leave_out_what_belongs(belonging(table))
        # What each layer is without those above it.
        saved = {**self.defaults, **self.saved}
        script = {**(saved if self.config_in_script else self.defaults), **self.overridden, **self.script}
        while self._leave_out_one(table, saved, script):
            pass
        now = self.values()
        for name, when in table.items():
            if name in self.typed and asks(name, now[name], self.defaults[name]) and not when.met(now):
                raise UserError(f"--{name} {shown(now[name])} {_no_effect(name, when, now)}: {_remedy(when, now)}")
        return {**self.saved, **self.script, **self.typed}

    def put_file_over_script(self) -> None:
        """Have the settings of a file that was typed over a script override the script's variables, with a note."""
        self.overridden = {name: self.script.pop(name) for name in list(self.script) if name in self.saved}
        lost = [f"{name}={shown(value)}" for name, value in self.overridden.items() if value != self.saved[name]]
        if lost:
            self.notes.append(f"{self.source} says otherwise, so of the script are left out: {', '.join(lost)}")

    def count_processes(self, found: Launched) -> None:
        """Take --devices and --num_nodes from the launcher where they were not typed, with notes."""
        cards = found.cards if self.values()["accelerator"] != "cpu" else None
        for name, number, what in (
            ("devices", found.devices, f"{found.launcher} has started {found.devices} on each machine"),
            ("devices", cards, f"{found.launcher} gives {cards} cards to this task"),
            ("num_nodes", found.nodes, f"{found.launcher} has {found.nodes}"),
        ):
            # A number above 1 in a script was meant: the processes say, when they meet, that it does not fit.
            if not number or name in self.typed or self.script.get(name, 1) > 1:
                continue
            for layer, told in ((self.script, self._of_script), (self.saved, self._of_saved)):
                if name in layer and (value := layer.pop(name)) not in (number, AUTO):
                    self.notes.append(f"{told(name, value)} is left out: {what}")
            self.script[name] = number

    def _leave_out_what_belongs(self, belongs: Mapping[str, str]) -> None:
        """What describes other files, or another loss, than was typed."""
        for name, owner in belongs.items():
            continued = self.typed.get("resume") in (True, "1") and owner != "devices"
            if owner not in self.typed or name in self.typed or continued:
                continue
            for layer, told in ((self.script, self._of_script), (self.saved, self._of_saved)):
                given = name in layer and layer[name] != self.defaults[name]
                if given and owner in layer and layer[owner] != self.typed[owner]:
                    self.notes.append(
                        f"{told(name, layer.pop(name))} is left out: it belongs to that {owner}, and --{owner} was "
                        f"given; --{name} says what belongs to this one"
                    )

    def _leave_out_one(self, table: Table, saved: Mapping[str, Any], script: Mapping[str, Any]) -> bool:
        """Take one setting that cannot act out of the layers below what was typed; whether there was one."""
        now = self.values()
        for name, when in table.items():
            if name in self.typed or when.met(now):
                continue
            if name in self.script:
                self._leave_out(name, when, now, self.script, script, self._of_script)
                return True
            # A saved run may hold what had no effect in it either: it stays, as --resume 1 compares it.
            if name in self.saved and (self.by_hand or when.met(saved)):
                self._leave_out(name, when, now, self.saved, saved, self._of_saved)
                return True
        return False

    def _leave_out(
        self,
        name: str,
        when: When,
        now: Mapping[str, Any],
        layer: dict[str, Any],
        alone: Mapping[str, Any],
        told: Callable[[str, Any], str],
    ) -> None:
        value, default = layer.pop(name), self.defaults[name]
        if not asks(name, value, default):
            return
        if when.met(alone):
            self.notes.append(f"{told(name, value)} is left out: it {_no_effect(name, when, now)}")
        elif value != default:
            what = "variable" if told == self._of_script else "line"
            raise UserError(f"{told(name, value)} {_no_effect(name, when, now)}: remove that {what}")

    def _of_script(self, name: str, value: Any) -> str:
        return f"{name}={shown(value)} of the script"

    def _of_saved(self, name: str, value: Any) -> str:
        return f"{name} {shown(value)} of {self.source}"


def _no_effect(name: str, when: When, values: Mapping[str, Any]) -> str:
    others = [_stated(other, values[other]) for other in when.names if other != name]
    return f"has no effect {' and '.join(others)}; it acts {when.words}"


def _stated(name: str, value: Any) -> str:
    return f"without --{name}" if value in ("", (), 0) else f"with --{name} {shown(value)}"


def _remedy(when: When, values: Mapping[str, Any]) -> str:
    remedy = when.remedy_for(values)
    return "remove it" + (f", or give {remedy}" if remedy else " or the other")


def shown(value: Any) -> str:
    """A setting as one types it."""
    if value == UNDECIDED:
        return "auto"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return " ".join(value)
    return plain(value) if isinstance(value, int | float) else value
