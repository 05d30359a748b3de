#!/usr/bin/env python3
"""The stories that the tiny models learn from: requests for SmolLM2-135M-Instruct, and which of its answers stay.

    models/corpus.py requests 15104 >build/requests.jsonl
    ./run models/SmolLM2-135M-Instruct.Q4_1.safetensors --prompts build/requests.jsonl \\
        --parallel 64 -c 512 >build/answers.jsonl
    models/corpus.py filter build/answers.jsonl >build/corpus.txt

The corpus is text: stories, each followed by an empty line.
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

WHO = (  # noqa: SIM905
    "a little girl named Lily|a boy named Tom|a small brown dog|a shy rabbit|an old turtle|a young fox|"
    "a tiny mouse|a gray cat|a baby elephant|a kind grandmother|a farmer named Joe|a clever crow|a sleepy bear|"
    "a duck named Daisy|a brave ant|a girl named Mia and her brother Ben|two best friends, Anna and Sam|"
    "a lonely robot|a little owl|a hungry squirrel|a boy named Max and his father|a frog named Fred|"
    "a white horse|a baby bird|a busy bee|a baker named Rosa|a teacher named Mr. Hill|a small dragon|"
    "a friendly whale|a hedgehog named Pip|a girl named Sue|a boy named Leo|a fisherman|a little star|a snowman|"
    "a puppy and a kitten|a mother hen|a monkey named Momo|a girl named Zoe and her mother|a red bird"
).split("|")
WHERE = (  # noqa: SIM905
    "in the forest|by the river|in the park|at the beach|on a farm|in the garden|at school|in a small house|"
    "on a hill|at the market|in the kitchen|under a big tree|on a boat|in the snow|at the lake|in a cave|"
    "in the city|on the playground|in a barn|at the library|in the mountains|on an island|in a toy shop|"
    "at a birthday party|near the old bridge|in the attic|in a meadow full of flowers|on a rainy day at home|"
    "at night under the stars|on a train"
).split("|")
WHAT = (  # noqa: SIM905
    "a red ball|a lost key|a blue hat|a big cake|a broken toy|a yellow kite|a warm blanket|a shiny stone|"
    "an apple|a small boat|a letter|a drum|a book|a seed|a pair of shoes|a jar of honey|a lamp|a bell|"
    "an umbrella|a basket of berries|a map|a balloon|a wooden box|a cookie|a feather|a flower|a bucket|a rope|"
    "a puddle|a bicycle|a scarf|a mirror|a puzzle|a carrot|a big box|a swing|a nest|a coin|a song|a picture"
).split("|")
HOW = (  # noqa: SIM905
    "Someone helps a friend.|Somebody is afraid at first and becomes brave.|Something is lost and found again.|"
    "Two friends share.|Somebody learns to say sorry.|There is a surprise at the end.|"
    "Somebody tries again and again.|A new friend comes.|Somebody tells the truth.|It ends with a hug.|"
    "Somebody is sad and then happy.|They find a way together.|Somebody learns something new.|"
    "Somebody is very kind.|It begins with a storm.|Something funny happens.|Somebody has to wait.|"
    "Somebody makes a gift.|They go home at the end.|Somebody asks for help."
).split("|")
SYSTEM = "You are a kind grandmother. You tell short stories to small children. "
SYSTEM += "You use only simple words and short sentences."

TYPOGRAPHY = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2014: " - ", 0x2013: " - "}
NO_STORY = re.compile(r"[^\n -~]|[\d*#_\[\]()<>/\\{}|=+&%$@~^`]")  # lists, markup, stage directions, other scripts
TO_THE_READER = re.compile(r"(I|I'm|I'll|Hello|Hey|Dear|Ladies|Ah|Oh|My|Welcome|As I|In this|The story|The tale)\b")
SENTENCE_END = re.compile(r'[.!?]"?(?=\s|$)')
WORD = re.compile(r"[A-Za-z']+")
SHORTEST = 60  # words
RARE = 4  # a word that fewer stories have is not learned from so few: its stories go


def requests(count: int) -> Iterator[str]:
    rng = random.Random(1)
    for seed in range(count):
        ask = f"Tell me a story about {rng.choice(WHO)} and {rng.choice(WHAT)} {rng.choice(WHERE)}. {rng.choice(HOW)}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ask}]
        temperature = 0.4 + 0.1 * (seed % 3)
        request = {"messages": messages, "seed": seed, "n": 160, "temperature": temperature, "repeat_penalty": 1.1}
        yield json.dumps(request)


def whole_sentences(text: str) -> str:
    """Without the sentence, and the speech, that the limit of tokens has cut off."""
    text = text[: list(SENTENCE_END.finditer(text))[-1].end()] if SENTENCE_END.search(text) else ""
    return whole_sentences(text[: text.rindex('"')]) if text.count('"') % 2 else text


def story(answer: str) -> str:
    """The answer as a story in plain ASCII; empty where it is none."""
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", answer.translate(TYPOGRAPHY))).strip()
    if NO_STORY.search(text) or TO_THE_READER.match(text):
        return ""
    text = whole_sentences(text)
    words = text.split()
    sentences = SENTENCE_END.split(text)  # with the space before: the first may come back, as a refrain
    phrases = Counter(zip(*(words[i:] for i in range(5)), strict=False))
    told_once = len(sentences) == len({*sentences}) and max(phrases.values(), default=0) <= 2
    return text if len(words) >= SHORTEST and told_once else ""


def filtered(answers: Iterable[str]) -> list[str]:
    stories = [text for text in dict.fromkeys(map(story, answers)) if text]
    known = Counter(word for text in stories for word in {*WORD.findall(text.lower())})
    return [text for text in stories if all(known[word] >= RARE for word in WORD.findall(text.lower()))]


def read_answers(paths: list[str]) -> Iterator[str]:
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                yield json.loads(line).get("text", "")  # a request that went wrong has "error" instead
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not an answer of ./run --prompts: {error}") from error


def main(argv: list[str]) -> int:
    try:
        match argv:
            case ["requests", count] if count.isdecimal():
                sys.stdout.writelines(f"{request}\n" for request in requests(int(count)))
            case ["filter", _, *_]:
                sys.stdout.writelines(f"{text}\n\n" for text in filtered(read_answers(argv[1:])))
            case _:
                print("usage: models/corpus.py requests COUNT | filter ANSWERS.jsonl ...", file=sys.stderr)
                return 2
    except (OSError, ValueError) as error:
        print(f"corpus.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
