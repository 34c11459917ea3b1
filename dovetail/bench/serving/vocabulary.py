"""What random prompts are made of: token ids of a tokenizer, the text of such ids, or common words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.text.tokenizer import Tokenizer

Prompt = str | list[int]

LEAST = 64  # different items at least; with fewer, random prompts would be alike
CHARACTERS_PER_TOKEN = 4  # in English text, if there is no tokenizer to count
# Nearly every vocabulary has each of these as one token, with the space before it.
_COMMON = """
about above action after again air all also always and animal answer any are area around away back because been
before began being best better between big black blue body book both boy call came can car care carry change
child children city close cold come could country course cut day did different does done door down during each
early earth eat end enough even ever every example eye face fact family far father feel few field find fire
first fish five follow food foot for form found four from full game gave get girl give glass goes gold good got
great green ground group grow had half hand hard has have head hear heart help her here high him his home horse
hot hour house how idea into just keep kind king knew know land large last later learn leave left let letter
life light like line list little live long look love low made main make man many mark may mean men might mile
mind miss money moon more morning most mother mountain move much music must name near need never new next night
north note nothing now number off often old once one only open order other our out over own page paper part pass
people perhaps place plan plant play point power problem public put question quick rain ran reach read ready
real red rest right river road rock room round rule run said same saw say school sea second see seem self
sentence set several shall she ship short should show side since sing sit six size sky small snow some song soon
sound south special stand star start state stay step still stood stop story street strong study such sun sure
table take talk tell ten than that the their them then there these they thing think this those though thought
three through time today together told too took top toward town tree true try turn two under until use usual
very voice wait walk wall want war warm was watch water way week well went were west what wheel when where which
while white who whole why will wind with without wood word work world would write year yes yet you young
"""
_WORD = re.compile("[\u0120\u2581][A-Za-z]+")  # a space as vocabularies write it, and letters


@dataclass(frozen=True)
class Vocabulary:
    """`items` are drawn at random and `join`ed to a prompt; each is about one token. given: makes a prompt of a
    text. count: gives the tokens of a text. exact: whether a tokenizer counts. ids: whether prompts are token ids.
    """

    items: Sequence[Any]
    join: Callable[[list[Any]], Prompt]
    given: Callable[[str], Prompt]
    count: Callable[[str], int]
    exact: bool = True
    ids: bool = False

    def draw(self, rng: Random, count: int) -> list[Any]:
        """`count` random items, each as likely as any other."""
        return rng.choices(self.items, k=count)


def token_ids(tokenizer: Tokenizer) -> Vocabulary:
    """Prompts are lists of token ids."""
    return Vocabulary(
        _plain_ids(tokenizer), list, tokenizer.encode, lambda text: len(tokenizer.encode(text)), ids=True
    )


def token_text(tokenizer: Tokenizer) -> Vocabulary:
    """Prompts are the text of ids that the tokenizer would most likely choose for it again."""
    return Vocabulary(_plain_ids(tokenizer), tokenizer.decode, str, lambda text: len(tokenizer.encode(text)))


def words() -> Vocabulary:
    """Prompts are common English words, about a token each, for servers whose tokenizer is not known."""
    return Vocabulary(_COMMON.split(), " ".join, str, _estimate, exact=False)


def _estimate(text: str) -> int:
    return max(1, len(text) // CHARACTERS_PER_TOKEN)


def _plain_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids whose text is a space and letters. If there are few, ids of anything that is text by itself."""
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    found = [i for i in ids if _WORD.fullmatch(tokenizer.piece(i) or "")]
    if len(found) < LEAST:
        found = [i for i in ids if (text := tokenizer.decode([i])) and "\ufffd" not in text]
    if len(found) < LEAST:
        raise ConfigError(f"the tokenizer has only {len(found)} tokens that are text; random prompts need {LEAST}")
    return found
