"""The one exception that means "the person who ran this can fix it"."""


class UserError(Exception):
    """Bad input, told in one line: the flag, file, row or column at fault, what was found, what was expected and what
    to do next. Scripts print it without a traceback and exit with code 2 (`utils.args.run_script`)."""
