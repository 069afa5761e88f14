"""Which answers the list of stop words decides: those judged otherwise by its first version than by today's.

    python benchmarks/stop_words.py MODEL FACTS [--rows 2000] [--gguf FILE]

Decodes 8 tokens after each prompt, whatever they are, and judges them by both versions. Version 1 had words that deny,
restrict, compare or place beside, and read on behind the end of a sentence. MODEL is a folder; with --gguf a folder
that holds that file. FACTS is in any form that `load_pool` reads. Printed are counts, and every answer that changed.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retention_bench.facts import FactSet, first_tokens, load_pool, token_text
from retention_bench.scoring import MAX_DECODED_TOKENS, STOP_WORDS, RetentionHFLM, judge_ids, scorable
from retention_bench.scoring.metric import is_special_token
from retention_bench.scoring.stop_words import STOP_WORDS_VERSION, is_stop_text

VERSION_1 = STOP_WORDS | set(
    """
    other another neither no but nor yet if than while although though unless until whereas whether since about against
    between among amongst before after above below over under up down out off without along behind beyond near around
    toward towards through per despite could should would might must ought cannot not too just only ever never once
    however perhaps rather almost more most less least much many few several 't 'd n't
    aren couldn didn doesn hadn hasn isn shouldn wasn weren wouldn
    """.split()
)
"""The first list had all of today's words, and these."""


class Decoded(RetentionHFLM):
    """Answers of a fixed length."""

    def goes_on(self, tokens, length):
        """Whether there is room."""
        return len(tokens) < MAX_DECODED_TOKENS


def content_by_version_1(ids, tokenizer):
    """The first content token by the first list, or None."""
    for token in ids:
        if is_special_token(token, tokenizer):
            return None
        text = token_text(token, tokenizer)
        word = text.strip().casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        if not (is_stop_text(text) or word in VERSION_1):
            return token
    return None


def main() -> None:
    """Ask the model and print what changed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--gguf")
    given = parser.parse_args()
    more = {"gguf_file": given.gguf} if given.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(given.model, **more)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, **more).eval()
    lm = Decoded(model, tokenizer)
    facts, _ = scorable(FactSet.of(list(load_pool(given.facts).facts)[: given.rows]), tokenizer, context=lm.max_length)
    prompts = {fact.id: lm.prompt_ids(fact.question) for fact in facts}
    answers = lm.answer(prompts.values())
    flips: dict[str, list[str]] = {"hit -> miss": [], "miss -> hit": [], "a miss for another reason": []}
    hits = [0, 0]
    for fact in facts:
        ids = answers[prompts[fact.id]]
        tokens = content_by_version_1(ids, tokenizer), judge_ids(ids, fact.target_true, tokenizer).content_token
        old, new = (token is not None and token == first_tokens(fact.target_true, tokenizer).token for token in tokens)
        hits[0], hits[1] = hits[0] + old, hits[1] + new
        if tokens[0] != tokens[1]:
            names = [repr("" if token is None else token_text(token, tokenizer)) for token in tokens]
            which = "a miss for another reason" if old == new else "hit -> miss" if old else "miss -> hit"
            said = f"{fact.question} |{tokenizer.decode(ids)!r} (true: {fact.target_true}; {names[0]} -> {names[1]})"
            flips[which].append(said)
    name = given.gguf or Path(given.model).name
    print(f"{name}, {len(facts)} facts; answered: version 1 {hits[0]}, version {STOP_WORDS_VERSION} {hits[1]}")
    for which, said in flips.items():
        print(f"{which}: {len(said)}")
        print("".join(f"  {line}\n" for line in said), end="")


if __name__ == "__main__":
    main()
