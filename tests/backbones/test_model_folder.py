"""A model folder is measured once: what is known of it before loading is true after loading."""

import pytest
import torch
from transformers import AutoModel

from chipviz.backbones.model_folder import open_folder
from tests.families import NAMED


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "opt", "distilbert"])
def test_a_text_may_have_as_many_tokens_as_there_are_positions_and_no_more(name, tmp_path):
    folder = open_folder(NAMED[name].build(tmp_path), name)
    model = AutoModel.from_pretrained(folder.path).eval()
    n = folder.n_positions
    model(input_ids=torch.full((1, n), 5), attention_mask=torch.ones(1, n, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError), match=r"index|size"):
        model(
            input_ids=torch.full((1, n + 1), 5),
            attention_mask=torch.ones(1, n + 1, dtype=torch.long),
        )


def test_computed_positions_have_no_end(tmp_path):
    assert open_folder(NAMED["llama"].build(tmp_path), "llama").n_positions is None
