"""Small generative models with random weights in their libraries' files, for tests of what is made by them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "[EOS]")
PROMPTS = (
    *("rewrite", "image", "captions", "in", "4", "2", "different", "ways", ".", "=>"),
    *("what", "does", "the", "describe", "?"),
)


def tokenizer(words: Iterable[str]) -> Any:
    """A token a word."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    vocabulary = list(dict.fromkeys((*SPECIAL, *PROMPTS, *words)))
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    inner.normalizer = tokenizers.normalizers.Lowercase()
    split = tokenizers.pre_tokenizers
    inner.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Split(tokenizers.Regex(r"[.?]"), "isolated")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip


def causal(place: Path, words: Iterable[str], context: int = 512) -> Path:
    """A small GPT-2."""
    transformers = pytest.importorskip("transformers")
    mine = tokenizer(words)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(mine), n_positions=context, n_embd=16, n_layer=1, n_head=2, bos_token_id=4, eos_token_id=5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(place)
    mine.save_pretrained(place)
    return place


def seq2seq(place: Path, words: Iterable[str]) -> Path:
    """A small T5."""
    transformers = pytest.importorskip("transformers")
    mine = tokenizer(words)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(mine), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=5,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(place)
    mine.save_pretrained(place)
    return place


def asked_captioner(place: Path, words: Iterable[str], size: int = 32) -> Path:
    """A small GIT, which goes on from a prompt."""
    transformers = pytest.importorskip("transformers")
    mine = tokenizer(words)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**sizes, "image_size": size, "patch_size": 16}
    config = transformers.GitConfig(
        vision_config=vision, vocab_size=len(mine), **sizes, bos_token_id=4, eos_token_id=5, pad_token_id=0
    )
    transformers.GitForCausalLM(config).save_pretrained(place)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    transformers.GitProcessor(images, mine).save_pretrained(place)
    return place


def captioner(place: Path, words: Iterable[str], size: int = 32) -> Path:
    """A small ViT with a small GPT-2, which is asked nothing."""
    transformers = pytest.importorskip("transformers")
    mine = tokenizer(words)
    torch.manual_seed(0)
    vision = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=size,
        patch_size=16,
    )  # fmt: skip
    text = transformers.GPT2Config(vocab_size=len(mine), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id = config.decoder.bos_token_id = 4
    config.eos_token_id, config.pad_token_id = 5, 0
    transformers.VisionEncoderDecoderModel(config).save_pretrained(place)
    transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(place)
    mine.save_pretrained(place)
    return place


def painter(place: Path, size: int = 32) -> Path:
    """A small Stable Diffusion."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: images of captions are not tested")
    transformers = pytest.importorskip("transformers")
    vocabulary = [*(chr(c) for c in range(97, 123)), *(f"{chr(c)}</w>" for c in range(97, 123))]
    vocabulary = {w: i for i, w in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1, pad_token_id=len(vocabulary) - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=size // 2, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    words = place / "words"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=transformers.CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(place)
    return place


def chat_captioner(place: Path, words: Iterable[str], size: int = 32) -> Path:
    """A small LLaVA, which is asked in a chat."""
    transformers = pytest.importorskip("transformers")
    mine = tokenizer(words)
    mine.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=size, patch_size=16),
        text_config=transformers.LlamaConfig(
            **sizes, vocab_size=len(mine), bos_token_id=4, eos_token_id=5, pad_token_id=0
        ),
        image_token_id=mine.convert_tokens_to_ids("<image>"),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(place)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ '<image> ' if c.type == 'image' else c.text }}{% endfor %}"
        "{% endfor %} =>"
    )
    transformers.LlavaProcessor(
        images, mine, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(place)  # fmt: skip
    return place
