"""The tokenizer.json files that we write, read by `tokenizers` and by transformers, against World's Rust package."""

import random

import pytest

from rwkv_bone.data.tokenizer import ByteTokenizer, WorldTokenizer, world_tokens
from rwkv_bone.data.world_json import WORLD_END, longest_of, write_bytes_json, write_tokenizer_config, write_world_json

SCRIPTS = {
    "Latin": "The quick brown fox — naïve café, Ærø, Straße, Łódź, đường phố, ﬁn. “Quotes” 1,234.50 € x² ½",
    "Cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю. Ґанок, ђак, ўлюбёны №5",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ἐν ἀρχῇ ἦν ὁ λόγος· Ω ≠ Ω",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر، السَّلامُ عَلَيْكُمْ ١٢٣ پژگچ ﷽",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה. בְּרֵאשִׁית בָּרָא אֱלֹהִים ₪",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। क्ष त्र ज्ञ १२३ ॐ",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓ ฿",
    "Chinese": "天地玄黃，宇宙洪荒。我能吞下玻璃而不伤身体。𠀀𪚥 “你好”——龘靐",
    "Japanese": "いろはにほへと ちりぬるを、色は匂へど散りぬるを。カタカナ ﾊﾝｶｸ ㍿ が が",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. ㄱㄴㄷ 각",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪🇯🇵 👍🏽 ❤️‍🔥 \U0001fae8 😀😀😀😀😀😀😀",
    "code": "def f(x):\n    return {'a': [1, 2]}  # why?\n\t#include <a.h>\r\n\"\\n\\t\" != \x60${x}\x60;}}}]])//////",
    "white space": " " * 77 + "\n" * 13 + "\t" * 9 + "\r\n\r\n \n \t\n" + "\u3000\u00a0\u2028\u2029\u0085\u200b x  y",
    "odd bytes": "".join(map(chr, range(0x180))) + "\ufeff\ufffd\ue000\U0010ffff\x00\x00",
    "names of special tokens": f"<|endoftext|></s><s>[EOS]<|im_end|> {WORLD_END[:-1]}",
    "longest tokens": "-" * 300 + "=" * 130 + "*" * 129 + " " * 300 + "a" * 100,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (folder with a tokenizer.json, the tokenizer that it must agree with)}"""
    made = {}
    for name, write, reference in (
        ("world", write_world_json, WorldTokenizer()),
        ("bytes", write_bytes_json, ByteTokenizer()),
    ):
        folder = tmp_path_factory.mktemp(name)
        write(folder / "tokenizer.json")
        write_tokenizer_config(folder / "tokenizer_config.json")
        made[name] = folder, reference
    return made


@pytest.fixture(scope="module", params=["world", "bytes"])
def both(request, folders):
    """(our file as `tokenizers` reads it, the reference)"""
    tokenizers = pytest.importorskip("tokenizers")
    folder, reference = folders[request.param]
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), reference


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_gives_the_ids_of_the_rust_package_in_every_script(both, script):
    tokenizer, reference = both
    assert tokenizer.encode(SCRIPTS[script]).ids == reference.encode(SCRIPTS[script])


def test_the_file_gives_the_same_ids_for_any_text(both):
    tokenizer, reference = both
    draw = random.Random(0)
    words = [token.decode("utf-8", errors="ignore") for token in world_tokens()]
    for _ in range(300):
        # Token after token is where a greedy choice goes another way than the shortest or the likeliest one does.
        text = "".join(draw.choices(words, k=40)) + "".join(chr(draw.randrange(1, 0xD800)) for _ in range(10))
        assert tokenizer.encode(text).ids == reference.encode(text)


def test_every_token_is_written_and_read_back(folders):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folders["world"][0] / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(world_tokens()) == 65530
    for number, token in enumerate(world_tokens()[1:], 1):
        assert tokenizer.decode([number]) == token.decode("utf-8", errors="replace")


def test_a_long_word_takes_no_quadratic_time(both):
    # By the word piece model of the library, which is quadratic and worse, this would take hours.
    tokenizer, reference = both
    for text in ("=" * 200_000, "天" * 100_000, "ab" * 100_000):
        assert tokenizer.encode(text).ids == reference.encode(text)


def test_transformers_reads_the_folder_with_the_same_ids_and_gets_the_text_back(folders):
    transformers = pytest.importorskip("transformers")
    for folder, reference in folders.values():
        for tokenizer in (
            transformers.AutoTokenizer.from_pretrained(folder),
            transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
        ):
            for text in SCRIPTS.values():
                ids = tokenizer(text)["input_ids"]
                assert ids == reference.encode(text)
                # In bytes, id 0 is the byte 0 and the end of a document, and is shown as the end.
                ended = text.replace("\0", WORLD_END) if reference.name == "bytes" else text
                assert tokenizer.decode(ids) == ended
        named = transformers.AutoTokenizer.from_pretrained(folder)
        assert {named.bos_token_id, named.eos_token_id, named.pad_token_id, named.unk_token_id} == {0}


def test_a_file_is_written_the_same_each_time(tmp_path):
    for name in ("a.json", "b.json"):
        write_bytes_json(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_longest_word_is_found_with_words_that_need_going_back():
    import re

    words = ["a", "ab", "abcde", "b", "c", "d", "^", "]", "-", "\\", "(?", "[a"]
    found = re.findall(longest_of(words), "abcdabcdeab^]-\\(?[a")
    assert found == ["ab", "c", "d", "abcde", "ab", "^", "]", "-", "\\", "(?", "[a"]
