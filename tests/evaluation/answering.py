"""Evaluations of a tiny model of bytes, loaded once, or of one that writes what a test says."""

import json
from pathlib import Path

import pytest

from rwkv_bone.evaluation import evaluate as program
from rwkv_bone.evaluation.evaluate import evaluate
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.inference.voice import Voice, Written


def write_rows(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def result(folder) -> dict:
    return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


class Evaluations:
    """Runs evaluations in a folder, each model loaded once."""

    def __init__(self, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.model, self.folder, self._monkeypatch = model, folder, monkeypatch
        voices, load = {}, program._loaded

        def loaded(cfg):
            key = (cfg.load_model, cfg.adapter, cfg.quant, cfg.precision, cfg.template, cfg.tokenizer)
            if key not in voices:
                voices[key] = load(cfg)
            return voices[key]

        monkeypatch.setattr(program, "_loaded", loaded)

    def config(self, output: str = "out", **settings) -> EvaluateConfig:
        return EvaluateConfig(**{"load_model": self.model, "output": str(self.folder / output), **settings})

    def __call__(self, output: str = "out", **settings) -> Path:
        evaluate(self.config(output, **settings))
        return self.folder / output

    def writes(self, answer) -> None:
        """From now on answer(prompt) -> (text, why it ended) is what the model writes."""

        def write(voice, prompts, seeds, **how):
            for ids in prompts:
                text, why = answer(voice.tokenizer.decode(list(ids)))
                yield Written(text, why, len(text))

        self._monkeypatch.setattr(Voice, "write", write)
