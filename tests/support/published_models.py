"""Configurations of published models, cut to what memory depends on, with their known numbers of parameters.

The numbers of parameters were counted by building each model, without its weights, from its configuration.
"""

from __future__ import annotations

from typing import Any

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3", "original_max_position_embeddings": 8192},
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
QWEN_3B = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "max_window_layers": 70, "sliding_window": 32768, "use_sliding_window": False,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN_7B = QWEN_3B | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_window_layers": 28, "sliding_window": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_32B = QWEN_7B | {
    "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
    "num_key_value_heads": 8,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 32768, "sliding_window": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL = MISTRAL_7B | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
    "sliding_window": None,
}  # fmt: skip
DEEPSEEK_LITE = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 102400, "num_experts_per_tok": 6,
    "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
}  # fmt: skip
GEMMA2_9B = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 14336,
    "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "vocab_size": 256000, "sliding_window": 4096, "max_position_embeddings": 8192, "torch_dtype": "float32",
}  # fmt: skip
GEMMA3_27B = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}  # fmt: skip
GEMMA3_4B = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 201088, "sliding_window": 128, "max_position_embeddings": 131072, "num_experts_per_tok": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
PHI3_MINI = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA2_7B_GPTQ = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    "torch_dtype": "float16", "quantization_config": {"bits": 4, "group_size": 128, "quant_method": "gptq"},
}  # fmt: skip
QWEN_7B_AWQ = QWEN_7B | {
    "quantization_config": {"bits": 4, "group_size": 128, "quant_method": "awq"}, "torch_dtype": "float16",
}  # fmt: skip
BGE_M3 = {
    "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 250002, "max_position_embeddings": 8194,
    "torch_dtype": "float32",
}  # fmt: skip
E5_LARGE = BGE_M3 | {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
QWEN3_235B = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "num_experts_per_tok": 8, "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip
# What tests/vllm/make_tiny_model.py makes.
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048,
    "max_position_embeddings": 2048, "dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip

Config = dict[str, Any]
# Configuration, parameters, bytes one token takes in the cache in 16 bits, layers that keep all, and a window.
PUBLISHED: dict[str, tuple[Config, int, int, int, int]] = {
    "Llama-3.1-8B": (LLAMA_8B, 8_030_261_248, 131_072, 32, 0),
    "Llama-3.1-70B": (LLAMA_70B, 70_553_706_496, 327_680, 80, 0),
    "Qwen2.5-3B": (QWEN_3B, 3_085_938_688, 36_864, 36, 0),
    "Qwen2.5-7B": (QWEN_7B, 7_615_616_512, 57_344, 28, 0),
    "Qwen2.5-32B": (QWEN_32B, 32_763_876_352, 262_144, 64, 0),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096, 131_072, 0, 32),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704, 131_072, 32, 0),
    "DeepSeek-V2-Lite": (DEEPSEEK_LITE, 15_706_484_224, 31_104, 27, 0),
    "gemma-2-9b": (GEMMA2_9B, 9_241_705_984, 344_064, 21, 21),
    "gemma-3-27b": (GEMMA3_27B, 27_432_406_640, 507_904, 10, 52),
    "gemma-3-4b": (GEMMA3_4B, 4_300_079_472, 139_264, 5, 29),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184, 49_152, 12, 12),
    "Phi-3-mini-4k": (PHI3_MINI, 3_821_079_552, 393_216, 0, 32),
    "Llama-2-7B-GPTQ": (LLAMA2_7B_GPTQ, 6_738_415_616, 524_288, 32, 0),
    "bge-m3": (BGE_M3, 567_754_752, 0, 24, 0),
    "e5-large-v2": (E5_LARGE, 335_141_888, 0, 24, 0),
}
