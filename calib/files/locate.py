"""From the model argument to a local folder, and from the folder to its weight files."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

from ...quant.errors import PlanishError
from .convert import convert_gguf, convert_pickles
from .demo import find_demo
from .given import DEMO, check_model
from .shards import INDEX_FILE, SINGLE_FILE, read_index

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SIDE_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",  # of images
    "video_preprocessor_config.json",
    "processor_config.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def resolve(model: str | Path, *, allow_pickle: bool = False) -> Path:
    """The local folder of a model: a folder, a .gguf file, `demo:NAME`, or a Hub name `org/name` (downloaded into the Hub's own cache).

    Errors: nothing of these, or it cannot be fetched.
    """
    check_model(model)
    if isinstance(model, str) and model.startswith(DEMO):
        demo = find_demo(model.removeprefix(DEMO))
        return demo.convert(demo.path(), demo.card)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    return convert_gguf(path) if path.is_file() else _download(str(model), allow_pickle=allow_pickle)


def _download(name: str, *, allow_pickle: bool) -> Path:
    """A snapshot of the Hub's model: configuration, tokenizer and safetensors; pickles only where they are allowed and there is nothing else."""
    wanted = ["model*.safetensors", "*.json", *(pattern for pattern in SIDE_FILES if not pattern.endswith(".json"))]
    try:
        folder = _snapshot(name, wanted)
        if allow_pickle and not list(folder.glob("*.safetensors")):
            folder = _snapshot(name, [*wanted, "pytorch_model*.bin"])
    except HFValidationError as error:
        raise PlanishError(f"{name}: no such folder, and not a valid Hub name ({error}).") from error
    except LocalEntryNotFoundError as error:
        message = "no such folder, and the Hub cannot be reached (or HF_HUB_OFFLINE is set) and its cache has no such model. Give a local folder."
        raise PlanishError(f"{name}: {message}") from error
    except HfHubHTTPError as error:
        message = f"no such folder, and the Hub refuses that name ({type(error).__name__}). Check the name, and `hf auth login` for a gated model."
        raise PlanishError(f"{name}: {message}") from error
    except (HTTPError, OSError) as error:
        raise PlanishError(f"{name}: no such folder, and the download from the Hub failed ({error}). Give a local folder.") from error
    if not allow_pickle and not list(folder.glob("*.safetensors")):
        raise PlanishError(f"{name}: no safetensors weights on the Hub. If it has pickle weights (.bin), allow them (--allow-pickle).")
    return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
    # Patterns cross folders: originals in sub-folders and the consolidated files that some models add hold the same weights again.
    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*.safetensors", "*/*.json", "*/*.bin", "consolidated*"]))


def weight_files(folder: Path, *, allow_pickle: bool = False) -> dict[Path, list[str]]:
    """The safetensors files of a model folder, each with the tensors that an index promises in it. Pickles are converted where they are allowed.

    Errors: no weights, several files without an index, or only pickles that are not allowed.
    """
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: []}
    if (folder / INDEX_FILE).is_file():
        return read_index(folder / INDEX_FILE)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: []}
    if found:
        raise PlanishError(f"{folder}: {len(found)} safetensors files but no {INDEX_FILE} that says which belong together. Download the index.")
    pickles = list(read_index(folder / PICKLE_INDEX)) if (folder / PICKLE_INDEX).is_file() else sorted(folder.glob(PICKLE_FILE))
    if not pickles:
        raise PlanishError(f"{folder}: no weights. A model folder holds {SINGLE_FILE}, or {INDEX_FILE} and the files it lists.")
    if not allow_pickle:
        message = f"only pickle weights ({pickles[0].name}). Use safetensors, or allow them (--allow-pickle): only tensors are read from them."
        raise PlanishError(f"{folder}: {message}")
    return {file: [] for file in convert_pickles(pickles)}


def side_files(folder: Path) -> tuple[Path, ...]:
    """What a compressed checkpoint takes over unchanged (tokenizer, chat template, licence, ...), relative to the folder."""
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(path.relative_to(folder) for path in found))
