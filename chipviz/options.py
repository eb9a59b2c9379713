"""The options of the command line: their names, their types and what they say of themselves."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from chipviz.config import Rule
from chipviz.errors import ConfigError
from chipviz.report import RunReport, SelectionInfo, load_correct

BackboneName = Annotated[
    str, typer.Option("--backbone", help="Embedded name, Hub id, folder or GGUF file.")
]
DataName = Annotated[
    str, typer.Option("--data", help="Embedded name, file, folder or Hub id (owner/name:subset).")
]
Template = Annotated[str | None, typer.Option(help="Prompt around {text} and {text_pair}.")]
TextColumn = Annotated[str | None, typer.Option("--text", help="Column of the texts.")]
PairColumn = Annotated[str | None, typer.Option("--text-pair", help="Column of the second texts.")]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Column of the labels.")]
ChoicesColumn = Annotated[
    str | None, typer.Option("--choices", help="Column of the options of multiple choice.")
]
Poolings = Annotated[
    str | None,
    typer.Option(
        "--pooling", help="Comma-separated: last, mean, first, max; without it, what suits."
    ),
]
MaxTrain = Annotated[int | None, typer.Option(help="Training texts at most.")]
MaxValidation = Annotated[int | None, typer.Option(help="Validation texts at most.")]
MaxTest = Annotated[int | None, typer.Option(help="Test texts at most.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a prompt, template included.")]
PresetName = Annotated[
    str, typer.Option("--preset", help="sound, or published: the paper's recipe beside it.")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto: spread a model too large for one device.")
]
DtypeName = Annotated[str | None, typer.Option(help="Compute in float32 or bfloat16.")]
Seed = Annotated[int, typer.Option(help="Orders and splits the texts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Layer = Annotated[int | None, typer.Option(help="The last layer to keep, from 0.")]
PoolingName = Annotated[str | None, typer.Option(help="Take a chip on this pooling.")]
ChipName = Annotated[str | None, typer.Option(help="Take a chip of this kind.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as `runs` lists it.")]
RULES = ", ".join(rule for rule in get_args(Rule) if rule != "manual")
_RULE_OF = {"tolerance": "within", "margin": "non-inferior", "budget": "budget"}


def choose(
    report: RunReport, name: str, run_dir: Path, named: dict[str, Any]
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
    correct = load_correct(run_dir) if rule == "non-inferior" else None
    return rule, report.select(rule, correct=correct, **given)
