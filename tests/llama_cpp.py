"""llama.cpp, an independent implementation: what it computes from a GGUF file and how it cuts text into tokens.

The wheel `xllamacpp` carries llama.cpp compiled, with its C interface. It runs in a process of its own, with one thread
and a time limit, since it may abort, or spin, over a file that it dislikes.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

TIME_LIMIT = 120  # seconds


class Answer(NamedTuple):
    logits: np.ndarray  # [T, V]
    ids: list[list[int]]  # of each text
    metadata: dict[str, str]  # as llama.cpp prints it
    log: str


def ask(model: Path, ids: Sequence[int], texts: Sequence[str] = (), piece: int = 0) -> Answer:
    """Logits of `ids`, given to llama.cpp in pieces of so many tokens (0: at once); ids of texts; the file's metadata.

    AssertionError, with llama.cpp's own words, if it does not load or compute the file.
    """
    request = json.dumps({"model": str(model), "ids": list(ids), "texts": list(texts), "piece": piece})
    done = subprocess.run([sys.executable, __file__], input=request, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    return Answer(np.array(found["logits"], np.float32), found["ids"], found["metadata"], done.stderr)


# From here on: the other process.


class Parameters(ctypes.Structure):
    """llama.cpp's parameters of a model or a context, whose layout changes from version to version.

    The default ones go back as they came, in room enough for any version. Only a context's first fields are written:
    n_ctx, n_batch, n_ubatch.
    """

    _fields_ = [("head", ctypes.c_uint32 * 4), ("rest", ctypes.c_char * 2032)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


POINTER, INT, BOOL, TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, TEXT, POINTER)
FUNCTIONS = {
    "llama_log_set": (None, [LOG, POINTER]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Parameters, []),
    "llama_model_load_from_file": (POINTER, [TEXT, Parameters]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_model_meta_count": (INT, [POINTER]),
    "llama_model_meta_key_by_index": (INT, [POINTER, INT, TEXT, ctypes.c_size_t]),
    "llama_model_meta_val_str_by_index": (INT, [POINTER, INT, TEXT, ctypes.c_size_t]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_tokenize": (INT, [POINTER, TEXT, INT, ctypes.POINTER(INT), INT, BOOL, BOOL]),
    "llama_context_default_params": (Parameters, []),
    "llama_init_from_model": (POINTER, [POINTER, Parameters]),
    "llama_set_n_threads": (None, [POINTER, INT, INT]),
    "llama_batch_init": (Batch, [INT, INT, INT]),
    "llama_decode": (INT, [POINTER, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [POINTER, INT]),
}


def library() -> ctypes.CDLL:
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations, "pip install -r requirements-dev.txt"
    path = next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    llama = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    return llama


def metadata(llama: ctypes.CDLL, model: int) -> dict[str, str]:
    room = ctypes.create_string_buffer(1 << 16)

    def text(function, number: int) -> str:
        function(model, number, room, len(room))
        return room.value.decode("utf-8", errors="replace")

    entries = range(llama.llama_model_meta_count(model))
    keys, values = llama.llama_model_meta_key_by_index, llama.llama_model_meta_val_str_by_index
    return {text(keys, number): text(values, number) for number in entries}


def tokenize(llama: ctypes.CDLL, vocabulary: int, text: str) -> list[int]:
    content = text.encode("utf-8")
    room = (INT * (len(content) + 1))()
    # Without special tokens: neither added nor recognised.
    count = llama.llama_tokenize(vocabulary, content, len(content), room, len(room), False, False)
    assert count >= 0, "more tokens than bytes"
    return list(room[:count])


def decode(llama: ctypes.CDLL, context: int, ids: list[int], start: int, n_vocab: int) -> list[list[float]]:
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for number, token in enumerate(ids):
        batch.token[number], batch.pos[number] = token, start + number
        batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
        batch.logits[number] = 1
    status = llama.llama_decode(context, batch)
    assert status == 0, f"llama_decode: {status}"
    return [llama.llama_get_logits_ith(context, number)[:n_vocab] for number in range(len(ids))]


def main() -> None:
    request = json.load(sys.stdin)
    llama, ids = library(), request["ids"]
    write = LOG(lambda level, text, _: sys.stderr.write(text.decode("utf-8", errors="replace")))
    llama.llama_log_set(write, None)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(request["model"].encode(), llama.llama_model_default_params())
    assert model, "the model was not loaded"
    vocabulary = llama.llama_model_get_vocab(model)
    settings = llama.llama_context_default_params()
    settings.head[:3] = [max(512, len(ids))] * 3
    context = llama.llama_init_from_model(model, settings)
    assert context, "no context was made"
    # With its default of many threads it spins for minutes on a busy machine.
    llama.llama_set_n_threads(context, 1, 1)
    logits, piece = [], request["piece"] or max(1, len(ids))
    for start in range(0, len(ids), piece):
        logits += decode(llama, context, ids[start : start + piece], start, llama.llama_vocab_n_tokens(vocabulary))
    answer = {
        "logits": logits,
        "ids": [tokenize(llama, vocabulary, text) for text in request["texts"]],
        "metadata": metadata(llama, model),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
