"""Peak memory of an update by vocabulary and length: `python benchmarks/memory.py`.

Forward and backward of a Llama of two layers (width 256, float32) over 4 sequences, each case in a
process of its own. Prints what the process grew by beside the size that all logits would have, and
writes it as JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from step_times import save

VOCABULARIES, LENGTHS, NUM_SEQUENCES = (32_000, 64_000, 128_000), (512, 2048), 4


def main() -> None:
    """Run every case, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/memory.json"))
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(grown(*arguments.case))
        return
    results = []
    print("| vocabulary | response tokens | peak of the update, GB | all logits, GB |")
    print("| --- | --- | --- | --- |")
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            command = [sys.executable, __file__, "--case", str(vocabulary), str(length)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            size = int(done.stdout.split()[-1])
            everything = 4 * NUM_SEQUENCES * length * vocabulary
            results.append({"vocabulary": vocabulary, "length": length, "bytes": size})
            print(f"| {vocabulary:,} | {NUM_SEQUENCES} x {length} | {size / 1e9:.2f} "
                  f"| {everything / 1e9:.2f} |", flush=True)  # fmt: skip
    save(results, arguments.output)


def grown(vocabulary: int, length: int) -> int:
    """Bytes that the process grows by in a forward and backward, gradients included."""
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from zero_memory import high_water

    from laser_pl.rollout.batch import pad_rollouts
    from laser_pl.rollout.engine import Rollout
    from laser_pl.training.forward import ResponseHead, response_forward

    torch.set_num_threads(2)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.gradient_checkpointing_enable()
    rollout = Rollout(0, (7,) * (length - 1) + (2,), (0.0,) * length, "eos", -9.0)
    batch = pad_rollouts([rollout] * NUM_SEQUENCES, [(5, 6, 7)], pad_token_id=0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = psutil.Process().memory_info().rss
    output = response_forward(model, ResponseHead(model), batch, 3, temperature=1.0)
    (output.logprobs.sum() + output.token_logprob.sum()).backward()
    return high_water(os.getpid()) - before


if __name__ == "__main__":
    main()
