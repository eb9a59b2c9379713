"""The other processes of a launch that makes a model: they share its pretraining."""

from pathlib import Path

from chipviz.backbones.backbone import best_device
from chipviz.backbones.find import find_model
from chipviz.backbones.language_model import load_language_model
from chipviz.backbones.surgery import operate
from chipviz.features.distributed import join
from chipviz.progress import silent
from chipviz.pruning import pretrain
from chipviz.pruning.blocks import without
from chipviz.results.models import ModelSpec


def help_leader(spec: ModelSpec, *, home: Path) -> None:
    """Take a part of every step of a pretraining. Anything else its leader does alone.

    The leader says what went; the weights of what is left come from it.

    Args:
        spec: What the leader makes of what.
        home: The folder that holds `backbones/`.

    Raises:
        ChipvizError: If the backbone cannot be opened, or the leader is gone.
    """
    if spec.heal != "pretrain":
        return
    team = join()
    removed, surgery = team.share()
    folder = find_model(spec.backbone, home, silent)
    model = load_language_model(folder, device=best_device(), needs_loss=True)
    if removed:
        model = without(model, removed)
    if surgery is not None:
        operate(model.model.base_model, surgery)
    pretrain.help_leader(model, team)
