import os
import pickle
import threading
import time

import numpy as np
import pytest

from step_jax.core.errors import DataError
from step_jax.tokenizers import chat, template_process
from step_jax.tokenizers.chat import built_in, encode_chat
from step_jax.tokenizers.template import ChatTemplate
from tests.tokenizers.made import byte_level, metaspace, ours

ASK = {"role": "user", "content": "the fox?"}
SAY = {"role": "assistant", "content": "yes"}
ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def qwen_like():
    return ours(byte_level(), tokenizer_config=ENDS)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "</s>"}, "mine.jinja")


def spans_of(text, answers) -> list[str]:
    return [text[a:b] for answer in answers for a, b in answer.spans]


def said(tokenizer, made, messages) -> list[str]:
    """What the mask marks, one text for every run of marked tokens."""
    ((ids, mask),) = encode_chat(tokenizer, made, messages)
    names = {i: text for text, i in tokenizer.special.items()}
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    written = [
        "".join(names.get(int(i)) or tokenizer.decode([i]) for i in ids[run])
        for run in runs
        if mask[run[0]]
    ]
    return written


def test_chatml_marks_every_answer_and_its_end(qwen_like):
    made = built_in("chatml", qwen_like)
    system = {"role": "system", "content": "be kind"}
    ((text, answers),) = made.answers([system, ASK, SAY, ASK, SAY])
    assert text == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        + 2 * "<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert spans_of(text, answers) == ["yes<|im_end|>"] * 2
    assert said(qwen_like, made, [system, ASK, SAY, ASK, SAY]) == ["yes<|im_end|>"] * 2
    asked = made.render([system, ASK], add_generation_prompt=True)
    assert text.startswith(asked) and asked.endswith("<|im_start|>assistant\n")


def test_plain_needs_an_end_token_only(qwen_like):
    made = built_in("plain", qwen_like)
    ((text, ((_, ((a, b),)),)),) = made.answers([ASK, SAY])
    assert text == "User: the fox?\n\nAssistant: yes<|im_end|>\n\n"
    assert text[a:b] == " yes<|im_end|>" and text[:a] == made.render(
        [ASK], add_generation_prompt=True
    )
    with pytest.raises(DataError, match="plain writes: an end-of-text token"):
        built_in("plain", ours(byte_level()))


def test_plain_works_with_a_trained_sentencepiece(tokenizer):
    made = built_in("plain", tokenizer)
    ((ids, mask),) = encode_chat(tokenizer, made, [ASK, SAY])
    assert tokenizer.decode(ids) == "User: the fox?\n\nAssistant: yes\n\n"
    assert tokenizer.decode(ids[mask]) == " yes" and ids[mask][-1] == tokenizer.eos_id
    with pytest.raises(DataError, match="chatml writes: <|im_start|> and"):
        built_in("chatml", tokenizer)
    with pytest.raises(DataError, match="no chat template 'llama'; there are chatml, plain"):
        built_in("llama", tokenizer)


def test_built_in_templates_take_text_only(qwen_like):
    picture = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    for name in chat.BUILT_IN:
        with pytest.raises(DataError, match=f"{name} takes text content only"):
            built_in(name, qwen_like).render([picture])


PREFIXES = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_answers_are_found_by_prefixes_where_a_template_marks_none(qwen_like):
    made = template(PREFIXES)
    ((text, answers),) = made.answers([ASK, SAY, ASK, SAY])
    assert spans_of(text, answers) == ["yes<|im_end|>\n"] * 2
    assert said(qwen_like, made, [ASK, SAY, ASK, SAY]) == ["yes<|im_end|>"] * 2


CONTENT = "(m.content if loop.last else m.content.split('</think>')[-1])"
FORGETFUL = PREFIXES.replace("m.content", CONTENT)
MARKED = FORGETFUL.replace(
    f"+ {CONTENT} + '<|im_end|>\\n' }}}}",
    f"}}}}{{%- generation %}}{{{{- {CONTENT} + '<|im_end|>' }}}}{{%- endgeneration %}}"
    "{{- '\\n' }}",
)


@pytest.mark.parametrize(("source", "end"), [(FORGETFUL, "\n"), (MARKED, "")])
def test_an_answer_that_is_rewritten_later_is_learned_as_it_was_given(qwen_like, source, end):
    """Thoughts that a template drops once others follow: one text for each answer, as generation
    is given it."""
    made = template(source)
    thinks = [SAY | {"content": f"<think>{i}</think>{i}"} for i in range(2)]
    messages = [ASK, thinks[0], ASK, thinks[1]]
    first, second = made.answers(messages)
    assert first[0] == made.render(messages[:2]) and second[0] == made.render(messages)
    assert "<think>0</think>" in first[0] and "<think>0</think>" not in second[0]
    assert spans_of(*first) == ["<think>0</think>0<|im_end|>" + end]
    assert spans_of(*second) == ["<think>1</think>1<|im_end|>" + end]
    taught = encode_chat(qwen_like, made, messages)
    asked = made.render(messages[:3], add_generation_prompt=True)
    before = qwen_like.encode(asked, special=True)
    ids, mask = taught[1]
    np.testing.assert_array_equal(ids[: len(before)], before)
    assert not mask[: len(before)].any() and mask[len(before)]


def test_what_a_template_leaves_out_or_writes_otherwise_is_refused(qwen_like):
    deaf = template(PREFIXES)  # knows no reasoning_content
    with pytest.raises(DataError, match="chats:7, message 1: mine.jinja leaves out 'because'"):
        deaf.answers([ASK, SAY | {"reasoning_content": "because "}], record="chats:7")
    forced = template(PREFIXES.replace("assistant\\n' }}", "assistant\\n<think>' }}"))
    with pytest.raises(DataError, match="message 1: mine.jinja asks for an answer with .*think>"):
        forced.answers([ASK, SAY])
    assert len(forced.answers([ASK, SAY | {"content": "<think>no</think>yes"}])) == 1
    endless = template(PREFIXES.replace("<|im_end|>", ""))
    with pytest.raises(DataError, match="chats:7: mine.jinja ends an answer with none of the stop"):
        encode_chat(qwen_like, endless, [ASK, SAY], record="chats:7")


def test_a_token_that_reaches_from_the_question_into_the_answer_is_cut(qwen_like):
    """As generation is given it: the ids of the question alone, then those of the answer."""
    source = PREFIXES.replace("assistant\\n' }}", "assistant\\nth' }}")
    made = template(
        source.replace("m.content", "('th' if m.role == 'assistant' else '') + m.content")
    )
    messages = [ASK | {"content": ""}, SAY | {"content": "e fox"}] * 2
    whole = qwen_like.encode(made.render(messages), special=True)
    ((ids, mask),) = encode_chat(qwen_like, made, messages)
    assert len(ids) > len(whole) and qwen_like.decode(ids) == qwen_like.decode(whole)
    starts = np.flatnonzero(np.diff(mask.astype(int)) == 1) + 1
    assert [qwen_like.decode(ids[i:])[:5] for i in starts] == ["e fox"] * 2
    first = qwen_like.encode(made.render(messages[:1], add_generation_prompt=True), special=True)
    np.testing.assert_array_equal(ids[: len(first)], first)


def test_a_text_that_cannot_be_cut_is_refused():
    """A tokenizer that puts a space before every text that it reads."""
    spaced = ours(metaspace(), tokenizer_config={"eos_token": "</s>"})
    made = template(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match="begins an answer within a token"):
        encode_chat(spaced, made, [ASK | {"content": "th"}, SAY | {"content": "e"}])


@pytest.mark.parametrize("name", chat.BUILT_IN)
def test_built_in_templates_write_thoughts_calls_and_tools(qwen_like, name):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "4"}, SAY | {"reasoning_content": "it says 4"}]
    made = built_in(name, qwen_like)
    texts = said(qwen_like, made, messages)
    function = '{"name": "add", "arguments": {"a": 2}}'
    assert [function in texts[0], "it says 4" in texts[1], len(texts)] == [True, True, 2]
    assert all(text.endswith("<|im_end|>") for text in texts)
    assert '[{"name": "add"}]' in made.render(messages[:1], tools=[{"name": "add"}])


def test_marks_leave_no_trace_whatever_a_message_holds():
    made = template(
        "{{ messages[0].content }}{% if messages[1] is defined %}{% generation %}"
        "{{ messages[1].content }}{% endgeneration %}!{% endif %}"
    )
    (made_of,) = made.answers([ASK, {"role": "assistant", "content": "\0a<\0>b\ue000"}])
    assert made_of == ("the fox?\0a<\0>b\ue000!", [(8, [(8, 15)])])
    nosy = "{% set x %}{% generation %}yes{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(DataError, match="looks at the text of a generation block"):
        template(nosy).answers([ASK, SAY])
    assert template(nosy).render([SAY]) == "3"


def test_variables_and_tools_reach_the_template():
    made = template("{{ eos_token }}{{ depth }}{{ tools | tojson }}{{ tools[0].a is defined }}")
    text = made.render([ASK], tools=[{"b": "<\u00e9>"}], depth=3)
    assert text == '</s>3[{"b": "<\u00e9>"}]False'
    assert template("{{ strftime_now('%Y') }}").render([ASK]) == time.strftime("%Y")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "mine.jinja failed: roles must alternate",
        ),
        ("\n{% for %}", "line 2: Expected an expression"),
        ("{{ x.y }}", "'x' is undefined"),
        ("{{ messages.__class__ }}", "not allowed: to reach for '__class__' of a list"),
        ("{{ ''.__class__.__mro__ }}", "not allowed: to reach for '__class__' of a str"),
        ("{{ 'x' | attr('__class__') }}", "not allowed: to reach for '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "not allowed"),
        ("{{ messages.append(1) }}", "not allowed: to reach for 'append'"),
        ("{% set ns = namespace(_a=1) %}", "not allowed: to name something '_a'"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "not allowed|not defined"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ 'a' * 10 ** 12 }}", "more memory than is allowed"),
        (
            "{% set ns = namespace(x='aaaaaaaa') %}"
            "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "more memory than is allowed",
        ),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 16,777,216 charac"),
        ("{{ range(10 ** 9) }}", "range"),
        (
            "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
            "in each other",
        ),
    ],
)
def test_what_a_template_may_not_do_is_named(source, message):
    with pytest.raises(DataError, match=f"chats:3: .*({message})"):
        template(source).answers([ASK, SAY], record="chats:3")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ n ** (n ** n) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    ],
)
def test_a_template_without_end_is_stopped_and_the_next_call_works(source, monkeypatch):
    monkeypatch.setattr(template_process, "MAX_SECONDS", 1.0)
    made = template("{% if eternal %}" + source + "{% endif %}done")
    with pytest.raises(DataError, match="mine.jinja did not end within 1 s"):
        made.render([ASK], eternal=True, n=9)
    monkeypatch.setattr(template_process, "MAX_SECONDS", 10.0)
    assert made.render([ASK], eternal=False) == "done"


def test_an_overlong_template_is_refused_unread():
    with pytest.raises(DataError, match="600,000 characters; at most 524,288"):
        template("a" * 600_000)


def test_long_conversations_and_many_threads_are_served():
    made, texts = template("{% for m in messages %}{{ m.content }}{% endfor %}"), {}

    def ask(i):
        texts[i] = made.render([ASK | {"content": str(i) * 300_000}])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert texts == {i: str(i) * 300_000 for i in range(6)}


def test_a_copy_elsewhere_and_a_killed_process_start_anew():
    made = template("a")
    assert made.render([ASK]) == "a"
    made._process._process.kill()
    made._process._process.wait()
    assert made.render([ASK]) == "a"
    assert pickle.loads(pickle.dumps(made)).render([ASK]) == "a"


def test_a_template_s_process_gets_no_secrets_and_ends_with_its_owner(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    made = template("a")
    made.render([ASK])
    process = made._process._process
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    del made
    assert process.wait(5) is not None and not os.path.exists(f"/proc/{process.pid}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "chats:1 is a str; it must be a list"),
        ([], "chats:1 has no messages"),
        (["hello"], "chats:1, message 0 is a str"),
        ([ASK, {"role": "bot", "content": "x"}], "message 1: role is 'bot'; it must be one of sys"),
        ([{"content": "x"}], "message 0: role is None"),
        ([{"role": "user"}], "message 0: content is missing"),
        ([{"role": "assistant", "content": None}], "message 0: content is missing"),
        ([{"role": "user", "content": 3}], "message 0: content is a int"),
        ([{"role": "user", "content": ["x"]}], "message 0, part 0 is 'x'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part 0: a part of type text"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "no JSON value"),
        ([SAY | {"tool_calls": "f"}], "message 0: tool_calls is a str"),
        ([SAY | {"tool_calls": [{"function": {}}]}], "message 0, call 0 is .*function's name"),
    ],
)
def test_messages_that_are_none_are_refused_by_place(messages, message):
    with pytest.raises(DataError, match=message):
        template("a").render(messages, record="chats:1")


def test_calls_of_tools_and_parts_are_messages():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}
    made = template(
        "{{ messages[1].tool_calls[0].function.name }}{{ messages[0].content[0].text }}"
    )
    assert made.render([parts, call, {"role": "tool", "content": "4"}]) == "fx"
