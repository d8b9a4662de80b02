"""The one exception that means "the person who ran this can fix it", and what others are told as."""


class UserError(Exception):
    """Bad input, told in one line: the flag, file, row or column at fault, what was found, what was expected and what
    to do next. Scripts print it without a traceback and exit with code 2 (`utils.args.parsing.run_script`)."""


def short_reason(error: BaseException) -> str:
    """One line on an exception of `datasets`, Arrow or the hub's client."""
    cause = error.__cause__ or error  # DatasetGenerationError hides what happened in its cause
    if "BatchSize must be greater than 0" in str(cause):
        return "a parquet file is empty (0 rows)"
    lines = str(cause).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(cause).__name__)[:200]
