"""``push_to_hub`` and loading by hub id, against a small model hub on this machine that keeps files in memory."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("peft", minversion="0.21")

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks when it makes a repository, uploads small files and downloads them."""

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            given = json.loads(body)
            self.answer({"url": f"{given.get('organization', 'me')}/{given['name']}", "id": "1"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/adapter/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        else:
            self.answer({"valid": True})  # of a model card

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/resolve/")[2].partition("/")[2]
        if "/resolve/" in self.path and name in self.files:
            content = self.files[name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, ETag=etag, X_Repo_Commit=COMMIT, X_Linked_Size=str(len(content)))
        elif "/resolve/" in self.path:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")
        elif "whoami" in self.path:
            self.answer({"name": "me", "type": "user", "orgs": []})
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "me/adapter", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    do_HEAD = do_GET  # noqa: N815  # as the server calls it


@pytest.fixture
def hub():
    handler = type("Handler", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.files
    server.shutdown()


PUSH_AND_LOAD = textwrap.dedent("""
    import sys
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    from huggingface_hub import upload_folder
    from rigsa import RigsaConfig, write_card

    base, ids = sys.argv[1], torch.tensor([[1, 5, 9, 2]])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), RigsaConfig(density=0.2, alpha_init=0.3))
    expected = model.eval()(input_ids=ids).logits
    model.push_to_hub("me/adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/adapter")
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained("me/adapter").eval()(input_ids=ids).logits, expected)
    other = AutoModelForCausalLM.from_pretrained(base)
    other.load_adapter("me/adapter")
    assert torch.equal(other.eval()(input_ids=ids).logits, expected)
    model.save_pretrained(sys.argv[2])
    write_card(model, sys.argv[2], "peft", data="chats.jsonl")
    upload_folder(repo_id="me/adapter", folder_path=sys.argv[2])
""")


def test_an_adapter_is_pushed_and_loaded_by_its_hub_id(hub, small_model_folder, tmp_path):
    address, files = hub
    surroundings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path),
                    "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", PUSH_AND_LOAD, str(small_model_folder), str(tmp_path / "here")],
        capture_output=True, text=True, env=os.environ | surroundings, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "densities.png"} <= files.keys()
    assert "Trained on: chats.jsonl" in files["README.md"].decode()
