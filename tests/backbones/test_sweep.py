"""The sweep over text families: what must become of each, and that nothing else does.

Read from a run of `python -m tests.backbones.sweep` and looked through. A family that moves from
one line to another has changed, in transformers or here. No tiny model is built of these, which
have parts of a fixed size or settings that must agree:

    blt chameleon cohere_compass_text cosmos3_edge_text csm dbrx dots3_note_text evolla git
    glm5_next_text gradium_phonon_tts idefics kyutai_speech_to_text layoutlmv2 luke
    phi4_multimodal plbart pocket_tts qwen4_exp_text seamless_m4t seamless_m4t_v2 tvp zamba
    zamba2
"""

import pytest

from tests.backbones.sweep import outcome, said

OUTCOMES = {
    "right": """
    afmoe apertus arcee aria_text axk1 axk2 bamba beam bert bert-generation big_bird biogpt
    bitnet bloom camembert clip_text_model codegen cohere cohere2 cohere2_moe ctrl cwm
    data2vec-text deberta deberta-v2 deepseek_v2 deepseek_v3 deepseek_v32 diffllama
    distilbert doge dots1 electra ernie ernie4_5 ernie4_5_moe eurobert exaone4 exaone_moe
    falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe
    glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite
    granite_docling_text granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared gte helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax ibert
    imagegpt inkling_text internlm3 iquestcoder jais2 jamba jetmoe jina_embeddings_v3
    kolibri1 laguna layoutlm lfm2 lfm2_moe lfm3 llama llama4_text mamba mamba2 markuplm
    megatron-bert mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mistral4 mistral_large4_text mixtral modernbert modernbert-decoder
    molmo2_text moshi mpnet mpt mra muse_glimmer_text muse_spark_text nanochat nemotron
    nemotron_h nomic_bert olmo olmo2 olmo3 olmoe openai-gpt openai_privacy_filter opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe
    qwen3_next qwen3_vl_moe_text qwen3_vl_text recurrent_gemma rembert roberta
    roberta-prelayernorm roc_bert roformer seed_oss smollm3 solar_open splinter stablelm
    starcoder2 tapas tipsv2_text_model ultrabert vaultgemma visual_bert xglm xlm-roberta
    xlm-roberta-xl youtu zaya
    """,
    "refused: has no list of": """
    albert hrm_text longcat_flash lxmert
    """,
    "refused: cannot be cut: it does not run on tokens alone": """
    bailing_hybrid blip_2_qformer bros dpr glm4v_moe_text glm4v_text glm_image_text
    glm_ocr_text higgs_audio_v2 hunyuan_vl_text kimi_linear layoutlmv3 lilt qwen2_5_vl_text
    qwen2_vl_text vilt vits xlstm xmod
    """,
    "refused: cannot be cut: it has an encoder and a decoder, and is no single chain": """
    bart bigbird_pegasus blenderbot blenderbot-small fastspeech2_conformer fsmt led longt5
    m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x prophetnet switch_transformers
    t5 udop umt5
    """,
    "right, one length a batch": """
    convbert fnet mobilebert nystromformer yoso
    """,
    "refused: cannot be cut: more than a norm stands after its last block": """
    cpmant deepseek_v4 embedding_gemma2_text gemma3n_text hy_v4 inkling2_text longformer
    reformer xlnet
    """,
    "refused: cannot be cut after any layer but its last": """
    esmc gpt_neox_japanese minicpm3 neomme
    """,
    "refused: cannot be cut: something stands between two of its blocks": """
    flaubert xlm
    """,
    "right but for cuts after [0, 2]": """
    gemma4_text gemma4_unified_text
    """,
    "right but for cuts after [0]": """
    olmo_hybrid rwkv
    """,
    "refused: cannot be cut: its blocks do not run once each": """
    squeezebert
    """,
}
"""How an outcome begins, less the family's name, and the families that have it."""
EXPECTED = {name: how for how, names in OUTCOMES.items() for name in names.split()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_is_right_at_every_cut_or_refused_in_words(name, tmp_path):
    found = outcome(name, tmp_path).replace(f"refused: {name} ", "refused: ")
    expected = EXPECTED[name]
    assert found == expected or (expected.startswith("refused") and found.startswith(expected))


def test_a_wrong_cut_is_seen(monkeypatch):
    """The sweep itself: a cut of another scale, and one that keeps a layer too few."""
    from tests.backbones import sweep

    real = sweep.cut_config
    monkeypatch.setattr(sweep, "impossible_cuts", lambda _: {})
    assert said("esmc").startswith("wrong: layer 0 differs")
    monkeypatch.setattr(
        sweep, "cut_config", lambda backbone, layer: real(backbone, max(layer - 1, 0))
    )
    assert not said("llama").startswith("right")
