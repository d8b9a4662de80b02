"""Arguments: the command line over the config file over the defaults."""

import importlib
import sys
from argparse import ArgumentParser, BooleanOptionalAction
from types import SimpleNamespace

import pytest
import yaml

from utils.args.parsing import (
    fraction,
    non_negative_float,
    non_negative_int,
    parse_with_config,
    positive_float,
    positive_int,
)
from utils.errors import UserError


def parser():
    """One flag of each kind that the scripts use."""
    made = ArgumentParser()
    made.add_argument("--steps", type=positive_int, default=100)
    made.add_argument("--seed", type=non_negative_int, default=0)
    made.add_argument("--learning_rate", type=positive_float, default=1e-4)
    made.add_argument("--weight", type=non_negative_float, default=0.5)
    made.add_argument("--drop", type=fraction, default=0.1)
    made.add_argument("--precision", choices=["no", "fp16", "bf16"], default=None)
    made.add_argument("--model", choices=["unet", "dit"], default="unet")
    made.add_argument("--name", default=None)
    made.add_argument("--ema", action=BooleanOptionalAction, default=True)
    made.add_argument("--prompt", action="append", default=None)
    made.add_argument("--labels", nargs="+", type=non_negative_int, default=None)
    return made


def parse(tmp_path, text=None, *flags):
    """The parsed result of flags over a file with `text`."""
    argv = list(flags)
    if text is not None:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        argv = ["--config", str(tmp_path / "config.yaml"), *argv]
    return parse_with_config(parser(), argv)


def refusal(tmp_path, text):
    with pytest.raises(UserError) as caught:
        parse(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    assert "--config" in message
    assert "config.yaml" in message
    return message


# Precedence


def test_command_line_over_file_over_default(tmp_path):
    """Each flag takes the first of command line, file and default that sets it."""
    args = parse(tmp_path, "steps: 7\nseed: 3\nema: false\nname: from file\n", "--steps", "9", "--drop", "0.2")
    assert (args.steps, args.seed, args.ema, args.name) == (9, 3, False, "from file")
    assert (args.drop, args.learning_rate, args.model, args.prompt) == (0.2, 1e-4, "unet", None)


@pytest.mark.parametrize("flags", [["--steps", "100"], ["--ema"], ["--model", "unet"]])
def test_a_flag_given_as_its_default_still_beats_the_file(tmp_path, flags):
    """The command line wins also where it says what the default says."""
    args = parse(tmp_path, "steps: 7\nema: false\nmodel: dit\n", *flags)
    name = flags[0].removeprefix("--")
    assert getattr(args, name) == parser().get_default(name)


def test_given_and_typed(tmp_path):
    """`typed` is what the command line set; `given` adds what the file sets to something else than the default."""
    args = parse(tmp_path, "steps: 7\nseed: 0\nname: null\nweight: 0.5\n", "--drop", "0.1", "--labels", "1", "2")
    assert args.typed == {"drop", "labels"}
    assert args.given == {"drop", "labels", "steps"}
    assert parse(tmp_path).given == set()
    assert parse(tmp_path, "").given == set()


def test_repeated_flags(tmp_path):
    """A repeated flag collects in order, replaces the file's list, and does not leak into the next parse."""
    assert parse(tmp_path, None, "--prompt", "a", "--prompt", "b").prompt == ["a", "b"]
    assert parse(tmp_path).prompt is None
    assert parse(tmp_path, "prompt: [x, y]\n").prompt == ["x", "y"]
    assert parse(tmp_path, "prompt: [x, y]\n", "--prompt", "a").prompt == ["a"]
    assert parse(tmp_path, "labels: [1, 2]\n", "--labels", "5").labels == [5]
    assert parse(tmp_path, "labels: [1, 2]\n").labels == [1, 2]
    assert parse(tmp_path, None, "--seed", "1", "--seed", "2").seed == 2


def test_booleans(tmp_path):
    """--flag and --no-flag both beat the file."""
    assert parse(tmp_path, "ema: false\n", "--ema").ema is True
    assert parse(tmp_path, "ema: true\n", "--no-ema").ema is False
    assert parse(tmp_path, "ema: false\n").ema is False


# Values of the file


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-5", 1e-5), ("3.0e-4", 3e-4), ("2", 2.0), ("'0.5'", 0.5), (".5", 0.5)]
)
def test_numbers_without_a_dot(tmp_path, text, value):
    """1e-4, which YAML takes for text, is the number that it is on the command line."""
    rate = parse(tmp_path, f"learning_rate: {text}\n").learning_rate
    assert isinstance(rate, float)
    assert rate == value


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("unknown: 3", ["unknown", "learning_rate"]),
        ("config: other.yaml", ["config"]),
        ("help: true", ["help"]),
        ("learning-rate: 3", ["learning-rate"]),
        ("3: 4", ["3"]),
        ("steps: many", ["steps", "a whole number", "many"]),
        ("steps: 2.5", ["steps", "a whole number", "2.5"]),
        ("steps: true", ["steps", "a number", "True"]),
        ("steps: [1, 2]", ["steps", "a number", "[1, 2]"]),
        ("steps: {a: 1}", ["steps", "a number"]),
        ("steps: null", ["steps", "a value", "None"]),
        ("steps:", ["steps", "a value"]),
        ("steps: 0", ["steps", "at least 1"]),
        ("steps: -4", ["steps", "at least 1"]),
        ("seed: -1", ["seed", "-1"]),
        ("learning_rate: fast", ["learning_rate", "a number", "fast"]),
        ("learning_rate: 0", ["learning_rate", "above 0"]),
        ("learning_rate: .nan", ["learning_rate"]),
        ("learning_rate: .inf", ["learning_rate"]),
        ("weight: -0.1", ["weight", "-0.1"]),
        ("drop: 1.5", ["drop", "between 0 and 1"]),
        ("name: 5", ["name", "text", "5"]),
        ("name: [a]", ["name", "text"]),
        ("name: false", ["name", "text"]),
        ("model: vae", ["model", "unet, dit", "vae"]),
        ("model: null", ["model", "a value"]),
        ("precision: fp8", ["precision", "fp16", "fp8"]),
        ("ema: 1", ["ema", "true or false", "1"]),
        ("ema: 'false'", ["ema", "true or false"]),
        ("ema: null", ["ema", "a value"]),
        ("prompt: one", ["prompt", "a list", "one"]),
        ("prompt: [1]", ["prompt", "text", "1"]),
        ("labels: 3", ["labels", "a list", "3"]),
        ("labels: [1, x]", ["labels", "a whole number", "x"]),
        ("labels: [-1]", ["labels", "-1"]),
    ],
)
def test_wrong_values_are_refused(tmp_path, line, named):
    """One line that names the file, the key, what was expected and what was found."""
    message = refusal(tmp_path, line + "\n")
    assert all(text in message for text in named), message


@pytest.mark.parametrize("text", ["- steps\n- 3\n", "just words\n", "5\n", "a: [1\n", "a: b: c\n", "\tsteps: 3\n"])
def test_files_of_something_else_are_refused(tmp_path, text):
    """A list, a text, a number and broken YAML are refused with the file's name."""
    refusal(tmp_path, text)


def test_missing_and_binary_files(tmp_path):
    """A file that is not there, a folder, and bytes that are no text are refused with their name."""
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            parse_with_config(parser(), ["--config", str(path)])
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"config\.yaml"):
        parse_with_config(parser(), ["--config", str(tmp_path / "config.yaml")])


def test_null_where_it_is_the_default(tmp_path):
    """null means "not set" for flags whose default is that."""
    args = parse(tmp_path, "name: null\nprompt: ~\nlabels:\nprecision: null\n")
    assert (args.name, args.prompt, args.labels, args.precision) == (None, None, None, None)


def test_unquoted_no_is_a_choice(tmp_path):
    """`no`, which YAML takes for false, is the choice "no" of a flag that has it."""
    assert parse(tmp_path, "precision: no\n").precision == "no"
    assert parse(tmp_path, "precision: 'no'\n").precision == "no"
    assert "text" in refusal(tmp_path, "precision: yes\n")


# Values of the command line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "0"),
        ("--steps", "-3"),
        ("--steps", "1.5"),
        ("--steps", "x"),
        ("--seed", "-1"),
        ("--learning_rate", "0"),
        ("--learning_rate", "-1e-4"),
        ("--learning_rate", "nan"),
        ("--learning_rate", "inf"),
        ("--weight", "-1"),
        ("--weight", "inf"),
        ("--drop", "-0.1"),
        ("--drop", "1.1"),
        ("--drop", "nan"),
        ("--model", "vae"),
        ("--labels", "-1"),
    ],
)
def test_wrong_numbers_on_the_command_line(tmp_path, flag, value):
    """One line that names the flag and the value."""
    with pytest.raises(UserError) as caught:
        parse(tmp_path, None, f"{flag}={value}")
    message = str(caught.value)
    assert "\n" not in message
    assert flag in message
    assert value in message


@pytest.mark.parametrize(
    ("flag", "value", "result"),
    [("--steps", "1", 1), ("--seed", "0", 0), ("--weight", "0", 0.0), ("--drop", "0", 0.0), ("--drop", "1", 1.0)],
)
def test_ends_of_the_ranges_are_allowed(tmp_path, flag, value, result):
    """The smallest and largest number that makes sense is accepted."""
    assert getattr(parse(tmp_path, None, flag, value), flag.removeprefix("--")) == result


# The scripts

SCRIPTS = {
    "train_text_to_image_ldm": [
        "--output_dir o --latents_dir l",
        "--output_dir o --train_data_dir d --caption_column text --mixed_precision no --learning_rate 3e-4 --no-use_ema",
        "--output_dir o --latents_dir l --prediction_type flow --flow_shift 3 --timestep_density uniform --model dit",
        "--output_dir o --latents_dir l --prediction_type v_prediction --rescale_betas_zero_snr --snr_gamma 5",
    ],
    "train_class_cond_ldm": [
        "--output_dir o --latents_dir l --validation_labels 0 2 --cond_drop_prob 0",
        "--output_dir o --dataset_name d --label_column label --prediction_type epsilon --noise_offset 0.1",
        "--output_dir o --latents_dir l --unconditional --ema_decay 0.5 --use_8bit_adam",
    ],
    "train_image_vae": [
        "--output_dir o --train_data_dir d",
        "--output_dir o --dataset_name d --kl_weight 1e-6 --validation_split test --eval_features inception",
        "--output_dir o --train_data_dir d --lpips_weight 1 --lpips_net alex --disc_start 5 --disc_weight 1 --num_validation_images 9",
    ],
    "precompute_latents": ["--latents_dir l --train_data_dir d --random_flip --max_samples 5 --mixed_precision no"],
    "sample": ["", "--class_labels 1 2 --scheduler ddpm --guidance_scale 1", "--seed 4"],
}


def parse_script(monkeypatch, script, argv):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    return importlib.import_module(script).parse_args()


@pytest.mark.parametrize(("script", "flags"), [(script, flags) for script, each in SCRIPTS.items() for flags in each])
def test_args_yaml_round_trip(monkeypatch, tmp_path, script, flags):
    """Arguments that were written to args.yaml and read as --config are the same arguments, and ask for the same."""
    from utils.training.setup import save_args

    first = parse_script(monkeypatch, script, flags.split())
    save_args(first, tmp_path, SimpleNamespace(is_main_process=True))
    saved = yaml.safe_load((tmp_path / "args.yaml").read_text(encoding="utf-8"))
    assert not {"config", "given", "typed"} & saved.keys()
    again = parse_script(monkeypatch, script, ["--config", str(tmp_path / "args.yaml")])
    books = {"config", "given", "typed"}
    assert {k: v for k, v in vars(again).items() if k not in books} == {
        k: v for k, v in vars(first).items() if k not in books
    }
    changed = {name for name in first.given if name != "config"}
    # A default that was written down is no wish; how long a run is was settled after parsing.
    assert again.given <= changed | {"max_train_steps"}


def test_repeated_prompts_round_trip(monkeypatch, tmp_path):
    """Prompts in any script, quotes and colons included, survive the file."""
    from utils.training.setup import save_args

    prompts = ["no", "a: b", "  'quoted'", "🦊 漢字", "1e-4", "# not a comment"]
    argv = ["--output_dir", "o", "--latents_dir", "l", "--validation_prompts", *prompts]
    first = parse_script(monkeypatch, "train_text_to_image_ldm", argv)
    save_args(first, tmp_path, SimpleNamespace(is_main_process=True))
    again = parse_script(monkeypatch, "train_text_to_image_ldm", ["--config", str(tmp_path / "args.yaml")])
    assert again.validation_prompts == first.validation_prompts == prompts
