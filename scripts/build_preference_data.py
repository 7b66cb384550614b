"""Build the rows of configs/preferences: what a noun means, by WordNet's definition and by a model's own answer.

    python scripts/build_preference_data.py PATH/TO/data.noun models/SmolLM2-135M-Instruct [DEST]

The definitions are those of the quickstart (see build_quickstart_data.py for where data.noun comes from). Chosen is the
definition of a noun, in one short sentence; rejected is what the model answers to the question by itself, greedily, up
to `MOST_TOKENS` tokens. So before training the model prefers the rejected answer, as it is its own. The same data.noun
and model give the same rows, up to the rounding of the machine.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from build_quickstart_data import Noun, choose, licence, parse
from transformers import AutoModelForCausalLM, AutoTokenizer

TRAIN_ROWS, EVAL_ROWS, BATCH, MOST_TOKENS = 128, 48, 16, 32
QUESTION = "What does the word '{word}' mean?"


def sentence(definition: str) -> str:
    """A definition with a capital letter and a full stop."""
    return f"{definition[0].upper()}{definition[1:]}."


def word(noun: Noun) -> str:
    """The first of its words in alphabetical order: WordNet's own order is not kept by `Noun`."""
    return min(noun.words)


def answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> Iterator[str]:
    """The model's own answers, to the last whole sentence if there is one."""
    tokenizer.padding_side = "left"
    for start in range(0, len(questions), BATCH):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + BATCH]]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(
                **given, max_new_tokens=MOST_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        for row in ids[:, given["input_ids"].shape[1] :]:
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            yield text[: text.rfind(".") + 1] or text


def main() -> None:
    """Write train.jsonl, eval.jsonl and LICENSE.wordnet."""
    parser = argparse.ArgumentParser(description="Build the rows of configs/preferences.")
    parser.add_argument("data_noun", type=Path, help="WordNet's data.noun")
    parser.add_argument("model", type=Path, help="the directory of the model")
    default = Path(__file__).resolve().parent.parent / "configs" / "preferences"
    parser.add_argument("dest", type=Path, nargs="?", default=default, help="directory (default: %(default)s)")
    arguments = parser.parse_args()
    lines = arguments.data_noun.read_text(encoding="utf-8").splitlines()
    parts = choose(noun for noun in map(parse, lines) if noun is not None)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    arguments.dest.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        nouns = parts[name][:count]
        questions = [QUESTION.format(word=word(noun)) for noun in nouns]
        rows = [
            {"prompt": [{"role": "user", "content": question}], "chosen": sentence(noun.definition), "rejected": answer}
            for noun, question, answer in zip(nouns, questions, answers(model, tokenizer, questions), strict=True)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.dest / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (arguments.dest / "LICENSE.wordnet").write_text(licence(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
