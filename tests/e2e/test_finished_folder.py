"""What a stage leaves behind is a Hugging Face folder: transformers loads it and, greedy, writes the same tokens."""

from pathlib import Path

import pytest
import torch

from twofold.base.records import Message, Request, SamplingParams
from twofold.llm import LLM
from twofold.model.qwen3 import Qwen3
from twofold.recipes.pretrain import save_model
from twofold.recipes.tiny import FLAGSHIP, SPARSE
from twofold.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["sum mod 10: E1 B5 I6", "let mod 10: C= D7, D=8 find C", "the quick brown fox", "def f(x): return x + 1"]


@pytest.mark.parametrize("shape", [FLAGSHIP, SPARSE], ids=["dense", "moe"])
def test_transformers_continues_the_same_chat(shape, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TEXTS * 50, 400)
    model = Qwen3(shape.build(tokenizer.vocab_size, 1e6, 1024))
    model.init_weights(seed=0)
    with torch.no_grad():  # larger weights, so that greedy choices are not ties
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        model.model.embed_tokens.weight[tokenizer.vocab_size :] = 0  # padded rows: only our engine refuses them
    save_model(model, tokenizer, tmp_path)
    policy = LLM(tmp_path)
    prompts = [policy.renderer.prompt_ids([Message("user", text)]) for text in TEXTS]
    greedy = SamplingParams(temperature=0, max_tokens=16)
    ours = policy.engine.generate([Request(tuple(ids), greedy) for ids in prompts])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids, completion in zip(TEXTS, prompts, ours, strict=True):
        chat = [{"role": "user", "content": text}]
        templated = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert list(templated) == ids
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
        assert out[0, len(ids) :].tolist()[: len(completion.token_ids)] == completion.token_ids
