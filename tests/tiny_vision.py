"""Tiny random models that see, on disk, one of each family that is served as transformers would.

Real classes, real image processors (on Pillow), real processors and chat templates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve.quantization.processor import make_processor, processor_class
from tests.tiny import tiny_tokenizer

ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def template(image: str) -> str:
    """ChatML with content as a string or a list of parts; `image` stands for a picture."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + image + "{% elif p['type'] == 'text' %}{{ p['text'] }}"
        "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _text(words: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    } | more


def _words(special: tuple[str, ...], image: str, **named: str) -> Any:
    """`named` are tokens that processors ask the tokenizer for by attribute."""
    from transformers import PreTrainedTokenizerFast

    made = tiny_tokenizer((*ENDS, *special), template(image))
    words = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        eos_token=made.eos_token,
        pad_token=made.pad_token,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named,
    )
    words.chat_template = made.chat_template
    return words


def _siglip(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    } | more


def qwen2_5_vl(folder: Path) -> Path:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = _words(
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
    )
    config = Qwen2_5_VLConfig(
        text_config=_text(
            words, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                    "mrope_section": [2, 3, 3]}
        ),
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
            "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1],
        },
        **_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
               vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    )  # fmt: skip
    seeing = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 784 * 24})
    return _save(folder, config, Qwen2_5_VLProcessor, seeing, words)


def qwen3_vl(folder: Path) -> Path:
    from transformers import Qwen3VLConfig, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = _words(
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
    )
    config = Qwen3VLConfig(
        text_config=_text(
            words, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                 "mrope_section": [4, 2, 2]}
        ),
        vision_config={
            "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
            "out_hidden_size": 64, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
               vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    )  # fmt: skip
    seeing = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 1024 * 20},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return _save(folder, config, Qwen3VLProcessor, seeing, words)


def gemma3(folder: Path) -> Path:
    from transformers import Gemma3Config, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    words = _words(
        special, special[0], boi_token=special[0], eoi_token=special[1], image_token=special[2]
    )
    config = Gemma3Config(
        text_config=_text(
            words, head_dim=16, sliding_window=32, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=_siglip(vision_use_head=False),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        **_ids(words, boi_token_id=special[0], eoi_token_id=special[1], image_token_id=special[2]),
    )  # fmt: skip
    seeing = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    return _save(folder, config, Gemma3Processor, seeing, words, image_seq_length=4)


def smolvlm(folder: Path) -> Path:
    from transformers import SmolVLMConfig, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return _idefics(folder, SmolVLMConfig, SmolVLMProcessor, SmolVLMImageProcessorPil)


def idefics3(folder: Path) -> Path:
    from transformers import Idefics3Config, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    return _idefics(folder, Idefics3Config, Idefics3Processor, Idefics3ImageProcessorPil)


def _idefics(folder: Path, config_class: Any, processor_class: Any, image_class: Any) -> Path:
    rows = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
    words = _words(
        ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>", *rows),
        "<image>",
    )
    config = config_class(
        text_config={"model_type": "llama"} | _text(words),
        vision_config=_siglip(),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
        **_ids(words, image_token_id="<image>"),
    )
    seeing = image_class(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return _save(folder, config, processor_class, seeing, words, image_seq_len=4)


def llava_onevision(folder: Path) -> Path:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    words = _words(("<image>", "<video>"), "<image>", image_token="<image>", video_token="<video>")
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2"} | _text(words),
        vision_config={"model_type": "siglip_vision_model"} | _siglip(vision_use_head=False),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **_ids(words, image_token_id="<image>", video_token_id="<video>"),
    )
    seeing = LlavaOnevisionImageProcessorPil(
        size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    )
    return _save(
        folder, config, LlavaOnevisionProcessor, seeing, words,
        num_image_tokens=16, vision_feature_select_strategy="full",
    )  # fmt: skip


def llava(folder: Path) -> Path:
    from transformers import LlavaConfig, LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = _words(("<image>",), "<image>", image_token="<image>")
    config = LlavaConfig(
        text_config={"model_type": "llama"} | _text(words),
        vision_config={"model_type": "siglip_vision_model"} | _siglip(vision_use_head=False),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=16,
        tie_word_embeddings=False,
        **_ids(words, image_token_id="<image>"),
    )
    seeing = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    return _save(
        folder, config, LlavaProcessor, seeing, words,
        patch_size=14, vision_feature_select_strategy="full", num_additional_image_tokens=0,
    )  # fmt: skip


def mistral3(folder: Path) -> Path:
    from transformers import Mistral3Config
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    special = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    words = _words(special, "[IMG]")
    config = Mistral3Config(
        text_config={"model_type": "mistral"} | _text(words, head_dim=16, sliding_window=None),
        vision_config={
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112, "patch_size": 14,
        },
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **_ids(words, image_token_id="[IMG]"),
    )  # fmt: skip
    patch = {"height": 28, "width": 28}
    seeing = PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size=patch)
    return _save(
        folder,
        config,
        processor_class("PixtralProcessor"),
        seeing,
        words,
        patch_size=14,
        spatial_merge_size=2,
    )


FAMILIES = {
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "Gemma 3": gemma3,
    "SmolVLM": smolvlm,
    "Idefics3": idefics3,
    "Llava": llava,
    "Llava-OneVision": llava_onevision,
    "Mistral 3": mistral3,
}


def _ids(words: Any, **tokens: str) -> dict[str, int]:
    return {name: int(words.convert_tokens_to_ids(token)) for name, token in tokens.items()}


def _save(
    folder: Path, config: Any, processor_class: Any, seeing: Any, words: Any, **settings: Any
) -> Path:
    import torch
    from transformers import AutoModelForImageTextToText

    processor = make_processor(
        processor_class,
        {"image_processor": seeing, "tokenizer": words},
        {"chat_template": words.chat_template} | settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).float().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    wide = 0.7 if "embed_tokens" in name else weight[0].numel() ** -0.5
                    weight.normal_(0.0, wide)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
