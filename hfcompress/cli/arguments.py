"""What the commands share: their parser, types of arguments, and the options about data."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; how to do it right is a --help away."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def data_arguments(parser: argparse.ArgumentParser, *, samples: int = 2048) -> None:
    """What commands share that look at a model on examples."""
    parser.add_argument("model", help="folder or Hub repository")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="examples to look at: csv, json, parquet, txt, images"
    )
    parser.add_argument(
        "--eval", default=None, metavar="FILE", help="examples to score on (default: a tenth of --data)"
    )
    column_arguments(parser)
    parser.add_argument("--samples", type=positive, default=samples, help=f"examples to look at (default {samples})")
    parser.add_argument("--max-eval", type=positive, default=None, help="score on at most so many examples")
    parser.add_argument("--length", type=positive, default=64, help="tokens per example, also when timed (default 64)")
    parser.add_argument("--batch", type=positive, default=32, help="examples in a batch when timed (default 32)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads when timed (default: as torch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of examples (default 42)")


def column_arguments(parser: argparse.ArgumentParser) -> None:
    """Which columns of the data hold what."""
    parser.add_argument("--text", nargs="+", default=None, metavar="COLUMN", help="columns of text (default: found)")
    parser.add_argument("--image", default=None, metavar="COLUMN", help="column of images (default: found)")
    parser.add_argument("--label", default=None, metavar="COLUMN", help="column of labels (default: found)")


def add_command(
    commands: Any, name: str, function: Callable[..., int], text: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a command: what it does in one line, and what --help says below its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(function=function)
    return parser


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be a whole number of 1 or more")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Layers counted from 0, such as 1,3."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be layers counted from 0, such as 1,3")
    return tuple(sorted({int(part) for part in parts}))


def layer_choice(text: str) -> tuple[str | None, int | tuple[int, ...]]:
    """A stack, or None for all, and how many of its layers, or which."""
    stack, equals, choice = text.rpartition("=")
    numbers = [part for part in choice.split(",") if part]
    if not numbers or not all(part.isdecimal() for part in numbers) or (equals and not stack):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: must be a number, numbers as in 0,2,4, or encoder=6"
        )
    found = tuple(map(int, numbers))
    return stack or None, found if "," in choice else found[0]


def number(text: str) -> float:
    """Any number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be a number") from None


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be a number above 0 and at most 1")
    return share


def picture(text: str) -> str:
    """The name of a file that pictures are drawn into."""
    if Path(text).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must end in .png, .svg or .pdf")
    return text


@contextlib.contextmanager
def written(name: str | None) -> Iterator[Path | None]:
    """A file that an option names, to be written in the block; that it can be is seen at the beginning."""
    if name is None:
        yield None
        return
    from hfcompress.checkpoints.staging import staged_file

    with staged_file(name) as file:
        yield file


def text_columns(options: argparse.Namespace) -> Any:
    """The columns of text as a recipe has them: one name, several, or None."""
    return options.text[0] if options.text and len(options.text) == 1 else options.text


def data_sections(options: argparse.Namespace) -> dict[str, Any]:
    """The sections `data` and `measure` of a recipe, from the command line."""
    return {
        "data": {
            "train": options.data,
            "eval": options.eval,
            "text": text_columns(options),
            "image": options.image,
            "label": options.label,
            "max_length": options.length,
            "max_eval": options.max_eval,
        },
        "measure": {name: getattr(options, name) for name in ("batch", "length", "threads", "device")},
        "seed": options.seed,
    }


_OPTIONS = {"train": "--data", "max_length": "--length", "max_eval": "--max-eval"}


def _as_options(message: str, options: Mapping[str, str]) -> str:
    """A message that names keys of a recipe's section `data`, with this command's options in their place."""
    keys = r"(?<![\w./'\"-])data\.(train|eval|text|image|label|max_length|max_eval)(?![\w.]*\w)"
    return re.sub(keys, lambda found: options.get(found[1], f"--{found[1]}"), message)


@contextlib.contextmanager
def options_named(**others: str) -> Iterator[None]:
    """Errors about the data name this command's options in place of a recipe's keys; `others` go under another name than usual."""
    from hfcompress.tasks.errors import DataError

    try:
        yield
    except DataError as error:
        raise ValueError(_as_options(str(error), _OPTIONS | others)) from None


def require_empty(target: Path, option: str = "--output") -> None:
    """Refuse to write into a folder that holds something.

    Raises:
        ValueError: It does, or it is a file.
    """
    from hfcompress.checkpoints.staging import is_empty

    if not is_empty(target):
        raise ValueError(f"{target} is not empty; give another {option}")
