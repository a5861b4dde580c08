# ruff: noqa: SIM905 - word lists are easier to read as text
"""Prompt generators of the demo model: needle in a haystack, key-value retrieval, variable tracking.

    python examples/demo/tasks.py key-value --tokens 32768 > prompt.txt

Pure Python.  A document is a list of words; every word is exactly one token of the demo vocabulary (the
tokenizer lower-cases, and puts one <bos> in front), so a prompt has the number of tokens that was asked for.
"""

from __future__ import annotations

import argparse
import random
from typing import NamedTuple

# Keys are "<adjective> <noun>", 26,376 of them.  These words appear nowhere else in the text.
KEY_ADJECTIVES = """amber azure beige black blue bronze brown copper coral crimson cyan emerald golden green grey
indigo ivory jade lilac magenta maroon navy ochre olive orange pink purple red ruby rusty sapphire scarlet silver
teal turquoise violet white yellow agile ancient bitter blunt bold brave brief bright brisk broad calm candid
careful cheerful clever cold crisp curious daring dark deep dense distant dizzy dusty eager early elegant empty
fading faint fancy fast fearless fierce firm flat fluffy fresh frozen gentle giant glad gloomy graceful grand
happy hardy hasty heavy hidden hollow honest humble hungry icy jolly keen kind large lazy light little lively
lonely loud loyal lucky mellow merry mighty misty modest narrow neat nimble noble odd patient plain polite proud
pure quick quiet rapid rare royal rough round sharp shiny shy silent simple sleepy slim slow small smooth sober
soft solid sour spicy steady steep stormy strong sunny sweet swift tall tame tender tidy tiny wild wise""".split()
KEY_NOUNS = """falcon tiger otter badger beaver bison camel cobra condor coyote crane cricket crow deer dolphin donkey
dragon eagle ferret finch fox frog gazelle gecko giraffe goose gorilla hamster hawk hedgehog heron hippo hornet
hyena ibex iguana jackal jaguar kiwi koala lark lemur leopard lion lizard llama lobster lynx macaw magpie mantis
marmot mole moose moth newt octopus oryx ostrich owl panda panther parrot pelican penguin pigeon pony puffin puma
python quail rabbit raccoon raven robin salmon scorpion seal shark sparrow spider squid stork swan tapir termite
toad toucan trout turtle viper vulture walrus weasel whale wolf wombat yak zebra anchor anvil arrow basket beacon
bell bottle bucket button cabinet candle canyon castle chisel cipher compass cradle crown dagger diamond drum engine
feather flute furnace goblet hammer harbor helmet island kettle ladder lantern magnet marble mirror needle orchid
paddle pebble pendulum piano prism pyramid quiver radar rocket saddle sextant shield signal sphere spindle statue
temple thimble torch trumpet tunnel velvet violin wagon whistle willow window zeppelin comet glacier meadow""".split()

# Words of the filler sentences.
PEOPLE = """teacher farmer doctor baker sailor lawyer painter singer driver writer student gardener nurse pilot judge
tailor miner waiter dancer engineer librarian merchant neighbor soldier captain child stranger visitor traveler
mother father uncle aunt sister brother cousin guest clerk cook guard editor poet actor mayor priest chemist
mechanic plumber carpenter fisherman hunter butcher shepherd postman banker tourist scholar artist builder""".split()
VERBS = """carried found painted repaired cleaned sold bought watched described opened closed moved forgot noticed
admired borrowed returned polished counted measured lifted dropped stored collected packed delivered showed
examined wanted needed received ordered finished started studied discussed ignored praised lost kept washed dried
folded stacked hid covered touched pulled pushed followed remembered mentioned drew copied weighed traded""".split()
THINGS = """table chair book letter newspaper blanket carpet lamp clock picture coat shirt jacket hat glove boot shoe
umbrella bag suitcase box barrel bowl plate cup spoon fork knife bread cheese apple pear plum cherry grape lemon
onion carrot potato cabbage soup cake tea coffee sugar salt flour rice honey butter milk rope wheel cart boat
bicycle car truck ladle pan pot stove pillow curtain sofa shelf drawer desk pencil pen notebook map ticket coin
stamp photo radio camera guitar ball kite doll puzzle broom brush shovel rake hose fence gate brick tile plank nail
screw wire pipe paint glue cloth thread zipper ribbon scarf towel soap bench sign flag poster parcel""".split()
PLACES = """kitchen garden market school station library church museum theater hospital bakery office factory farm barn
cellar attic hallway yard street square park forest valley hill river lake beach village town city airport hotel
restaurant bank shop garage stable mill port pier field orchard courtyard balcony bridge tower cottage cabin
palace campus stadium gallery workshop laundry pharmacy""".split()
TIMES = """yesterday today tonight later earlier afterwards recently finally suddenly eventually meanwhile often
sometimes usually rarely again twice monday tuesday wednesday thursday friday saturday sunday""".split()
MANNERS = """slowly quickly quietly carefully happily gladly sadly calmly badly nicely politely proudly patiently
eagerly easily firmly gently neatly openly secretly boldly warmly kindly loudly""".split()
# Filler templates: a capital letter names the word list that fills the slot.
FILLER = [
    t.split()
    for t in """The P V the T in the L .|One P V the T near the L .|M , the P V one T .
D the P V the T .|In the L , one P V the T .|The P and the P V the T D .|The T was behind the L .
The P from the L V one T M .|After lunch the P V every T in the L .|Nobody at the L V the T before the P did .
D , one T and one T were near the L .|The old T by the L was for the P .
While the P V one T , the P V the T M .""".replace("\n", "|").split("|")
]
SLOTS = {"P": PEOPLE, "V": VERBS, "T": THINGS, "L": PLACES, "D": TIMES, "M": MANNERS}
FUNCTION_WORDS = """the one in near and was from behind after lunch every nobody at before did were by for old while
secret code of is let question what value answer""".split()
SPECIAL_TOKENS = ["<pad>", "<unk>", "<bos>", "<eos>"]
CODE_DIGITS = 4

Key = tuple[str, str]


class Prompt(NamedTuple):
    """A prompt, its expected answer ("4 8 1 5") and its length in tokens (with the <bos> of the tokenizer)."""

    text: str
    answer: str
    tokens: int


def vocabulary() -> list[str]:
    """All tokens of the demo tokenizer, in the order of their ids."""
    words = set(FUNCTION_WORDS).union(KEY_ADJECTIVES, KEY_NOUNS, *SLOTS.values())
    return SPECIAL_TOKENS + list("0123456789.,:?=") + sorted(words)


def random_keys(rng: random.Random, count: int) -> list[Key]:
    """Distinct keys."""
    nouns = len(KEY_NOUNS)
    picks = rng.sample(range(len(KEY_ADJECTIVES) * nouns), count)
    return [(KEY_ADJECTIVES[i // nouns], KEY_NOUNS[i % nouns]) for i in picks]


def random_code(rng: random.Random) -> list[str]:
    """A value: four random digits."""
    return [rng.choice("0123456789") for _ in range(CODE_DIGITS)]


def statement(task: str, key: Key, value: list[str] | Key) -> list[str]:
    """The sentence that says that `key` has `value` (digits, or for variables another key)."""
    if task == "needle":
        return ["The", "secret", "code", "of", *key, "is", *value, "."]
    return ["Let", *key, "=", *value, "."] if task == "variable" else [*key, ":", *value, "."]


def question(task: str, key: Key) -> list[str]:
    """The question for the value of `key`."""
    what = ["secret", "code"] if task == "needle" else ["value"]
    return ["Question", ":", "what", "is", "the", *what, "of", *key, "?", "Answer", ":"]


def reply(code: list[str], chain: list[Key] | None = None) -> list[str]:
    """What the model should write: the variables to follow, if any, the digits and a full stop."""
    return [word for key in chain or [] for word in (*key, "=")] + [*code, "."]


def filler(rng: random.Random, count: int) -> list[list[str]]:
    """Random sentences of `count` words in total (the last sentence is cut to fit)."""
    sentences: list[list[str]] = []
    while count > 0:
        sentence = [rng.choice(SLOTS[word]) if word in SLOTS else word for word in rng.choice(FILLER)]
        if count - len(sentence) < 3:  # no room for another sentence: cut or stretch this one to fit
            sentence = [*[*sentence[:-1], "again", "again", "again"][: count - 1], "."]
        sentences.append([sentence[0].capitalize(), *sentence[1:]])
        count -= len(sentence)
    return sentences


def document(
    rng: random.Random, length: int, statements: list[list[str]], depths: list[float] | None = None
) -> tuple[list[str], list[int]]:
    """`length` words of filler with the statements in their given order, and where each statement starts.

    The depths (0 = start, 1 = end, ascending) say where the statements go; without them the places are random.
    """
    sentences = filler(rng, length - sum(map(len, statements)))
    if depths is None:
        depths = sorted(rng.random() for _ in statements)
    words: list[str] = []
    starts: list[int] = []
    done = 0
    for text, depth in zip(statements, depths, strict=True):
        slot = max(done, round(depth * len(sentences)))
        for sentence in sentences[done:slot]:
            words += sentence
        done = slot
        starts.append(len(words))
        words += text
    for sentence in sentences[done:]:
        words += sentence
    return words, starts


def _prompt(words: list[str], code: list[str]) -> Prompt:
    return Prompt(" ".join(words), " ".join(code), len(words) + 1)


def needle(tokens: int, depth: float, seed: int) -> Prompt:
    """One secret code at `depth` (0 to 1) of a filler text; the question asks for it."""
    rng = random.Random(seed)
    key, code = random_keys(rng, 1)[0], random_code(rng)
    ask = question("needle", key)
    words, _ = document(rng, tokens - 1 - len(ask), [statement("needle", key, code)], [depth])
    return _prompt(words + ask, code)


def key_value(tokens: int, seed: int, density: float = 0.25, depth: float | None = None) -> Prompt:
    """Records "key : value ." scattered in filler; `density` is their share of the text (1: nothing else)."""
    rng = random.Random(seed)
    room = tokens - 1 - len(question("key-value", ("", "")))
    keys = random_keys(rng, max(1, int(room * density) // (4 + CODE_DIGITS)))
    codes = [random_code(rng) for _ in keys]
    target = rng.randrange(len(keys)) if depth is None else round(depth * (len(keys) - 1))
    records = [statement("key-value", key, code) for key, code in zip(keys, codes, strict=True)]
    words, _ = document(rng, room, records)
    return _prompt(words + question("key-value", keys[target]), codes[target])


def variable_tracking(tokens: int, seed: int, chains: int = 4, hops: int = 1, chain: int | None = None) -> Prompt:
    """Chains "Let a = 4 8 1 5 . ... Let b = a ." of `hops` copies; the question asks for the last variable of one."""
    rng = random.Random(seed)
    keys = random_keys(rng, chains * (hops + 1))
    codes = [random_code(rng) for _ in range(chains)]
    names = [keys[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chains)]
    # One round per hop, so that a variable is always defined before it is copied.
    lines = [statement("variable", name[0], code) for name, code in zip(names, codes, strict=True)]
    for hop in range(hops):
        lines += [statement("variable", name[hop + 1], name[hop]) for name in names]
    ask = rng.randrange(chains) if chain is None else chain
    end = question("variable", names[ask][-1])
    words, _ = document(rng, tokens - 1 - len(end), lines)
    return _prompt(words + end, codes[ask])


def grade(completion_text: str, answer: str) -> bool:
    """True if the digits before the first full stop are exactly the answer.

    For a copied variable the model first writes the variables that it follows: "amber falcon = 4 8 1 5 .".
    """
    words = completion_text.split(".")[0].split()
    return "".join(word for word in words if word.isdigit()) == answer.replace(" ", "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a prompt of one of the demo's tasks.")
    parser.add_argument("task", choices=["needle", "key-value", "variables"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    make = {
        "needle": lambda: needle(args.tokens, 0.35, args.seed),
        "key-value": lambda: key_value(args.tokens, args.seed),
        "variables": lambda: variable_tracking(args.tokens, args.seed),
    }
    print(make[args.task]().text)


if __name__ == "__main__":
    main()
