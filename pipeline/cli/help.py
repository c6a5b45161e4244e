"""How `--help` and mistakes show arguments and options: by the words that a user types, without types of the code.

Typer would write `[[KEY=VALUE]...]...` with the type `<list[str]>`, and `<bool>` beside each flag.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command whose usage and table of arguments show each metavar as it is written."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns what follows the command's name in its usage."""
        return ["[OPTIONS]", *(str(param.metavar) for param in self.params if isinstance(param, TyperArgument))]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help."""
        _show_no_types(self.get_params(ctx))
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the words of a command line; a value of the wrong type is answered in our words, not in pydantic's."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            errors = getattr(error.__cause__, "errors", None)
            if errors is not None:
                error.message = _in_words(errors()[0])
            raise


class Group(TyperGroup):
    """A group of commands whose flags have no type."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help."""
        _show_no_types(self.get_params(ctx))
        super().format_help(ctx, formatter)


def use_our_help(app: typer.Typer) -> None:
    """Makes every command of an app, and of the groups in it, show its help so."""
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        group.cls = Group
        if group.typer_instance is not None:
            use_our_help(group.typer_instance)


def _in_words(error: Any) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    from pipeline.config.messages.values import allowed

    return f"given {error['input']}, allowed: {allowed(error)}"


def _show_no_types(params: list[Any]) -> None:
    for param in params:
        if isinstance(param, TyperArgument) or getattr(param, "is_flag", False):
            param.display_type_rich = lambda ctx: None
