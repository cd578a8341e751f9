"""Makes the golden chat tokenizer that tests/tokenizers/test_golden_chat.py compares with.

Command (needs `transformers>=5`, without torch; no network, a second):

    python tests/golden/make_chat_golden.py

`chat_tokenizer/` is a folder as `save_pretrained` writes it: a byte-level BPE of 400 tokens with
NFC as its normaliser. `expected.json` there holds what transformers makes of texts and chats:

  texts   [{text, ids (special tokens read), plain (special tokens left as text), decoded}]
  chats   [{template, messages, options, text, ids, assistant (mask, null without blocks)}]

The templates are ours; they use what published ones use: trimmed blocks, namespaces, loop controls,
slices, string methods, `tojson`, `raise_exception`, generation blocks.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "chat_tokenizer"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

MARKED = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
    {% if message.role == 'assistant' %}
        {% generation %}
            {{- message.content | trim -}}
            {% for call in message.tool_calls or [] %}
                {{- '\\ncall ' ~ call.function.arguments | tojson(indent=1) }}
            {% endfor %}
            {{- '<|im_end|>' -}}
        {% endgeneration %}
    {% else %}
        {{- message.content + '<|im_end|>' -}}
    {% endif %}
    {{- '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
THINKING = """\
{%- set ns = namespace(last=-1, first=true) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if ns.last < 0 %}{{ raise_exception('nobody asks') }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- if loop.last %}{{- eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
TEXTS = [
    "hello world",
    "  spaces \t and\n\n lines\r\n ",
    "<|im_start|>user<|im_end|> a<|endoftext|>",
    "\u4e16\u754c \U0001f9ec e\u0301",
    "",
    "It's 1234, isn't it?",
]
ASK = {"role": "user", "content": "What is\n2 + 2? \u00e9"}
CALL = {"function": {"name": "add", "arguments": {"b": 2, "a": "\u00fc"}}}
CHATS = [
    ("MARKED", [ASK], {"add_generation_prompt": True}),
    ("MARKED", [ASK, {"role": "assistant", "content": " four ", "tool_calls": [CALL]}, ASK], {}),
    (
        "MARKED",
        [{"role": "system", "content": "s"}, ASK, {"role": "assistant", "content": "\u4e16"}] * 2,
        {"tools": [{"type": "function", "function": {"name": "add<b>", "description": "\u00fc"}}]},
    ),
    ("THINKING", [ASK, {"role": "assistant", "content": "<think>\nx\n</think>\n\nyes"}], {}),
    (
        "THINKING",
        [ASK, {"role": "assistant", "content": "<think>x</think>\n\nyes"}, ASK],
        {"add_generation_prompt": True},
    ),
]


def main() -> None:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=MARKED,
    )
    tokenizer.save_pretrained(FOLDER)
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0}
    (FOLDER / "generation_config.json").write_text(json.dumps(generation) + "\n")
    texts, chats = [], []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        texts.append({"text": text, "ids": ids, "plain": plain, "decoded": decoded})
    for name, messages, options in CHATS:
        template = {"MARKED": MARKED, "THINKING": THINKING}[name]
        arguments = {"chat_template": template, **options}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        marked = "{% generation %}" in template
        both = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=marked, **arguments
        )
        chats.append(
            {
                "template": template,
                "messages": messages,
                "options": options,
                "text": text,
                "ids": both["input_ids"],
                "assistant": both["assistant_masks"] if marked else None,
            }
        )
    expected = json.dumps({"texts": texts, "chats": chats}, indent=None)
    (FOLDER / "expected.json").write_text(expected + "\n")


if __name__ == "__main__":
    main()
