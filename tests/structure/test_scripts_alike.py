"""Trainers that do the same say it in the same text."""

from tests.support.processes import ROOT

TEXT, CLASS = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"


def test_the_two_trainers_evaluate_alike():
    """The same text in both."""
    blocks = [
        ("    held_out = setup.open_held_out(", "    # Prepare\n"),
        ("    evaluator = None\n", "    step_log = StepLog("),
        ("        if evaluator is not None and (", "        if done % args.logging_steps"),
    ]
    for start, end in blocks:
        text, by_class = (
            source[source.index(start) : source.index(end)]
            for source in ((ROOT / each).read_text() for each in (TEXT, CLASS))
        )
        assert len(text) > 100
        assert text == by_class


def test_the_two_trainers_share_their_loop():
    """What one optimizer step does is the same text in both trainers of latents."""
    from tests.support.processes import ROOT

    def step(script: str) -> str:
        source = (ROOT / script).read_text()
        return source[
            source.index("            with accelerator.accumulate(") : source.index("        progress.update()")
        ]

    text, label = step("train_text_to_image_ldm.py"), step("train_class_cond_ldm.py")
    assert "accelerator.backward(loss)" in text
    assert text == label
