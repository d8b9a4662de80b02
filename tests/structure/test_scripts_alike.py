"""The trainers repeat their choreography, so that each can be read by itself; what they repeat is the same text.

From `# Prepare` to the end of `main`: a line that all trainers but one have is missing in that one by mistake, unless it
is listed here with its reason; and the lines that all have stand in the same order.
"""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from tests.structure.sources import SCRIPT_SOURCES, assert_none

DENOISERS = ("train_text_to_image_ldm", "train_class_cond_ldm", "train_crystal_ldm", "train_expression_ldm")
AUTOENCODERS = ("train_image_vae", "train_crystal_vae", "train_expression_vae")
# Lines that only one trainer of its kind lacks, and why.
KNOWN: dict[str, tuple[str, ...]] = {
    "train_text_to_image_ldm": (
        "if control.is_due(args.validation_steps):",  # only with --validation_prompts
    ),
    "train_expression_ldm": (
        "optimizer = setup.make_optimizer(args, MODEL)",  # a jointly trained autoencoder has its own learning rate
        "loss = objective.loss(model_pred, target, timesteps, batch.get('attention_mask'))",  # and its own terms
        "step_log.add(loss)",
        "if run.is_main:",  # the autoencoder of a resumed joint run is not the one that the run began with
    ),
    "train_image_vae": (
        "if args.torch_compile:\n    MODEL = torch.compile(MODEL)",
        "with accelerator.accumulate(MODEL):",  # the discriminator too
        "moved = control.may_step(step_log.step_loss, grad_norm)",
        "setup.announce(args, run, model, len(data.train), first_step)",  # a stream of images has no length
    ),
    "train_crystal_vae": (),
    "train_expression_vae": (
        "optimizer = setup.make_optimizer(args, MODEL)",  # the dispersions have their own learning rate
        "identity = setup.identity_of(args, run, model, data.identity)",
        "loss = fit_loss + kl_weight * terms['kl']",  # in nats per gene
        "step_log.add(loss, **terms)",
        "if control.is_due(args.validation_steps):",  # only the main process has held-out cells
    ),
}


def lines_of(source: str) -> list[str]:
    """The lines from `# Prepare` on, without comments and indentation; the trained model is called MODEL."""
    part = source[source.index("    # Prepare\n") :]
    part = re.sub(r"\b(denoiser|autoencoder)\b", "MODEL", part)
    lines = (re.sub(r"\s+#.*$", "", line).strip().replace('"', "'") for line in part.splitlines())
    return [line for line in lines if line and not line.startswith("#") and re.search(r"\w", line)]


def faults_of_drift(scripts: dict[str, str], known: dict[str, tuple[str, ...]]) -> list[str]:
    """Lines that all of some trainers have but one, and lines that all have in different orders."""
    lines = {name: lines_of(source) for name, source in scripts.items()}
    owners = Counter(line for each in lines.values() for line in set(each))
    faults = []
    for name, own in lines.items():
        allowed = {part.strip() for entry in known.get(name, ()) for part in entry.splitlines()}
        missing = [line for line, count in owners.items() if count == len(lines) - 1 and line not in own]
        faults += [f"{name} lacks what the others have: {line}" for line in missing if line not in allowed]
    common = {line for line, count in owners.items() if count == len(lines)}
    first, *others = lines
    for other in others:
        ours, theirs = ([line for line in lines[each] if line in common] for each in (first, other))
        ours, theirs = (list(dict.fromkeys(each)) for each in (ours, theirs))
        if ours != theirs:
            line = next(a for a, b in zip(ours, theirs, strict=True) if a != b)
            faults.append(f"{first} and {other} have their lines in another order, from: {line}")
    return faults


def trainers(names: tuple[str, ...]) -> dict[str, str]:
    return {name: SCRIPT_SOURCES[name] for name in names}


@pytest.mark.parametrize("names", [DENOISERS, AUTOENCODERS, DENOISERS + AUTOENCODERS], ids=["ldm", "vae", "all"])
def test_trainers_are_alike(names: tuple[str, ...]) -> None:
    assert_none(faults_of_drift(trainers(names), KNOWN))


def test_every_known_difference_is_one() -> None:
    """What is listed as missing is missing."""
    for name, entries in KNOWN.items():
        own = lines_of(SCRIPT_SOURCES[name])
        present = [entry for entry in entries if all(part.strip() in own for part in entry.splitlines())]
        assert not present, (name, present)


def test_there_is_enough_to_compare() -> None:
    """At least thirty lines are the same in all seven trainers, sixty in those of denoisers."""
    for names, least in ((DENOISERS + AUTOENCODERS, 30), (DENOISERS, 60)):
        shared = set.intersection(*(set(lines_of(SCRIPT_SOURCES[name])) for name in names))
        assert len(shared) >= least, (names, len(shared))


def test_the_plan_measures_the_step_of_the_trainers() -> None:
    """`plan_budget.py` measures what the trainers of images do, from the latents to the gradient."""

    def step(source: str) -> list[str]:
        lines = lines_of("    # Prepare\n" + source.replace("network", "denoiser"))
        first = lines.index("latents = cache.normalise(batch, draws)")
        return lines[first : lines.index("accelerator.backward(loss)") + 1]

    ours = step(SCRIPT_SOURCES["train_text_to_image_ldm"])
    planned = [line for line in step(SCRIPT_SOURCES["plan_budget"]) if "end_stage" not in line]
    assert planned == ours
    assert len(ours) > 8


def planted(change: Callable[[str], str]) -> list[str]:
    """The faults of the trainers of denoisers after a change of one."""
    scripts = trainers(DENOISERS)
    before = scripts["train_crystal_ldm"]
    scripts["train_crystal_ldm"] = change(before)
    assert scripts["train_crystal_ldm"] != before
    return faults_of_drift(scripts, KNOWN)


PLANTED: dict[str, Callable[[], list[str]]] = {
    "no gradient clipping": lambda: planted(lambda text: re.sub(r"clip_grad_norm_\(accelerator.*\n", "None\n", text)),
    "the average moves on skipped steps": lambda: planted(
        lambda text: text.replace("ema is not None and moved", "ema")
    ),
    "the checkpoint before the snapshots": lambda: planted(
        lambda text: text.replace(
            "        if ema is not None and control",
            "        saver.save(done)\n        if ema is not None and control",
        ).replace("            saver.save(done)\n    step_log", "            pass\n    step_log")
    ),
    "a condition that is dropped otherwise": lambda: planted(
        lambda text: text.replace("model.draw_drop(draws, args.cond_drop_prob)", "draws.uniform('x') < 0.1")
    ),
    "gradients that are not zeroed": lambda: planted(lambda text: text.replace("optimizer.zero_grad()", "pass")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()
