"""Chat templates that cannot be compiled, and why."""

from jinja2 import TemplateSyntaxError

UNCOMPILED = (TemplateSyntaxError, SyntaxError, RecursionError)
"""What Jinja and Python raise for a template that is none, or whose blocks or parentheses are nested too deeply."""


def reason(error: BaseException) -> str:
    """Why a template cannot be compiled. error: one of `UNCOMPILED`."""
    if isinstance(error, TemplateSyntaxError):
        return str(error.message)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"it is nested too deeply: {error.msg}" if isinstance(error, SyntaxError) else str(error)
