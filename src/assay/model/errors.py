"""The two ways a run can end badly, each with its exit code."""


class AssayError(Exception):
    """A failure whose message is one line for the user, whatever the files hold that it quotes: what is wrong and what to do."""

    exit_code = 1

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class InputError(AssayError):
    """The request or one of its files is wrong; nothing was written."""

    exit_code = 2


class ShortfallError(AssayError):
    """The run finished but did less, or worse, than was asked."""

    exit_code = 1
