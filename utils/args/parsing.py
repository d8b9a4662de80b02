"""Parsing: the types of flags, the YAML file that can fill them, and how a script reports bad input. Imports no
torch.
"""

import argparse
import logging
import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from utils.errors import UserError


class Unset(list):
    """Stands for a flag that was not given; a list, because repeated flags append to a copy of what stands there."""


UNSET: Any = Unset()


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def non_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def non_negative_float(text: str) -> float:
    """A number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive_float(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_with_config(parser: ArgumentParser, argv: list[str] | None = None) -> Namespace:
    """Parses the command line over `--config FILE.yaml` over the defaults.

    The result has two more attributes: `typed`, the names on the command line, and `given`, those and the ones
    that the file sets to something other than the default.
    """
    parser.add_argument(
        "--config", metavar="FILE.yaml", default=None, help="YAML file of these flags; the command line wins."
    )
    parser.error = refuse_arguments  # type: ignore[method-assign]
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    args = parser.parse_args(argv, Namespace(**dict.fromkeys(actions, UNSET)))
    from_file = {} if args.config is UNSET else read_config(args.config, actions)
    args.typed = {name for name in actions if getattr(args, name) is not UNSET} - {"config"}
    args.given = args.typed | {name for name, value in from_file.items() if value != actions[name].default}
    for name, action in actions.items():
        if getattr(args, name) is UNSET:
            setattr(args, name, from_file.get(name, action.default))
    return args


def peek(parser: ArgumentParser, name: str) -> Any:
    """The value that a flag of `parser` will have, when the rest of the flags depends on it and is not declared yet.
    Anything that is wrong with it is left for `parse_with_config` to say.
    """
    action = next(action for action in parser._actions if action.dest == name)
    value, path = typed_value(name), typed_value("config")
    if value is None and path is not None:
        try:
            value = read_yaml(path, "--config").get(name)
        except UserError:
            value = None
    return value if value in (action.choices or ()) else action.default


def typed_value(name: str) -> str | None:
    """What stands behind a flag on the command line, the last time that it is there."""
    found, words = None, sys.argv[1:]
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def refuse_arguments(message: str) -> NoReturn:
    """In place of `ArgumentParser.error`, which prints some seventy lines of usage above the one that matters."""
    raise UserError(message.removeprefix("argument "))


def read_yaml(path: str, flag: str) -> dict[str, Any]:
    """The `key: value` lines of a YAML or JSON file (JSON is YAML). Raises UserError that names the flag and the
    file."""
    if not Path(path).is_file():
        raise UserError(f"{flag}: the file {path} does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{flag} {path}: expected lines of `key: value`, found a {type(values).__name__}")
    return values


def read_config(path: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """Values of a YAML file, checked against the flags they fill. Raises UserError that names the file and the key."""
    values = read_yaml(path, "--config")
    for key in values:
        if key not in actions or key == "config":
            known = ", ".join(sorted(name for name in actions if name != "config"))
            raise UserError(f"--config {path}: unknown key '{key}'; the flags of this script are: {known}")
    return {key: checked_value(path, key, value, actions[key]) for key, value in values.items()}


def checked_value(path: str, key: str, value: Any, action: argparse.Action) -> Any:
    """One value of a config file as its flag would have parsed it."""

    def refuse(expected: str) -> UserError:
        return UserError(f"--config {path}: {key}: expected {expected}, found {value!r}")

    if value is None:
        if action.default is not None:
            raise refuse("a value")
        return None
    if isinstance(action, BooleanOptionalAction):
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    count = action.nargs if isinstance(action.nargs, int) else None
    if count or action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction):
        if not isinstance(value, list) or (count and len(value) != count):
            raise refuse(f"a list of {count}" if count else "a list")
        return [converted(item, action, refuse) for item in value]
    return converted(value, action, refuse)


def converted(value: Any, action: argparse.Action, refuse: Callable[[str], UserError]) -> Any:
    """A scalar through its flag's type and choices."""
    convert: Any = action.type
    if value is False and "no" in (action.choices or ()):
        value = "no"  # which YAML reads as false unless it is quoted
    if isinstance(value, bool | list | dict) or (convert is None and not isinstance(value, str)):
        raise refuse("text" if convert is None else "a number")
    try:
        result = value if convert is None else convert(str(value))
    except argparse.ArgumentTypeError as error:
        raise refuse(str(error)) from error
    except ValueError as error:
        is_whole = getattr(convert, "__annotations__", {}).get("return") is int
        raise refuse("a whole number" if is_whole else "a number") from error
    if action.choices is not None and result not in action.choices:
        raise refuse("one of " + ", ".join(map(str, action.choices)))
    return result


def required(args: Namespace, *names: str) -> None:
    """Raises UserError for a flag that neither the command line nor the config file gave."""
    for name in names:
        if getattr(args, name) is None:
            raise UserError(f"--{name} is required: give it on the command line or in --config")


def saved_arguments(args: Namespace) -> dict[str, Any]:
    """The flags by name, as files record them: without where each of them was given."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in ("config", "given", "typed")}


def refuse_together(args: Namespace, first: str, second: str, reason: str) -> None:
    """Raises UserError if both flags are set to something other than off."""
    if getattr(args, first) and getattr(args, second):
        raise UserError(f"--{first} with --{second}: {reason}")


def run_script(main: Callable[[Namespace], None], parse_args: Callable[[], Namespace]) -> None:
    """Runs a script; bad input becomes one line on standard error and exit code 2, with no traceback."""
    # diffusers imports these, wanted or not, and they complain where there is no GPU.
    for library in ("xformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        main(parse_args())
        return
    except UserError as error:
        message = str(error)
    # Only now are the frames of `main` gone, and with them its progress bar: the error is the last line.
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
