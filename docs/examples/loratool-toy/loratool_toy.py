"""A loratool plugin: the Toy family, and `loratool toy-hello`."""

import click

from loratool import Architecture, Linear, Match, hookimpl

TOY = Architecture(
    name="toy",
    match=Match(model_types=("toy",)),
    layers=(Linear("blocks.{i}.(mix|out)", group="mlp", roles=("up", "down")),),
    default_targets=("mix", "out"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """One family: two linear layers a block."""
    return [TOY]


@hookimpl
def register_commands(cli: click.Group) -> None:
    """One command."""
    cli.add_command(click.Command("toy-hello", callback=lambda: click.echo("hello from a plugin"), help="Say hello."))
