"""Small random models of many architectures, with weights of exactly low rank, and what is to become of each.

Weights are products that float32, bfloat16 and float16 hold exactly, and so are the factors of them, whichever rows are
chosen as pivots: compressed at their true rank, the models lose nothing but the rounding of one product between.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.layers import output_embedding

RANK = 4
TOKENS = 64  # in the vocabulary
WIDTH = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
DECODER = WIDTH | {"intermediate_size": 48, "vocab_size": TOKENS, "max_position_embeddings": 32}
DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = DECODER | {"num_key_value_heads": 2}
ENCODER = DECODER | {"type_vocab_size": 2}
VISION = WIDTH | {"intermediate_size": 48, "image_size": 8, "patch_size": 4}
SEQ2SEQ = {"d_model": 32, "vocab_size": TOKENS, "max_position_embeddings": 32, "encoder_layers": 1, "decoder_layers": 1}
SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SEQ2SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": TOKENS, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
SPEECH = WIDTH | {"intermediate_size": 48, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": TOKENS}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# --- why a layer is left dense ---------------------------------------------------------------------------------------

HEAD = "output embedding"
STACK = "a stack of 4 weights"
VIEW = "part or view"
COMPUTED = "computed in the graph"
FOREIGN = "which is no linear layer"
HEADS = "with a 3-dimensional parameter"
EXPERTS = {HEAD: 1, FOREIGN: 1, STACK: 2}


@dataclass(frozen=True)
class Species:
    """One architecture at a small size.

    model     the model's class in transformers
    config    fields of its config
    inputs    what makes the keyword arguments of one call, of floating point where it is no text
    replaced  calls of linear layers that run on factors, over all graphs
    skipped   calls that are left dense, by a part of the reason
    share     of the linear parameters that is replaced, at least; lower only for a reason that stands beside it
    """

    model: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    replaced: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    share: float = 0.95

    def make(self) -> nn.Module:
        """The model in float32 and eval mode, the same at every call, with linear weights of rank ``RANK``."""
        kind = getattr(importlib.import_module("transformers"), self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: nn.Module = kind(_config(kind.config_class, self.config)).eval()
            lower_rank_(made)
        return made


def _config(kind: type, fields: Mapping[str, Any]) -> Any:
    """A config, with dicts for the configs inside of it."""
    config = kind(**fields)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


# --- weights ---------------------------------------------------------------------------------------------------------


def lower_rank_(model: nn.Module, rank: int = RANK) -> None:
    """Give every linear weight of the model, but its output embedding, the rank ``rank``, in place."""
    for parameter in {id(p): p for _, p in linear_parameters(model)}.values():
        n, m = parameter[0].numel(), parameter.shape[0]
        with torch.no_grad():
            parameter.copy_(low_rank_matrix(m, n, min(rank, m, n)).view_as(parameter))


def low_rank_matrix(m: int, n: int, rank: int) -> Tensor:
    """An m x n matrix of small whole numbers times a power of two, of rank ``rank``, rows about as long as 1.

    Every row is plus or minus a row of a basis, or the difference of two. Such selections (rows of a network matrix)
    are totally unimodular: whichever independent rows are taken as pivots, all coefficients are -1, 0 or 1.
    """
    basis = torch.randint(-1, 2, (rank, n)).float()
    while int(torch.linalg.matrix_rank(basis)) < rank:
        basis = torch.randint(-1, 2, (rank, n)).float()
    first, second = torch.randint(rank, (2, m))
    signs = torch.randint(0, 2, (m, 1)) * 2 - 1
    selection = torch.eye(rank)[first] - torch.eye(rank)[second] * (first != second)[:, None] * (torch.rand(m, 1) < 0.5)
    places = torch.randperm(m)[:rank]
    selection[places] = torch.eye(rank)  # every row of the basis is there, so the rank is full
    return signs * (selection @ basis) * 2.0 ** -round(torch.tensor(n).log2().item() / 2)


def linear_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of a model that a linear layer may hold: two dimensions, or a kernel of one point; no embedding.

    What is counted here is meant to be independent of what the product finds. Left out are matrices too small to be
    worth factors of rank ``RANK``.
    """
    head = getattr(output_embedding(model), "weight", None)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            point = parameter.dim() == 2 or (_is_convolution(module) and parameter.shape[2:].numel() == 1)
            known = parameter is head or path == "lm_head" or id(parameter) in embeddings
            if point and parameter.dim() >= 2 and not known:
                n, m = parameter[0].numel(), parameter.shape[0]
                if _is_linear(module, name) and RANK * (m + n - RANK) + RANK < m * n:
                    yield f"{path}.{name}", parameter


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1


def _is_linear(module: nn.Module, name: str) -> bool:
    """Whether the module multiplies by this parameter: not a table of positions, a probe, a state matrix."""
    if isinstance(module, nn.MultiheadAttention):
        return name.endswith("proj_weight")
    return name == "weight"


# --- inputs ----------------------------------------------------------------------------------------------------------


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, TOKENS, (2, 7), generator=torch.Generator().manual_seed(1))}


def text_pair() -> dict[str, Tensor]:
    ids = text()["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :5]}


def image() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, 8, 8)}


def large_image() -> dict[str, Tensor]:
    return {"pixel_values": _random(1, 3, 64, 64)}


def image_and_text() -> dict[str, Tensor]:
    ids = text()["input_ids"]
    ids[:, -1] = 2  # CLIP pools at the end of the text
    return image() | {"input_ids": ids}


def spectrum() -> dict[str, Tensor]:
    return {"input_features": _random(2, 8, 16), "decoder_input_ids": text()["input_ids"]}


def sound() -> dict[str, Tensor]:
    return {"input_values": _random(2, 200)}


# --- the species -----------------------------------------------------------------------------------------------------

_TEXT_PART = {key: value for key, value in DECODER.items() if key != "bos_token_id"}

ZOO: dict[str, Species] = {
    # decoders
    "llama": Species("LlamaForCausalLM", GROUPED | {"num_hidden_layers": 2}, text, 14, {HEAD: 1}),
    "mistral": Species("MistralForCausalLM", GROUPED | {"sliding_window": 4}, text, 7, {HEAD: 1}),
    "qwen2": Species("Qwen2ForCausalLM", GROUPED, text, 7, {HEAD: 1}),
    "qwen3": Species("Qwen3ForCausalLM", GROUPED | {"head_dim": 16}, text, 7, {HEAD: 1}),
    "gemma2": Species("Gemma2ForCausalLM", GROUPED | {"head_dim": 8, "num_hidden_layers": 2}, text, 14, {HEAD: 1}),
    "gemma3": Species("Gemma3ForCausalLM", GROUPED | {"head_dim": 8}, text, 7, {HEAD: 1}),
    "phi": Species("PhiForCausalLM", DECODER, text, 6, {HEAD: 1}),
    "phi3": Species("Phi3ForCausalLM", GROUPED, text, 4, {HEAD: 1}),
    "gpt2": Species("GPT2LMHeadModel", GPT2, text, 4, {HEAD: 1}),
    "gpt_neo": Species(
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": TOKENS, "max_position_embeddings": 32}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4, "bos_token_id": 1, "eos_token_id": 2},
        text,
        12,
        {HEAD: 1},
    ),
    "gpt_neox": Species("GPTNeoXForCausalLM", DECODER, text, 4, {HEAD: 1}),
    "gptj": Species("GPTJForCausalLM", GPT2 | {"rotary_dim": 4}, text, 6, {HEAD: 1}),
    "codegen": Species("CodeGenForCausalLM", GPT2 | {"rotary_dim": 4, "n_ctx": 32}, text, 4, {HEAD: 1}),
    "opt": Species("OPTForCausalLM", DECODER | {"ffn_dim": 48, "word_embed_proj_dim": 16}, text, 8, {HEAD: 1}),
    "bloom": Species("BloomForCausalLM", DECODER | {"n_layer": 1, "n_head": 4, "hidden_size": 32}, text, 4, {HEAD: 1}),
    "falcon": Species("FalconForCausalLM", DECODER, text, 4, {HEAD: 1}),
    "mpt": Species(
        "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": TOKENS}, text, 4, {HEAD: 1}
    ),
    "starcoder2": Species("Starcoder2ForCausalLM", GROUPED, text, 6, {HEAD: 1}),
    "olmo2": Species("Olmo2ForCausalLM", GROUPED, text, 7, {HEAD: 1}),
    "stablelm": Species("StableLmForCausalLM", DECODER | {"num_key_value_heads": 4}, text, 7, {HEAD: 1}),
    "cohere": Species("CohereForCausalLM", GROUPED, text, 7, {HEAD: 1}),
    "granite": Species("GraniteForCausalLM", GROUPED, text, 7, {HEAD: 1}),
    "glm4": Species("Glm4ForCausalLM", GROUPED | {"head_dim": 8}, text, 6, {HEAD: 1}),
    "smollm3": Species("SmolLM3ForCausalLM", GROUPED, text, 7, {HEAD: 1}),
    # mixtures of experts: the experts' weights are stacks of matrices
    "mixtral": Species("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}, text, 4, EXPERTS),
    "qwen3_moe": Species("Qwen3MoeForCausalLM", GROUPED | {"head_dim": 8} | MOE, text, 4, EXPERTS),
    "olmoe": Species("OlmoeForCausalLM", GROUPED | MOE, text, 4, EXPERTS),
    "gpt_oss": Species("GptOssForCausalLM", GROUPED | {"head_dim": 8, "num_local_experts": 4}, text, 4, EXPERTS),
    "granitemoe": Species("GraniteMoeForCausalLM", GROUPED | {"num_local_experts": 4}, text, 4, EXPERTS),
    "deepseek_v3": Species(
        "DeepseekV3ForCausalLM",
        DECODER
        | {"num_key_value_heads": 4, "num_hidden_layers": 2, "moe_intermediate_size": 24, "n_routed_experts": 4}
        | {"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 12}
        | {"q_lora_rank": 24, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8},
        text,
        16,
        {HEAD: 1, COMPUTED: 1, STACK: 2},  # its router casts the weight to float32
    ),
    # state spaces and convolutions
    "mamba": Species(
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": TOKENS, "state_size": 4, "time_step_rank": 8},
        text,
        4,
        {HEAD: 1},
    ),
    "mamba2": Species(
        "Mamba2ForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": TOKENS, "state_size": 8, "num_heads": 8}
        | {"head_dim": 8, "n_groups": 2, "chunk_size": 4},
        text,
        2,
        {HEAD: 1},
    ),
    "lfm2": Species(
        "Lfm2ForCausalLM",
        GROUPED | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        text,
        12,
        {HEAD: 1},
    ),
    # encoders
    "bert": Species("BertModel", ENCODER, text, 7),
    "bert_masked": Species("BertForMaskedLM", ENCODER, text, 7, {HEAD: 1}),
    "roberta": Species("RobertaForMaskedLM", ENCODER | {"max_position_embeddings": 40}, text, 7, {HEAD: 1}),
    "distilbert": Species(
        "DistilBertModel",
        {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": TOKENS, "max_position_embeddings": 32},
        text,
        6,
    ),
    "electra": Species("ElectraModel", ENCODER | {"embedding_size": 16}, text, 7),
    "albert": Species("AlbertModel", ENCODER | {"embedding_size": 16, "num_hidden_layers": 2}, text, 14),
    "deberta_v2": Species(
        "DebertaV2Model",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        text,
        8,
    ),
    "mpnet": Species("MPNetModel", DECODER, text, 7),
    "modernbert": Species(
        "ModernBertModel", DECODER | {"cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 2}, text, 8
    ),
    "xlnet": Species(
        "XLNetModel",
        {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "vocab_size": TOKENS},
        text,
        2,
        {HEADS: 5},
    ),
    # encoders with decoders
    "t5": Species(
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": TOKENS}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        text_pair,
        18,
        {HEAD: 1},
    ),
    "bart": Species("BartForConditionalGeneration", SEQ2SEQ, text_pair, 16, {HEAD: 1}),
    "whisper": Species(
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        spectrum,
        16,
        {HEAD: 1},
    ),
    # images and sounds
    "vit": Species("ViTModel", VISION, image, 7),
    "dinov2": Species("Dinov2Model", VISION | {"mlp_ratio": 2}, image, 6),
    "convnext": Species(
        "ConvNextModel",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "layer_scale_init_value": 1.0},
        image,
        4,
    ),
    "swin": Species(
        "SwinModel",
        {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        image,
        13,
    ),
    "segformer": Species(
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
        | {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 16, "num_labels": 12},
        large_image,
        16,
    ),
    "clip": Species(
        "CLIPModel",
        {"text_config": _TEXT_PART | {"eos_token_id": 2}, "vision_config": VISION, "projection_dim": 24},
        image_and_text,
        14,
    ),
    # Its pooling is a cross attention, whose input projection is one parameter of which queries read one part.
    "siglip": Species(
        "SiglipModel",
        {"text_config": _TEXT_PART, "vision_config": VISION},
        image_and_text,
        16,
        {VIEW: 2},
        share=0.8,
    ),
    "wav2vec2": Species("Wav2Vec2ForCTC", SPEECH, sound, 7, {HEAD: 1}),
    "hubert": Species("HubertModel", SPEECH, sound, 7),
}
