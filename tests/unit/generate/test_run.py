"""The whole command, in a process of its own: it joins groups and opens the device seam."""

import subprocess
import sys

import torch

from tests.support.tiny import write_llama

from .test_tokenizer import write_sentencepiece

PROMPT = "def add(a, b):"


def test_greedy_text_is_what_transformers_says(tmp_path):
    from transformers import AutoModelForCausalLM

    from megalemur.generate.tokenizer import load_tokenizer

    write_llama(tmp_path, vocab_size=300, num_layers=2)
    write_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    # no cache on that side: every token is computed from the whole text
    wanted = model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=2)
    command = [sys.executable, "-m", "megalemur.cli.main", "generate", str(tmp_path), "--prompt", PROMPT]
    done = subprocess.run([*command, "--max-tokens", "20"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    added = [token for token in wanted[0, prompt.shape[1] :].tolist() if token != 2]
    assert done.stdout == tokenizer.decode(added) + "\n"
    assert len(set(added)) > 1, "one token over and over would hide a cache that is never read"
