"""The neutral judge: `python -P -m first_hour.score MODEL ADAPTER ROWS [--format chat] [--merged MODEL] [--brief]`.

Stock transformers and PEFT in float32, one row at a time. Prints JSON:

    exact       the part of the rows whose most probable answer, up to the first end token, is the expected one
    nats        the loss of a row's answer and its end token
    divergence  KL(base ‖ adapter), nats per token of the base's own answers to everyday instructions
    agreement   the part of these tokens where both have the same most probable one

--format: how the rows are asked, which is how the tool trained on them: `plain`, as they are; `spaced`, with a
space after the prompt; `chat`, in the model's chat template with its system message; `chatml`, without that message.
--merged: instead, how far this model is from base and adapter: KL(adapter ‖ merged), and KL(adapter ‖ base) to compare
it with, at the ends of the prompts. --brief: without the instructions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peers.evaluate import checked

INSTRUCTIONS = Path(__file__).parents[2] / "loratune" / "data" / "instructions.txt"
ANSWER_TOKENS, ROW_TOKENS = 48, 6


class Judge:
    """A base with an adapter, and its tokenizer."""

    def __init__(self, place: str, adapter: str, form: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        base = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, adapter).eval()
        checked(self.model, adapter)
        self.form = form

    def asked(self, text: str, form: str) -> list[int]:
        """A prompt as ids."""
        if form == "spaced":
            text += " "
        if form == "chatml":
            text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        if form == "chat":
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def written(self, prompt: list[int], most: int) -> list[int]:
        """The most probable answer as ids, with its end token if it has one."""
        end = self.tokenizer.eos_token_id
        ids = torch.tensor([prompt])
        found = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=end
        )
        answer: list[int] = found[0, len(prompt) :].tolist()
        return answer

    def log_probabilities(self, ids: list[int], start: int) -> Any:
        """Of each token from `start` on, over the vocabulary."""
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
        return logits.log_softmax(-1)

    def rows(self, rows: list[dict[str, str]]) -> dict[str, float]:
        """`exact` and `nats`."""
        right, nats = 0, 0.0
        for row in rows:
            prompt, expected = self.asked(row["prompt"], self.form), row["completion"].strip()
            text = self.tokenizer.decode(self.written(prompt, ROW_TOKENS), skip_special_tokens=False)
            right += text.split(self.tokenizer.eos_token)[0].strip() == expected
            answer = [
                *self.tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
                self.tokenizer.eos_token_id,
            ]
            found = self.log_probabilities(prompt + answer, len(prompt))
            nats -= found.gather(1, torch.tensor(answer)[:, None]).sum().item()
        return {"exact": right / len(rows), "nats": nats / len(rows)}

    def instructions(self) -> dict[str, float]:
        """`divergence` and `agreement`."""
        divergence, same, tokens = 0.0, 0, 0
        for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
            prompt = self.asked(line, "chat")
            with self.model.disable_adapter():
                answer = self.written(prompt, ANSWER_TOKENS)
                base = self.log_probabilities(prompt + answer, len(prompt))
            own = self.log_probabilities(prompt + answer, len(prompt))
            divergence += (base.exp() * (base - own)).sum().item()
            same += int((base.argmax(-1) == own.argmax(-1)).sum())
            tokens += len(answer)
        return {"divergence": divergence / tokens, "agreement": same / tokens}

    def merged(self, place: str, rows: list[dict[str, str]]) -> dict[str, float]:
        """How far a merged model is from the adapter, and the base from it."""
        ids = [self.asked(row["prompt"], self.form) for row in rows]
        own = [self.log_probabilities([*one, 0], len(one)) for one in ids]
        with self.model.disable_adapter():
            base = [self.log_probabilities([*one, 0], len(one)) for one in ids]
        self.model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        other = [self.log_probabilities([*one, 0], len(one)) for one in ids]

        def mean(found: list[Any]) -> float:
            return float(sum((a.exp() * (a - b)).sum() for a, b in zip(own, found, strict=True))) / len(ids)

        return {"merged": mean(other), "base": mean(base)}


@torch.inference_mode()
def main() -> None:
    """Judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--format", default="plain", choices=["plain", "spaced", "chat", "chatml"])
    parser.add_argument("--merged", default="")
    parser.add_argument("--brief", action="store_true")
    given = parser.parse_args()
    judge = Judge(given.model, given.adapter, given.format)
    rows = [json.loads(line) for line in given.rows.read_text(encoding="utf-8").splitlines()]
    if given.merged:
        print(json.dumps(judge.merged(given.merged, rows)))
    else:
        print(json.dumps(judge.rows(rows) | ({} if given.brief else judge.instructions())))


if __name__ == "__main__":
    main()
