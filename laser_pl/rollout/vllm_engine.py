"""Rollouts by vLLM: in this process, or in servers of their own; the score in the same generation.

Both take token ids and give token ids; how the score is read is in `laser_pl/serving.py`.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from laser_pl.distributed import derive_seed, rank, world_size
from laser_pl.errors import UserError, one_line
from laser_pl.models.gathered import whole_weights
from laser_pl.rollout.engine import Rollout, Sampling

if TYPE_CHECKING:
    from laser_pl.serving import SelfReward

# A CPU's default KV cache; on a GPU vLLM takes its share of the memory.
CPU_CACHE_GB = 1.0
# That a rank has open at a server; which of them run at once is the server's business.
MAX_REQUESTS = 256


class VllmEngine:
    """vLLM in this process, with the policy's weights pushed into it before each generation.

    It is started at the first use, when the policy has its place in memory. On a GPU it sleeps
    between the rollouts, without weights or cache.

    Args:
        judge: the score token and the EOS tokens.
        model: name or folder that the shape and the tokenizer are read from, as vLLM takes it.
        max_positions: longest prompt and response together, in tokens.
        gpu_memory_utilization: share of a GPU's memory.
        kv_cache_gb: size of the KV cache; None takes vLLM's own, or CPU_CACHE_GB on a CPU.
        arguments: more of vLLM's `LLM`, such as dtype.
    """

    def __init__(
        self,
        judge: SelfReward,
        model: str,
        max_positions: int,
        gpu_memory_utilization: float,
        kv_cache_gb: float | None,
        **arguments: Any,
    ) -> None:
        self.judge = judge
        self.arguments = {
            "model": model,
            "max_model_len": max_positions + 1,  # the score token's
            "gpu_memory_utilization": gpu_memory_utilization,
            **arguments,
        }
        self.kv_cache_gb = kv_cache_gb
        self._llm: Any = None

    @contextmanager
    def weights_of(self, policy: PreTrainedModel) -> Iterator[None]:
        """Generate with a policy's current weights; on a GPU vLLM is awake inside only."""
        sleeps = policy.device.type == "cuda"
        with _untouched_process():
            if self._llm is None:
                self._llm = self._start(policy.device.type)
            elif sleeps:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": whole_weights(policy)}
            )
            if sleeps:
                self._llm.wake_up(tags=["kv_cache"])
            # What is cached of prompts is of the weights before.
            self._llm.reset_prefix_cache()
        try:
            yield
        finally:
            if sleeps:
                self._llm.sleep(level=2)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rollouts_per_prompt: int,
        sampling: Sampling,
        seed: int,
        on_finished: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """Sample responses to each prompt, as `RolloutEngine.generate` says.

        vLLM reports log-probs at temperature 1; at another temperature they are NaN, unknown.
        """
        from vllm.sampling_params import RequestOutputKind

        from laser_pl.serving import logprobs_of

        asked = self.judge.sampling_params(
            sampling.max_response_tokens,
            sampling.min_response_tokens,
            n=rollouts_per_prompt,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **_common(sampling),
        )
        found: dict[int, list[Rollout]] = {}
        engine = self._llm.llm_engine
        with _untouched_process():
            torch.manual_seed(seed)
            for index, prompt in enumerate(prompts):
                engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, asked)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    found[int(output.request_id)] = [
                        to_rollout(
                            int(output.request_id),
                            completion.token_ids,
                            logprobs_of(completion),
                            isinstance(completion.stop_reason, str),
                            sampling,
                            self.judge,
                        )
                        for completion in output.outputs
                    ]
                    if on_finished is not None:
                        on_finished(found[int(output.request_id)])
        return [rollout for index in range(len(prompts)) for rollout in found[index]]

    def _start(self, device: str) -> Any:
        # In this process: another one would need a copy of the weights sent to it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        from laser_pl.serving import ScoreProcessor

        size = self.kv_cache_gb or (CPU_CACHE_GB if device == "cpu" else None)
        if size is not None:
            self.arguments["kv_cache_memory_bytes"] = int(size * 1e9)
        if world_size() > 1:
            self.arguments["distributed_executor_backend"] = "external_launcher"
        try:
            return LLM(
                load_format="dummy",
                logits_processors=[ScoreProcessor],
                enable_sleep_mode=device == "cuda",
                enforce_eager=device == "cpu",  # compiling takes longer than it saves there
                disable_log_stats=True,
                **self.arguments,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"rollout = vllm: vLLM cannot be started: {one_line(error)}; rollout=hf generates "
                "without it"
            ) from error


class VllmServer:
    """vLLM in processes of its own, which `vllm serve` has started on other devices.

    Rank 0 writes the weights to a folder that the server sees and has them reloaded; each rank asks
    for its own rollouts.

    Args:
        judge: the score token and the EOS tokens.
        url: where the server listens, such as http://node1:8000.
        folder: for the weights, on a file system that the server shares.
        timeout_s: longest wait for an answer.
    """

    def __init__(self, judge: SelfReward, url: str, folder: Path, timeout_s: float) -> None:
        self.judge = judge
        self.url = url.rstrip("/")
        self.folder = folder
        self.timeout_s = timeout_s

    @contextmanager
    def weights_of(self, policy: PreTrainedModel) -> Iterator[None]:
        """Generate with a policy's current weights, once the server has them."""
        weights = {}
        for name, weight in whole_weights(policy):
            if rank() == 0:  # the others take part in the gathering
                weights[name] = weight.cpu().clone()
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / ".model.safetensors.partial"
            save_file(weights, partial, metadata={"format": "pt"})
            partial.rename(self.folder / "model.safetensors")
            kwargs = {"weights_path": str(self.folder.resolve())}
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
            self._post("/reset_prefix_cache", {})
        del weights
        _barrier()
        yield
        _barrier()
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rollouts_per_prompt: int,
        sampling: Sampling,
        seed: int,
        on_finished: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """Sample responses to each prompt, as `VllmEngine.generate`.

        A prompt is a request: the server batches them, and each has a seed of its own, which vLLM
        would otherwise use for every prompt.

        Raises:
            UserError: the server does not answer, or refuses.
        """

        def ask(index: int) -> list[Rollout]:
            own_seed = derive_seed(seed, index) % 2**31
            return self._ask(index, prompts[index], rollouts_per_prompt, sampling, own_seed)

        groups: dict[int, list[Rollout]] = {}
        with ThreadPoolExecutor(max_workers=min(MAX_REQUESTS, len(prompts))) as pool:
            requests = [pool.submit(ask, index) for index in range(len(prompts))]
            try:
                for request in as_completed(requests):
                    group = request.result()
                    groups[group[0].prompt_index] = group
                    if on_finished is not None:
                        on_finished(group)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [rollout for index in range(len(prompts)) for rollout in groups[index]]

    def _ask(
        self, index: int, prompt: Sequence[int], number: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """The rollouts of one prompt."""
        body = self.judge.http_body(
            sampling.max_response_tokens,
            sampling.min_response_tokens,
            prompt=list(prompt),
            n=number,
            seed=seed,
            **_common(sampling),
        )
        choices = self._post("/v1/completions", body)["choices"]
        return [
            to_rollout(
                index,
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                isinstance(choice.get("stop_reason"), str),
                sampling,
                self.judge,
            )
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            found = f"{path} is answered with {error.code}: {error.read().decode()[:300]}"
        except (OSError, ValueError) as error:
            found = f"{path}: {one_line(error)}"
        raise UserError(
            f"rollout.server_url = {self.url}: {found}; start the server as docs/serving.md says"
        )


def to_rollout(
    prompt_index: int,
    ids: Sequence[int],
    logprobs: Sequence[float],
    met_stop_text: bool,
    sampling: Sampling,
    judge: SelfReward,
) -> Rollout:
    """A rollout of what vLLM generated: a response, and the score token if EOS came."""
    from laser_pl.serving import read_score

    token_logprob = read_score(ids, logprobs, judge.token_id, judge.eos_token_ids)
    limit = sampling.max_response_tokens
    # Without EOS there may be one token more than asked for: the score token's place.
    num_tokens = len(ids) - 1 if token_logprob is not None else min(len(ids), limit)
    reason: Literal["eos", "length", "stop"] = "length"
    if token_logprob is not None:
        reason = "eos"
    elif met_stop_text and len(ids) <= limit:
        reason = "stop"
    is_known = sampling.temperature == 1.0
    known = tuple(logprobs[:num_tokens]) if is_known else (math.nan,) * num_tokens
    return Rollout(
        prompt_index,
        tuple(ids[:num_tokens]),
        known,
        reason,
        math.nan if token_logprob is None else token_logprob,
    )


def _common(sampling: Sampling) -> dict[str, Any]:
    """Settings of the same name and meaning in vLLM."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
    }


@contextmanager
def _untouched_process() -> Iterator[None]:
    """Undo what vLLM does to its process: it seeds every generator and sets the threads."""
    python, numpy = random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads(threads)


def _barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()
