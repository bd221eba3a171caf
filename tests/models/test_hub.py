"""A model from a hub, here one on loopback: downloaded once a node, and kept."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from laser_pl.models import loading

ROOT = Path(__file__).parent.parent.parent
TINY = Path(loading.__file__).parent / "tiny"
COMMIT = "1" * 40
NAME = "someone/some-model"
FACTS = {
    "special_token": "<|reserved_1|>", "token_id": 3, "eos_token_ids": [1], "beta": 0.25,
    "c_ref": -21.0, "threshold": 0.5,
}  # fmt: skip


@pytest.fixture
def hub():
    """A hub with one model; returns its address and how often each file's content was sent."""
    files = {path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix != ".py"}
    files = {name: content for name, content in files.items() if "." in name}
    files["self_reward.json"] = json.dumps(FACTS).encode()
    sent: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            name = self.path.rpartition("/")[2].partition("?")[0]
            if self.path.startswith(f"/api/models/{NAME}") and "/tree/" not in self.path:
                siblings = [{"rfilename": file} for file in files]
                facts = {"id": NAME, "sha": COMMIT, "siblings": siblings}
                self.reply(200, json.dumps(facts).encode(), {}, with_body)
            elif f"/{NAME}/resolve/" in self.path and name in files:
                etag = hashlib.sha256(files[name]).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
                sent[name] += with_body
                self.reply(200, files[name], headers, with_body)
            else:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)

        def reply(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", sent
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_two_ranks_of_a_node_download_each_file_once(hub, tmp_path):
    address, sent = hub
    command = [
        sys.executable, str(ROOT / "run.py"), "model=hf", f"model.path={NAME}",
        "self_reward.token=2", "self_reward.beta=0.5", "trainer.devices=2", "prompts_per_step=2",
        "rollouts_per_prompt=4", "micro_batch_size=4", "max_steps=1", "data.num_train=64",
        "data.num_held_out=4", "evaluation.num_problems=2", "evaluation.samples_per_problem=1",
        "evaluation.interim_samples_per_problem=1", "rollout.max_response_tokens=48",
        "logger=csv", f"output_dir={tmp_path}/run",
    ]  # fmt: skip
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sent["model.safetensors"] == 1
    assert sent["tokenizer.json"] == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_trained_model_brings_its_score_from_the_hub(hub, tmp_path):
    address, sent = hub
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [
        sys.executable, str(ROOT / "run.py"), "task=evaluate", "model=hf", f"model.path={NAME}",
        "data.num_held_out=2", "data.samples_per_problem=2", f"output_dir={tmp_path}/run",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["token_id"], summary["beta"], summary["c_ref"]) == (3, 0.25, -21.0)
    script = (
        "from laser_pl.scorer import SelfRewardScorer\n"
        f"scorer = SelfRewardScorer.from_pretrained({NAME!r})\n"
        "print(scorer.token_id, scorer.beta)"
    )
    # The hub is gone; the cache has it all.
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["3", "0.25"], done.stderr[-3000:]
    assert sent["self_reward.json"] == 1
