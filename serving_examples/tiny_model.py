"""python serving_examples/tiny_model.py FOLDER.

Writes a tiny mixture-of-experts model with random weights, for the other examples and the tests: nothing is downloaded.
A second argument is its kind: qwen3_moe (default), qwen2_moe (with shared experts) or mixtral; a third the number of
layers.
"""

from pathlib import Path
from typing import Any

KINDS = ("qwen3_moe", "qwen2_moe", "mixtral")
VOCABULARY = 512  # 256 bytes, three special tokens, room
SPECIAL = ("<pad>", "<bos>", "<eos>")


def make_tokenizer() -> Any:
    """One token for each byte: needs no corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*bytes_, *SPECIAL])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def make_model(kind: str, folder: Path, num_layers: int = 2) -> None:
    """Write a model of hidden 256 and 8 experts, of which a token takes 2.

    Args:
        kind: "qwen3_moe", "qwen2_moe" (which has shared experts) or "mixtral".
        folder: where to.
        num_layers: all of them with experts.
    """
    import torch
    import transformers as hf

    tokenizer = make_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    experts = {"num_experts": 8, "moe_intermediate_size": 128, "intermediate_size": 512, "norm_topk_prob": True}
    config: Any
    if kind == "qwen3_moe":
        config = hf.Qwen3MoeConfig(**common, **experts)
        model: Any = hf.Qwen3MoeForCausalLM
    elif kind == "qwen2_moe":
        config = hf.Qwen2MoeConfig(**common, **experts, shared_expert_intermediate_size=256)
        model = hf.Qwen2MoeForCausalLM
    else:
        config = hf.MixtralConfig(**common, num_local_experts=8, intermediate_size=128)
        model = hf.MixtralForCausalLM
    torch.manual_seed(1)
    made = model(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() >= 2:  # norms stay ones
                parameter.normal_(0, 0.08)
    made.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    import sys

    folder, kind, num_layers = (sys.argv[1:] + ["", KINDS[0], "2"][len(sys.argv) - 1 :])[:3]
    if not 2 <= len(sys.argv) <= 4 or kind not in KINDS or not num_layers.isdigit() or int(num_layers) < 1:
        raise SystemExit(f"usage: {sys.argv[0]} FOLDER [{'|'.join(KINDS)} [LAYERS]]")
    make_model(kind, Path(folder), int(num_layers))
    print(f"a model of kind {kind} in {folder}")
