"""The recipes that come with planish, as text. Light to import, so that listing them is quick."""

from importlib import resources
from pathlib import Path

from ..common.yamltext import parse_yaml
from ..quant.errors import PlanishError, nearest


def shipped_texts() -> dict[str, str]:
    """The YAML of every shipped recipe by its name, as it was written, with its comments."""
    files = resources.files("planish").joinpath("recipes").iterdir()
    texts = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files if file.name.endswith(".yaml")}
    return dict(sorted(texts.items()))


def shipped() -> dict[str, str]:
    """Name and description of every shipped recipe."""
    return {name: _description(name, text) for name, text in shipped_texts().items()}


def shipped_text(name: str) -> str:
    """The YAML of one shipped recipe. Raises PlanishError if there is none of that name."""
    texts = shipped_texts()
    if name not in texts:
        raise PlanishError(f"recipe {name} is not shipped. {nearest(name, texts)}")
    return texts[name]


def check_recipes(*names: str | Path) -> None:
    """As check_recipe, of all of them."""
    for name in names:
        check_recipe(name)


def check_recipe(name: str | Path) -> None:
    """PlanishError if it is neither the name of a shipped recipe nor a file that can be opened."""
    texts = shipped_texts()
    if str(name) in texts:
        return
    path = Path(name)
    try:
        if not path.is_fifo():  # of a pipe, what is opened is taken
            path.open("rb").close()
    except OSError as error:
        if len(path.parts) == 1 and not path.suffix and not path.exists():
            raise PlanishError(f"recipe {path}: neither a shipped recipe nor a file. {nearest(path.name, texts)}") from error
        raise PlanishError(f"recipe {path}: cannot be read: {error.strerror}. Give a file, or one of {', '.join(texts)}.") from error


def _description(name: str, text: str) -> str:
    data = parse_yaml(text, f"recipe {name}")
    assert isinstance(data, dict)
    return str(data["description"])
