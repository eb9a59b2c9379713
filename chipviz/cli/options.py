"""The options of the command line: their names, their types and what they say of themselves."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from chipviz import sources
from chipviz.config import Rule, RunConfig
from chipviz.errors import ConfigError
from chipviz.results.models import made_folder
from chipviz.results.report import RunReport, SelectionInfo
from chipviz.results.run_folder import RunFolder

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Layer = Annotated[int | None, typer.Option(help="The last layer to keep, from 0.")]
PoolingName = Annotated[str | None, typer.Option(help="Take a chip on this pooling.")]
ChipName = Annotated[str | None, typer.Option(help="Take a chip of this kind.")]
RecipeName = Annotated[
    str | None,
    typer.Option(help="Take a chip of this recipe: sound, published, stc or stc-published."),
]
SiteName = Annotated[
    str | None,
    typer.Option(help="Take a chip that reads this site: block, raw, gate, ffn_in, ffn_out, all."),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as `runs` lists it.")]
RULES = ", ".join(rule for rule in get_args(Rule) if rule != "manual")
_RULE_OF = {"tolerance": "within", "margin": "non-inferior", "budget": "budget"}


_SINGULAR = {"poolings": "pooling", "chips": "chip", "sites": "sites"}
"""Options that take several values by commas are named by one of them."""


def flag(field: str) -> str:
    """The option of a setting, such as `--max-length`."""
    return f"--{_SINGULAR.get(field, field).replace('_', '-')}"


def takes_run(command: Callable[[typer.Context, RunConfig, bool], None]) -> Callable[..., None]:
    """Give a command one option per setting of `RunConfig`, and hand it the run they ask for."""

    @wraps(command)
    def with_options(context: typer.Context, as_json: bool, **given: Any) -> None:
        command(context, _run_config(given, context.obj), as_json)

    options = [_option(name, field) for name, field in RunConfig.model_fields.items()]
    by_name = inspect.Parameter.KEYWORD_ONLY
    as_json = inspect.Parameter("as_json", by_name, default=False, annotation=AsJson)
    context = inspect.signature(command).parameters["context"]
    vars(with_options)["__signature__"] = inspect.Signature([context, *options, as_json])
    return with_options


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """One setting as typer takes it. What is not given stays None, so that the default holds."""
    required, several = field.is_required(), isinstance(field.default, tuple)
    default = ", ".join(field.default) if several else field.default
    allowed = (field.annotation, *get_args(field.annotation))
    kind = next((kind for kind in (bool, int) if kind in allowed), str)
    help_text = f"{field.description}{' Several by commas.' if several else ''}"
    if not required and default not in (None, ""):
        help_text += f" Default: {default}."
    switch = f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool else flag(name)
    option = typer.Option(switch, help=help_text, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, option],
    )


def backbone_named(name: str, home: Path) -> str:
    """A backbone as a run keeps it: a path valid from any folder, other names as they are.

    A model made here comes before a file or folder of its name.
    """
    made = made_folder(home, name) is not None
    return name if made else sources.absolute(name, sources.BACKBONE_WHEELS)


def _run_config(given: dict[str, Any], home: Path) -> RunConfig:
    """The run that options ask for.

    Raises:
        ConfigError: If one of them says what no run can do.
    """
    values = {name: value for name, value in given.items() if value is not None}
    values["backbone"] = backbone_named(values["backbone"], home)
    values["data"] = sources.absolute(values["data"], sources.DATA_WHEELS)
    for name in _SINGULAR:
        if name in values:
            values[name] = tuple(part.strip() for part in values[name].split(","))
    return RunConfig.checked(**values)


def rule_named(name: str) -> Rule:
    """The rule of a name.

    Raises:
        ConfigError: If there is none.
    """
    rule: Rule | None = next((rule for rule in get_args(Rule) if rule == name), None)
    if rule is None:
        raise ConfigError(f"There is no rule {name!r}.", f"Rules: {RULES}.")
    return rule


def choose(
    report: RunReport, name: str, folder: RunFolder, named: dict[str, Any]
) -> tuple[Rule, SelectionInfo]:
    """Apply the rule a user named. A number that belongs to another rule is refused."""
    rule = rule_named(name)
    for number, owner in _RULE_OF.items():
        if rule != owner and named[number] is not None:
            raise ConfigError(
                f"--{number} belongs to rule {owner}, not to {rule}.",
                f"Leave it out, or give --rule {owner}.",
            )
    given = {name: value for name, value in named.items() if value is not None}
    correct = folder.read_predictions().correct if rule == "non-inferior" else None
    return rule, report.select(rule, correct=correct, **given)
