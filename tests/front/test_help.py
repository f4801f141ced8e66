"""What --help says can be typed."""

import re

from helpers_front import invoke

from planish.recipe.variants import named_recipes


def test_help_says_what_works() -> None:
    assert "the extra planish[eval]" in " ".join(invoke("eval", "--help").out.split())
    advice = re.search(r"each value, such as (\w+\.\w+=[\d.,]+)\.", " ".join(invoke("compare", "--help").out.replace("│", " ").split()))
    assert advice is not None
    assert len(named_recipes(["w8a8"], [], [advice[1]])) == 2
