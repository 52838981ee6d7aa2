"""How prompt and response become the two texts that are tokenised.

The two texts are tokenised apart and their ids joined. So the mask is exact, and the model is trained on the very
ids it meets at generation, where the prompt is tokenised alone.
"""

from __future__ import annotations

import re


def choose_template(name: str, tokenizer_name: str) -> str:
    """`raw` or `world`: `auto` is `world` for the World tokenizer, whose models were trained on it."""
    if name == "auto":
        return "world" if tokenizer_name == "world" else "raw"
    return name


def render(template: str, prompt: str, response: str) -> tuple[str, str]:
    """The text before the response, and the response.

    raw:   the two as they are.
    world: "User: {prompt}\\n\\nAssistant:" and " {response}". The space belongs to the response, since World tokens
           begin with theirs. A blank line ends a turn: blank lines inside a turn become single line breaks.
    """
    if template == "raw":
        return prompt, response
    return f"User: {_one_turn(prompt)}\n\nAssistant:", f" {_one_turn(response)}"


def _one_turn(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n").strip())
