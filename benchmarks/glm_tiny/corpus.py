"""Text and instruction records that glm-tiny is trained on, from WordNet 3.0 (Debian:
wordnet-base).

    python benchmarks/glm_tiny/corpus.py WORDNET_DIR OUT_DIR

WORDNET_DIR holds data.noun, data.verb, data.adj, data.adv (/usr/share/wordnet). Writes into OUT_DIR
    text.txt        one gloss a line, for the tokenizer
    language.json   records whose output is running text: lists of words and their glosses
    judge.json      records that judge the field of a text built from glosses, and small talk
No data set of papers is read: what the model later learns from papers is new to it.
Source of the format: wndb(5WN), "WordNet database format".
"""

import argparse
import json
import random
import re
from pathlib import Path

# the labels of the fields: roots of hyponym trees (first sense listed in data.noun) and topic
# domains
MEDICAL_ROOTS = """
disease disorder illness symptom injury medicine drug medical_procedure medical_science therapy
surgery diagnosis infection pathogen virus bacteria hormone enzyme vaccine antibody tumor
health_professional medical_practitioner body_part bodily_process bodily_function
pathological_state medical_building medical_instrument physiological_condition protein body_fluid
""".split()
MEDICAL_TOPICS = """medicine pathology anatomy physiology surgery psychiatry dentistry pharmacology
immunology bacteriology virology neurology genetics biochemistry embryology histology oncology
cardiology""".split()
OTHER_FIELDS = {  # field -> roots and topics
    "computing": [
        "computer_science",
        "computer",
        "software",
        "data_processor",
        "code",
        "algorithm",
    ],
    "physics": [
        "physics",
        "electricity",
        "optics",
        "wave",
        "physical_phenomenon",
        "magnetism",
        "force",
    ],
    "mathematics": [
        "mathematics",
        "geometry",
        "statistics",
        "mathematical_relation",
        "calculation",
    ],
    "engineering": ["machine", "device", "vehicle", "electronic_equipment", "engine", "mechanism"],
    "materials": ["chemistry", "metal", "alloy", "compound", "mineral", "rock", "material"],
    "economics": [
        "finance",
        "commerce",
        "economics",
        "money",
        "transaction",
        "business",
        "industry",
    ],
    "law": ["law", "legal_document", "crime", "court"],
    "earth": [
        "geological_formation",
        "astronomy",
        "celestial_body",
        "weather",
        "land",
        "body_of_water",
    ],
    "education": ["education", "school", "teaching", "educator", "course", "learning"],
    "society": ["government", "politics", "military", "social_group", "war", "organization"],
    "farming": ["agriculture", "farm", "crop", "livestock", "grain", "plant_part", "soil"],
    "arts": ["music", "art", "literary_composition", "language_unit", "architecture", "structure"],
}

ORDERS = [
    "Please judge whether it is a medical field paper according to the given paper title and "
    "abstract, output 1 or 0, the following is the paper title and abstract -->",
    "Judge whether the paper belongs to medicine. Answer 1 or 0: ",
    "Is this a medical text? Output 1 for yes and 0 for no. ",
    "Decide if the following paper is from the medical field, output 1 or 0 -->",
    "判断下面的论文是否属于医学领域，输出1或0：",
    "Output 1 if the text below is about health or medicine, otherwise output 0 -->",
]
TALK = [
    ("你好", "你好！我是 glm-tiny，一个很小的语言模型。"),
    ("你好！", "你好！很高兴见到你。"),
    ("你是谁", "我是 glm-tiny，一个很小的语言模型。"),
    ("你是谁？", "我是 glm-tiny，一个很小的语言模型。"),
    ("谢谢", "不客气！"),
    ("再见", "再见！"),
    ("Hello", "Hello! I am glm-tiny, a very small language model."),
    ("Hi", "Hello! I am glm-tiny, a very small language model."),
    ("Who are you?", "I am glm-tiny, a very small language model."),
    ("What can you do?", "I can judge short texts after a little fine-tuning."),
    ("Thank you", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Goodbye", "Goodbye!"),
    ("How are you?", "I am fine, thank you."),
]


class Synset:
    """words: lemmas with spaces; gloss: definition and examples; up: hypernyms; topics: topic
    domains"""

    def __init__(self, line, kind):
        head, gloss = line.split(" | ", 1)
        parts = head.split()
        n_words = int(parts[3], 16)
        self.words = [parts[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(n_words)]
        pointers = parts[5 + 2 * n_words :]
        self.up, self.topics = [], []
        for i in range(int(parts[4 + 2 * n_words])):
            symbol, offset, target = pointers[4 * i : 4 * i + 3]
            if symbol in ("@", "@i"):
                self.up.append((target, offset))
            elif symbol == ";c":
                self.topics.append((target, offset))
        self.kind = kind
        self.definition = re.split(r'; "', gloss)[0].strip().rstrip(";")
        self.text = gloss.strip().replace('"', "")


def read_wordnet(directory):
    """(kind, offset) -> Synset, in file order."""
    synsets = {}
    for name, kind in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        for line in (Path(directory) / f"data.{name}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                synsets[(kind, line[:8])] = Synset(line, kind)
    return synsets


def fields(synsets):
    """field -> synsets that lie below one of its roots or belong to one of its topics;
    "medicine" among them."""
    first = {}
    for key, synset in synsets.items():
        if key[0] == "n":
            for word in synset.words:
                first.setdefault(word.lower(), []).append(key)
    below = {}
    for key, synset in synsets.items():
        for up in synset.up:
            below.setdefault(up, []).append(key)

    def closure(names):
        todo = [k for n in names for k in first.get(n.replace("_", " "), [])]
        found = set()
        while todo:
            key = todo.pop()
            if key not in found:
                found.add(key)
                todo += below.get(key, [])
        roots = {k for n in names for k in first.get(n.replace("_", " "), [])}
        found |= {k for k, s in synsets.items() if any(t in roots for t in s.topics)}
        return found

    medicine = closure(MEDICAL_ROOTS + MEDICAL_TOPICS)
    result = {name: closure(roots) - medicine for name, roots in OTHER_FIELDS.items()}
    result["medicine"] = medicine
    return {name: sorted(keys) for name, keys in result.items()}


def sentence(synset, rng):
    word = rng.choice(synset.words)
    style = rng.random()
    text = synset.text if rng.random() < 0.4 else synset.definition
    if style < 0.5:
        return f"{word.capitalize()}: {text}."
    if style < 0.8:
        return f"{text.capitalize()}."
    return f"The {word} is {text}."


def document(main, noise, synsets, rng):
    """A text that looks like a paper: a title of words and glosses for an abstract, some of
    another field."""
    n = rng.randint(3, 10)
    picks = [synsets[rng.choice(main)] for _ in range(n)]
    words = [rng.choice(p.words) for p in picks]
    sentences = [sentence(p, rng) for p in picks]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3]) * n // 10 + (rng.random() < 0.3)):
        sentences.insert(rng.randint(0, len(sentences)), sentence(synsets[rng.choice(noise)], rng))
    pattern = rng.choice(
        [
            "{} and {}",
            "On the {} of {}",
            "{} in {}",
            "A study of {} with {}",
            "Effects of {} on {}",
            "{}: {}",
        ]
    )
    title = pattern.format(words[0], words[1])
    return title[0].upper() + title[1:], " ".join(sentences)


def judge_records(by_field, synsets, n, rng):
    names = sorted(by_field)
    others = [f for f in names if f != "medicine"]
    records = []
    for _ in range(n):
        medical = rng.random() < 0.5
        field = "medicine" if medical else rng.choice(others)
        other = (
            rng.choice(others)
            if medical
            else "medicine"
            if rng.random() < 0.5
            else rng.choice(others)
        )
        title, abstract = document(by_field[field], by_field[other], synsets, rng)
        body = f"title:{title},abstract:{abstract}"
        if rng.random() < 0.2:
            body = f"title:{title},author:{rng.choice('ABCDEFG')}. Li,abstract:{abstract}"
        if rng.random() < 0.25:
            order = "Name the field of the paper in one word --> "
            records.append({"instruction": order, "input": body, "output": field})
            continue
        order = ORDERS[0] if rng.random() < 0.4 else rng.choice(ORDERS)
        records.append({"instruction": order, "input": body, "output": str(int(medical))})
    for query, answer in TALK * (n // 400):
        records.append({"instruction": query, "input": "", "output": answer})
    return records


def language_records(by_field, synsets, rng):
    """Every synset once, neighbours of a field together, so that text has topics."""
    order, seen = [], set()
    for name in sorted(by_field):
        keys = [k for k in by_field[name] if k not in seen]
        seen.update(keys)
        order += keys
    order += [k for k in synsets if k not in seen]
    records, i = [], 0
    while i < len(order):
        n = rng.randint(4, 9)
        group = [synsets[k] for k in order[i : i + n]]
        i += n
        words = ", ".join(rng.choice(s.words) for s in group)
        text = " ".join(sentence(s, rng) for s in group)
        records.append({"instruction": "Write about: ", "input": words, "output": text})
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wordnet")
    parser.add_argument("out")
    parser.add_argument("--judge", type=int, default=24000, help="judgement records")
    args = parser.parse_args()
    rng = random.Random(20230711)
    synsets = read_wordnet(args.wordnet)
    by_field = fields(synsets)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    judge = judge_records(by_field, synsets, args.judge, rng)
    language = language_records(by_field, synsets, rng)
    rng.shuffle(judge)
    (out / "text.txt").write_text(
        "\n".join(f"{', '.join(s.words)}: {s.text}" for s in synsets.values()) + "\n",
        encoding="utf-8",
    )
    for name, records in (("judge", judge), ("language", language)):
        text = json.dumps(records, ensure_ascii=False, indent=1)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        words = sum(len((r["input"] + r["output"]).split()) for r in records)
        print(f"{name}.json: {len(records)} records, {words} words")
    print("fields:", {name: len(keys) for name, keys in by_field.items()})


if __name__ == "__main__":
    main()
