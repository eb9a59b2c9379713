"""The options of the command line: their names, their types and what they say of themselves."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_args

import typer

from chipviz import sources
from chipviz.config import Rule, RunConfig
from chipviz.errors import ConfigError
from chipviz.results.report import RunReport, SelectionInfo
from chipviz.results.run_folder import RunFolder

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Layer = Annotated[int | None, typer.Option(help="The last layer to keep, from 0.")]
PoolingName = Annotated[str | None, typer.Option(help="Take a chip on this pooling.")]
ChipName = Annotated[str | None, typer.Option(help="Take a chip of this kind.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as `runs` lists it.")]
RULES = ", ".join(rule for rule in get_args(Rule) if rule != "manual")
_RULE_OF = {"tolerance": "within", "margin": "non-inferior", "budget": "budget"}


def run_config(
    *,
    backbone: Annotated[str, typer.Option(help="Embedded name, Hub id, folder or GGUF file.")],
    data: Annotated[
        str, typer.Option(help="Embedded name, file, folder or Hub id (owner/name:subset).")
    ],
    template: Annotated[
        str | None, typer.Option(help="Prompt around {text} and {text_pair}.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of the second texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Column of the options of multiple choice.")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="Comma-separated: last, mean, first, max; without it, what suits."),
    ] = None,
    chip: Annotated[str, typer.Option(help="Comma-separated: linear, mlp.")] = "linear",
    max_train: Annotated[int | None, typer.Option(help="Training texts at most.")] = None,
    max_validation: Annotated[int | None, typer.Option(help="Validation texts at most.")] = None,
    max_test: Annotated[int | None, typer.Option(help="Test texts at most.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt, template included.")] = 256,
    preset: Annotated[
        str, typer.Option(help="sound, or published: the paper's recipe beside it.")
    ] = "sound",
    class_weight: Annotated[
        str, typer.Option(help="none, or balanced: every class counts alike.")
    ] = "none",
    repeats: Annotated[int, typer.Option(help="Fits of each chip; their spread is the band.")] = 1,
    device_map: Annotated[
        str | None, typer.Option(help="auto: spread a model too large for one device.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute in float32 or bfloat16.")] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Where the blocks are, such as transformer.h.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Orders and splits the texts.")] = 0,
) -> RunConfig:
    """The run that these options ask for.

    Raises:
        ConfigError: If one of them says what no run can do.
    """
    return RunConfig.checked(
        backbone=sources.absolute(backbone, sources.BACKBONE_WHEELS),
        data=sources.absolute(data, sources.DATA_WHEELS),
        template=template,
        text=text,
        text_pair=text_pair,
        label=label,
        choices=choices,
        poolings=_parts(pooling),
        chips=_parts(chip),
        max_train=max_train,
        max_validation=max_validation,
        max_test=max_test,
        max_length=max_length,
        preset=preset,
        class_weight=class_weight,
        repeats=repeats,
        device_map=device_map,
        dtype=dtype,
        blocks=blocks,
        seed=seed,
    )


def takes_run(command: Callable[[typer.Context, RunConfig, bool], None]) -> Callable[..., None]:
    """A command with the options of a run, which it gets checked: `train`'s are `inspect`'s."""

    @wraps(command)
    def with_options(context: typer.Context, as_json: bool, **given: Any) -> None:
        command(context, run_config(**given), as_json)

    own = inspect.signature(command).parameters["context"]
    shared = inspect.signature(run_config).parameters.values()
    last = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson
    )
    parameters = [own, *shared, last]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(with_options)["__signature__"] = inspect.Signature(parameters)
    return with_options


def _parts(named: str | None) -> tuple[str, ...]:
    """What an option lists, by commas; nothing where it is not given."""
    return tuple(part.strip() for part in named.split(",")) if named is not None else ()


def choose(
    report: RunReport, name: str, folder: RunFolder, named: dict[str, Any]
) -> tuple[Rule, SelectionInfo]:
    """Apply the rule a user named; a number that belongs to another rule is refused."""
    rule: Rule | None = next((rule for rule in get_args(Rule) if rule == name), None)
    if rule is None:
        raise ConfigError(f"There is no rule {name!r}.", f"Rules: {RULES}.")
    for number, owner in _RULE_OF.items():
        if rule != owner and named[number] is not None:
            raise ConfigError(
                f"--{number} belongs to rule {owner}, not to {rule}.",
                f"Leave it out, or give --rule {owner}.",
            )
    given = {name: value for name, value in named.items() if value is not None}
    correct = folder.read_predictions().correct if rule == "non-inferior" else None
    return rule, report.select(rule, correct=correct, **given)
