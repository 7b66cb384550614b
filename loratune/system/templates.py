"""Errors of code that comes with a model: chat templates in Jinja, and tokenizers in Rust."""

from jinja2 import TemplateSyntaxError

TEMPLATE_ERRORS = (TemplateSyntaxError, SyntaxError, RecursionError)
"""What Jinja and Python raise for a text that is no template, or whose blocks or parentheses are nested too deeply."""


def template_error_reason(error: BaseException) -> str:
    """Why a template cannot be compiled. error: one of `TEMPLATE_ERRORS`."""
    if isinstance(error, TemplateSyntaxError):
        return str(error.message)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"it is nested too deeply: {error.msg}" if isinstance(error, SyntaxError) else str(error)


def is_rust_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; the class of such an error is no `Exception`, and cannot be imported."""
    return type(error).__name__ == "PanicException"
