"""Make a small Qwen2 model with seeded random weights for a given tokenizer: something to try a pipeline with.

Takes a tokenizer folder; gives a Hugging Face model folder (config, safetensors, tokenizer files). It knows nothing;
its use is that every command runs on real data, with the real vocabulary, without downloading real weights.

    python examples/make_random_model.py --tokenizer TOKENIZER_DIR --output DIR [--vocab-size 151936]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM


def main() -> int:
    """Make the model as the command line says; exit code 2 where the output is there or the vocabulary too small."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding (default: as many as the tokenizer has)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4, help="attention heads; half as many key-value heads")
    parser.add_argument("--positions", type=int, default=4096, help="longest sequence, tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.output.exists():
        print(f"error: --output {args.output} exists; remove it first", file=sys.stderr)
        return 2
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
    rows = max(tokenizer.get_vocab().values()) + 1
    if args.vocab_size is not None and args.vocab_size < rows:
        print(f"error: --vocab-size {args.vocab_size} is less than the tokenizer's {rows} tokens", file=sys.stderr)
        return 2

    torch.manual_seed(args.seed)
    config = Qwen2Config(
        vocab_size=args.vocab_size or rows,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 2),
        max_position_embeddings=args.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    partial = args.output.with_name(f"{args.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(partial)
    os.replace(partial, args.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: {parameters:,} parameters, {config.vocab_size:,} vocabulary rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
