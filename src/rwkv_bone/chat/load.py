"""The models of a conversation."""

from __future__ import annotations

from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.devices import select_device
from rwkv_bone.inference.voice import Voice, enough_memory, load_voice, trained_with


def load_voices(cfg: ChatConfig) -> list[Voice]:
    """The model, and the one that is compared with it. UserError for all that is wrong with files and devices."""
    device = select_device(cfg.accelerator, "--accelerator cpu")
    data, chosen = trained_with(cfg.adapter, cfg.tokenizer, cfg.template)

    def load(path: str, adapter: str, quant: str) -> Voice:
        how = {"precision": cfg.precision, "device": device, "chosen": chosen, "system": cfg.system}
        return load_voice(path, adapter, quant=quant, data=data, **how)

    with enough_memory("while the model was loaded"):
        voices = [load(cfg.load_model, cfg.adapter, cfg.quant)]
        if cfg.compare:
            voices.append(load(cfg.compare, "", "none" if cfg.quant == "auto" else cfg.quant))
    return voices
