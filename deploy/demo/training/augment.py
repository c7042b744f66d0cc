"""Turns an FAQ entry into the many ways people type it: templates, synonyms, politeness, case, punctuation, typos.
Pure functions of (entry, rng); never returns a held-out phrasing."""

import random
import re

from deploy.demo.training.faq import Entry, normalise

TOPIC_TEMPLATES = (
    "what is {}", "what's {}", "what exactly is {}", "what does {} mean", "what is meant by {}", "explain {}",
    "explain {} to me", "can you explain {}", "could you explain {}", "please explain {}", "define {}",
    "describe {}", "tell me about {}", "tell me something about {}", "what do you know about {}", "{}",
    "what can you tell me about {}", "i want to understand {}", "help me understand {}", "meaning of {}",
    "definition of {}", "how would you describe {}", "how would you define {}", "what do you mean by {}",
    "i do not understand {}", "what about {}", "and what is {}", "do you know what {} is", "what is {} about",
    "can you describe {}", "what is {} in outcrop", "what is the idea of {}", "in short, what is {}",
    "i have a question about {}", "give me a short explanation of {}", "what is {} good for", "info on {}",
)  # fmt: skip
ACTION_TEMPLATES = (
    "how do i {}", "how can i {}", "how to {}", "how would i {}", "how could i {}", "how do you {}", "how do we {}",
    "i want to {}", "i would like to {}", "i need to {}", "can i {}", "is it possible to {}", "help me {}",
    "is there a way to {}", "what is the best way to {}", "what do i do to {}", "what must i do to {}",
    "show me how to {}", "tell me how to {}", "please {}", "which command do i need to {}", "{}",
)  # fmt: skip
EVENT_TEMPLATES = (
    "what happens when {}", "what happens if {}", "what if {}", "what happens after {}", "suppose {}",
    "what does outcrop do when {}", "what do users see when {}", "what is going on when {}", "{}, what now",
    "how does outcrop react when {}", "what would happen if {}", "and if {}", "is it bad when {}", "{}",
    "what will happen when {}", "do requests fail when {}", "explain what happens when {}",
)  # fmt: skip
SYNONYMS = (
    ("what is", ("what's", "whats", "explain", "describe", "tell me about", "define", "what exactly is")),
    ("what are", ("what're", "explain", "describe", "tell me about", "define", "what exactly are")),
    ("explain", ("describe", "tell me about", "can you explain", "could you explain", "please explain")),
    ("describe", ("explain", "tell me about")),
    ("how do i", ("how can i", "how to", "how would i", "how do we", "how do you", "how should i")),
    ("how can i", ("how do i", "how to", "how could i")),
    ("how does", ("how exactly does", "explain how does", "in which way does")),
    ("how is", ("how's", "in which way is")),
    ("can i", ("could i", "may i", "am i able to", "is it possible to", "is there a way to")),
    ("what happens when", ("what happens if", "what if", "what happens once", "suppose")),
    ("what happens if", ("what happens when", "what if", "suppose")),
    ("which", ("what",)),
    ("what", ("which",)),
    ("is there", ("do you have", "does it have", "is there maybe")),
    ("are there", ("do you have", "does it have")),
    ("do you have", ("is there", "are there")),
    ("dies", ("crashes", "fails", "goes down", "is killed", "breaks", "stops", "goes away", "is lost")),
    ("crashes", ("dies", "fails", "goes down", "is killed", "breaks", "stops working", "is lost")),
    ("is killed", ("dies", "crashes", "goes down", "is shut down")),
    ("where is", ("where do i find", "where can i find", "how do i find")),
    ("where are", ("where do i find", "where can i find", "how do i find")),
    ("how do i find", ("where is", "where do i find", "where can i see")),
    ("show me", ("list", "give me", "tell me")),
    ("list", ("show me", "give me", "name", "tell me")),
    ("does outcrop", ("does it", "can outcrop", "will outcrop")),
    ("outcrop", ("it", "this software", "the project")),
    ("why", ("why exactly", "for what reason", "tell me why")),
    ("the purpose of", ("the use of", "the role of", "the point of", "the job of")),
    ("the job of", ("the role of", "the task of", "the purpose of")),
    ("need", ("require", "want")),
    ("use", ("work with", "have")),
    ("set", ("change", "choose", "configure", "adjust")),
    ("start", ("launch", "run", "begin", "bring up")),
    ("fast", ("quick", "speedy")),
    ("support", ("offer", "have", "provide")),
    ("supported", ("possible", "available", "allowed")),
    ("model", ("llm", "language model")),
    ("machine", ("computer", "server")),
    ("gpu", ("graphics card",)),
    ("a lot of", ("many",)),
    ("an", ("a",)),
    ("the", ("this",)),
)
PREFIXES = (
    "hi, ", "hello, ", "hey, ", "please, ", "ok, ", "so ", "and ", "quick question: ", "question: ", "well, ",
    "i wonder, ", "tell me, ", "sorry, ", "hello! ", "hi! ", "one question, ", "now ", "just curious, ", "also, ",
)  # fmt: skip
SUFFIXES = (" please", ", please", " exactly", " then", " again", " actually", " in short", " briefly", " here")
FILLER_WORDS = {"a", "an", "the", "of", "do", "does", "is", "are", "i", "to", "in", "it", "me", "my", "for"}
SMALL_TALK = {"hello", "how-are-you", "thanks", "goodbye", "tell-me-more", "what-can-you-do"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MIN_TYPO_LENGTH = 12


def phrase(entry: Entry, rng: random.Random, held_out: frozenset[str]) -> str:
    """One way to ask for `entry`. `held_out` holds normalised phrasings that must not be returned."""
    while True:
        text = _base_phrase(entry, rng)
        if rng.random() < 0.75:
            text = _vary(entry, text, rng)
        if normalise(text) not in held_out:
            return text


def _base_phrase(entry: Entry, rng: random.Random) -> str:
    templated = (
        (entry.topics, TOPIC_TEMPLATES),
        (entry.actions, ACTION_TEMPLATES),
        (entry.events, EVENT_TEMPLATES),
    )
    choices = [pair for pair in templated if pair[0]]
    if not choices or rng.random() < 0.6:
        return rng.choice(entry.questions)
    slots, templates = rng.choice(choices)
    slot = rng.choice(slots)
    if rng.random() < 0.2:
        slot = re.sub(r"^(an?|the) ", "", slot)
    text = rng.choice(templates).format(slot)
    return text[0].upper() + text[1:] + rng.choice(("", "?"))


def _vary(entry: Entry, text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((0, 1, 1, 2))):
        text = _swap_synonym(text, rng)
    if rng.random() < 0.15:
        text = _drop_word(text, rng)
    if entry.id not in SMALL_TALK and rng.random() < 0.15:
        text = rng.choice(PREFIXES) + text[0].lower() + text[1:]
    if entry.id not in SMALL_TALK and rng.random() < 0.08:
        end = re.search(r"[?!.]*$", text)
        at = end.start() if end else len(text)
        text = text[:at] + rng.choice(SUFFIXES) + text[at:]
    text = _change_punctuation(_change_case(text, rng), rng)
    if rng.random() < 0.25:
        text = _add_typos(text, rng)
    return text


def _swap_synonym(text: str, rng: random.Random) -> str:
    lowered = f" {text.lower()} "
    hits = [(old, new) for old, new in SYNONYMS if re.search(rf"\b{old}\b", lowered)]
    if not hits:
        return text
    old, new = rng.choice(hits)
    swapped = re.sub(rf"\b{old}\b", rng.choice(new), text, count=1, flags=re.IGNORECASE)
    return swapped[0].upper() + swapped[1:] if text[0].isupper() else swapped


def _drop_word(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    fillers = [i for i, word in enumerate(words) if word.lower() in FILLER_WORDS]
    if len(words) < 3 or not fillers:
        return text
    del words[rng.choice(fillers)]
    return " ".join(words)


def _change_case(text: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.35:
        return text.lower()
    if draw < 0.40:
        return text.upper()
    if draw < 0.44:
        return text.title()
    return text


def _change_punctuation(text: str, rng: random.Random) -> str:
    draw = rng.random()
    bare = text.rstrip("?!. ")
    if draw < 0.35 or not bare:
        return bare or text
    if draw < 0.5:
        return bare + rng.choice(("?", "??", "!", ".", " ?", "..."))
    return text


def _add_typos(text: str, rng: random.Random) -> str:
    if len(text) < MIN_TYPO_LENGTH:
        return text
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(1, len(text) - 1)
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        elif kind == 1:
            text = text[:at] + text[at + 1 :]
        elif kind == 2:
            text = text[:at] + text[at] + text[at:]
        else:
            text = text[:at] + rng.choice(LETTERS) + text[at + 1 :]
    return text
