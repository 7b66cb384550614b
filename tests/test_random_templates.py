"""Chat templates assembled from random pieces whose output is known.

The pieces determine what must be supervised: everything the template writes after the header of an answer, up to the
end of the turn, plus the end of sequence if the turn does not end in a token that ends it.
"""

import json
import random
from dataclasses import dataclass

import pytest
from conftest import meanings
from test_rendering import changed, supervised, turn
from transformers import PreTrainedTokenizerFast

from loratune.codes import Code
from loratune.data.formats import Conversation, Message
from loratune.data.rendering import Renderer
from loratune.errors import DataError

EOS, END = "<|endoftext|>", "<|end|>"
SPECIAL = (EOS, END, "<|system|>", "<|user|>", "<|assistant|>")
HEADERS = ("<|assistant|>", "<|assistant|>\n", "### Assistant:\n", "<assistant>", "[A] ", "<|system|>assistant\n")
USERS = (("<|user|>", "\n"), ("### User:\n", "\n\n"), ("<user>", "</user>"), ("[INST] ", " [/INST]"), ("<|user|>", END))
BEFORE = ("", "", "", "<answer>", '"', "Answer: ", "<a>\n")
CLOSINGS = (
    "", "\n", "</answer>", f"</answer>{EOS}", f"</answer>\n{EOS}\n", END, f"{END}\n", EOS, f" {EOS}", f"{END}{EOS}",
    f"{END}\n{EOS}", f"</assistant>{END}\n", '"', "***\n", f"{EOS}</answer>\n", f"{END}</answer>\n", "<|user|>", "\n\n",
)  # fmt: skip
FOOTERS = ("", "", "", "\n", EOS, "</conversation>", "<|system|>", "### ")
STYLES = ("text", "text", "text", "joined", "variable", "macro", "tight", "numbered")
CONTENTS = (
    "four", "Paris.\n\nYes!", 'He said "no"\tand left', "„Straße“ 🙂", "  indented\n", "x", "assistant",
    "a < b && c > d", "</answer>", "back\\slash", "### User:\n",
)  # fmt: skip


def literal(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


@dataclass(frozen=True)
class Pieces:
    """A template: what it writes before and after contents, and how its source is written.

    asks: how it prompts for an answer: `flag` (writes the header), `never`, `always` (after any message), `think` and
    `thought` (the header, and reasoning that is open or closed). last_closing: the closing of the last message.
    """

    bos: str
    user: tuple[str, str]
    header: str
    before: str
    filter: str
    closing: str
    last_closing: str
    footer: str
    asks: str
    system: str
    style: str
    marks: bool

    @classmethod
    def drawn(cls, draw: random.Random) -> "Pieces":
        closing, style = draw.choice(CLOSINGS), draw.choice(STYLES)
        varied = draw.random() < 0.15
        return cls(
            bos=draw.choice(("", "", "Dialogue:\n", "<|system|>")),
            user=draw.choice(USERS),
            header=draw.choice(HEADERS),
            before=draw.choice(BEFORE),
            filter=draw.choice(("", "", "", "|trim", "|tojson")),
            closing=closing,
            last_closing=draw.choice(CLOSINGS) if varied else closing,
            footer=draw.choice(FOOTERS),
            asks=draw.choice(("flag", "flag", "flag", "never", "always", "think", "thought")),
            system=draw.choice(("turn", "apart", "merged", "default")),
            style=style,
            marks=style != "macro" and draw.random() < 0.15,
        )

    @property
    def prompting(self) -> str:
        """The text that prompts for an answer."""
        more = {"think": "<think>\n", "thought": "<think>\n\n</think>\n\n", "never": None}.get(self.asks, "")
        return "" if more is None else self.header + more

    def source(self) -> str:
        """The Jinja source of the template."""
        content = f"message.content{self.filter}"
        ends = f"({literal(self.last_closing)} if loop.last else {literal(self.closing)})"
        before, after = literal(self.header + self.before), ends
        answer = {
            "joined": f"{{{{ {before} + ({content}) + {after} }}}}",
            "variable": f"{{% set told = ({content}) + {after} %}}{{{{ {before} }}}}{{{{ told }}}}",
            "macro": f"{{{{ answer({content}, {after}) }}}}",
        }.get(self.style, f"{{{{ {before} }}}}{{{{ {content} }}}}{{{{ {after} }}}}")
        if self.marks:
            answer = f"{{{{ {literal(self.header)} }}}}{{% generation %}}{{{{ {literal(self.before)} }}}}"
            answer += f"{{{{ {content} }}}}{{{{ {after} }}}}{{% endgeneration %}}"
        user = f"{{{{ {literal(self.user[0])} }}}}{{{{ message.content }}}}{{{{ {literal(self.user[1])} }}}}"
        system = "{{ '[S]' }}{{ message.content }}{{ '[/S]\\n' }}"
        head, loop = f"{{{{ {literal(self.bos)} }}}}", "messages"
        if self.system == "apart":
            head += "{% if messages[0].role == 'system' %}{{ '[S]' + messages[0].content + '[/S]\\n' }}"
            head += "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
            loop = "rest"
        elif self.system == "merged":
            head += "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
            head += "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
            loop = "rest"
            first = "{% if loop.first %}{{ first }}{% endif %}"
            user = user.replace("{{ message.content }}", first + "{{ message.content }}")
        elif self.system == "default":
            head += "{% if messages[0].role != 'system' %}{{ '[S]Be good.[/S]\\n' }}{% endif %}"
        turns = f"{{% if message.role == 'user' %}}{user}{{% elif message.role == 'system' %}}{system}"
        turns += f"{{% else %}}{answer}{{% endif %}}"
        if self.style == "macro":
            head = f"{{% macro answer(said, end) %}}{{{{ {before} + said + end }}}}{{% endmacro %}}{head}"
        if self.style == "numbered":
            head = f"{{{{ messages|length }}}}\n{head}"
        body = f"{{% for message in {loop} %}}{turns}{{% endfor %}}"
        if self.style == "tight":
            body = body.replace("{% ", "{%- ").replace(" %}", " -%}\n   ")
        asked = f"{{{{ {literal(self.prompting)} }}}}"
        footer = f"{{{{ {literal(self.footer)} }}}}"
        if self.asks == "always":
            return head + body + asked
        if self.asks == "never":
            return head + body + footer
        return f"{head}{body}{{% if add_generation_prompt %}}{asked}{{% else %}}{footer}{{% endif %}}"

    def written(self, content: str) -> str:
        """The content of an answer as the template writes it."""
        return {"|trim": content.strip(), "|tojson": json.dumps(content, ensure_ascii=False)}.get(self.filter, content)

    def answer(self, content: str, last: bool) -> str:
        """The supervised text of an answer: up to the end of its turn, without trailing space and anything after
        EOS."""
        written, closing = self.written(content), self.last_closing if last else self.closing
        over = closing.find(EOS)
        return self.before + (written + closing[: over + len(EOS)] if over >= 0 else (written + closing).rstrip())


def ended(text: str) -> str:
    """The last answer with the end of sequence appended, unless it already ends in a token that ends it."""
    return text if text.endswith(SPECIAL) else text + EOS


def chat(draw: random.Random) -> list[Message]:
    messages = [turn("system", "Be brief.")] if draw.random() < 0.3 else []
    for _ in range(draw.choice((1, 1, 2, 3))):
        messages += [turn("user", draw.choice(CONTENTS)), turn("assistant", draw.choice(CONTENTS))]
    return messages


def expected(pieces: Pieces, messages: list[Message]) -> list[str]:
    """The supervised texts."""
    texts = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            last = number == len(messages) - 1
            text = pieces.answer(message["content"], last)
            text = ended(text) if last else text
            if pieces.asks == "never" and not pieces.marks:
                text = pieces.header.removeprefix(pieces.footer) + text
            if pieces.asks == "think" and last:
                text = f"\n</think>\n\n{text}"
            texts.append(text)
    return texts


@pytest.mark.parametrize(
    ("seed", "templates"), [(0, 25), *(pytest.param(seed, 80, marks=pytest.mark.slow) for seed in range(4))]
)
def test_answers_are_supervised_as_the_template_writes_them(
    seed: int, templates: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    draw, refused, rows = random.Random(seed), 0, 0
    for _ in range(templates):
        pieces = Pieces.drawn(draw)
        renderer = Renderer(changed(tokenizer, chat_template=pieces.source()))
        for _ in range(3):
            messages = chat(draw)
            rows += 1
            try:
                row = renderer.row(Conversation("rows:1", tuple(messages)))
            except DataError as error:
                ((code, where, _),) = meanings(error)
                assert where == "rows:1" and code.startswith("template."), error
                refused += 1
                continue
            note = (pieces, messages, pieces.source(), tokenizer.decode(row.ids))
            assert supervised(tokenizer, row) == expected(pieces, messages), note
            prompt = renderer.prompt(messages[:-1])
            assert row.answer == len(prompt) and row.ids[: len(prompt)] == prompt, note
            assert row.labels[-1] == row.ids[-1] and row.ids[-1] in renderer.end_ids, note
    assert refused < rows / 10


FOR, ASK = "{% for m in messages %}", "{% if add_generation_prompt %}<|assistant|>{% endif %}"
USER = "{% if m.role == 'user' %}<|user|>{{ m.content }}\n{% else %}<|assistant|>"
TWO = (turn("user", "q1"), turn("assistant", "one"), turn("user", "q2"), turn("assistant", 'say "x"\nnow'))
AS_JSON = '"say \\"x\\"\\nnow"'


@pytest.mark.parametrize(
    ("template", "expected", "ends"),
    [
        (
            f"{FOR}{USER}<answer>{{{{ m.content }}}}</answer>{EOS}\n{{% endif %}}{{% endfor %}}{ASK}",
            [f"<answer>one</answer>{EOS}", f'<answer>say "x"\nnow</answer>{EOS}'],
            [EOS],
        ),
        (
            f"{FOR}{USER}<answer>{{{{ m.content }}}}</answer>\n{{% endif %}}{{% endfor %}}{ASK}",
            ["<answer>one</answer>", f'<answer>say "x"\nnow</answer>{EOS}'],
            [EOS],
        ),
        (
            f"{FOR}{USER}{{{{ m.content|tojson }}}}{END}\n{{% endif %}}{{% endfor %}}{ASK}",
            [f'"one"{END}', f"{AS_JSON}{END}"],
            [EOS, END],
        ),
        (
            f"{FOR}{USER}{{{{ m.content }}}}{END}{EOS}\n{{% endif %}}{{% endfor %}}{ASK}",
            [f"one{END}{EOS}", f'say "x"\nnow{END}{EOS}'],
            [EOS],
        ),
        (
            f"{FOR}{USER}{{{{ m.content }}}}{{% if loop.last %}}{EOS}{{% else %}}{END}{{% endif %}}\n{{% endif %}}"
            f"{{% endfor %}}{ASK}",
            [f"one{END}", f'say "x"\nnow{EOS}'],
            [EOS, END],
        ),
        (
            "{% for i in range(0, messages|length, 2) %}<|user|>{{ messages[i].content }}\n"
            "{% if i + 1 < messages|length %}"
            f"<|assistant|>{{{{ messages[i + 1].content }}}}</a>{END}\n{{% endif %}}{{% endfor %}}{ASK}",
            [f"one</a>{END}", f'say "x"\nnow</a>{END}'],
            [EOS, END],
        ),
        (
            f"{{% macro say(m) %}}{USER}{{{{ m.content }}}}</a>{END}\n{{% endif %}}{{% endmacro %}}"
            f"{FOR}{{{{ say(m) }}}}{{% endfor %}}"
            "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
            [f"one</a>{END}", f'say "x"\nnow</a>{END}'],
            [EOS, END],
        ),
    ],
    ids=["text and EOS", "text", "JSON", "a token and EOS", "the last one otherwise", "pairs", "a macro"],
)
def test_supervised_text_and_end_tokens_follow_the_template(
    template: str, expected: list[str], ends: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    renderer = Renderer(changed(tokenizer, chat_template=template))
    row = renderer.row(Conversation("", TWO))
    assert supervised(tokenizer, row) == expected
    assert [tokenizer.decode([number]) for number in renderer.end_ids] == ends
    prompt = renderer.prompt(TWO[:3])
    assert row.prompt == prompt == row.ids[: len(prompt)]
    completion = row.ids[len(prompt) :]
    assert not set(completion[:-1]) & set(renderer.end_ids)  # `generate` does not stop before the end of the answer


@pytest.mark.parametrize(
    ("template", "code", "detail"),
    [
        (
            f"{{% for m in messages|reverse %}}{USER}{{{{ m.content }}}}{END}{{% endif %}}{{% endfor %}}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            Code.TEMPLATE_ANSWER,
            "message 2 (assistant)",
        ),
        (
            f"{{{{ messages|length }}}}{FOR}{USER}{{{{ m.content }}}}{END}{{% endif %}}{{% endfor %}}"
            "{% if add_generation_prompt %}<|assistant|><assistant>{% endif %}",
            Code.TEMPLATE_ANSWER,
            "ends the prompt in '<assistant>', which it does not write in the answer of message 2",
        ),
        (
            f"{FOR}{USER}{{{{ m.content|upper }}}}{END}{{% endif %}}{{% endfor %}}{ASK}",
            Code.TEMPLATE_ANSWER,
            "message 2",
        ),
        (f"{FOR}{USER}{{{{ m.content[:2] }}}}{END}{{% endif %}}{{% endfor %}}{ASK}", Code.TEMPLATE_ANSWER, "message 2"),
    ],
    ids=["another header", "a tag that is no reasoning", "other letters", "a part"],
)
def test_templates_that_alter_answers_are_refused(
    template: str, code: Code, detail: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    renderer = Renderer(changed(tokenizer, chat_template=template))
    with pytest.raises(DataError) as caught:
        renderer.row(Conversation("rows:7", (turn("user", "q"), turn("assistant", "words"))))
    assert meanings(caught.value) == [(code, "rows:7", "data.chat_template")] and detail in str(caught.value)
