"""The model card of an export: what the model is, how to load it, and where it would go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sigma_lite.serve.quantised import KIND
from sigma_lite.serve.trained import Trained

CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags: [{kind}, mixture-of-experts, sigma-lite]
---
# {title}

{layers} layers of width {width}, {experts}.
{total:,} parameters, of which {active:,} and the embedding work for a token.
Trained by sigma_lite to step {step:,} on rows of {length} tokens.{heldout}

{loading}{traps}
"""

LOADING = """## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer({end!r} + "import os", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

- In training `{end}` begins every document, so put it before a prompt. `generate()` stops where the model writes it.
- transformers 4.57 and 5.x: `config.json` has the keys of both, the experts lie in files one by one.
- lm-evaluation-harness: `lm_eval --model hf --model_args pretrained=FOLDER,dtype={dtype}`.
- vLLM reads this layout by its source; it was not run.
- No code comes with the model: leave `trust_remote_code` at False.
"""

LOADING_INT8 = """## Loading

```python
from sigma_lite.serve.trained import Trained

print("".join(Trained(FOLDER).continue_text("import os", 50)))
```

Experts are int8 with a scale for each row, routers fp32, the rest bfloat16: only sigma_lite reads that, and transformers
refuses the `model_type`. `sigma-lite export FOLDER OUT` writes the same model for transformers.
"""

NO_GGUF = """
## Not for llama.cpp

`norm_topk_prob` is false: a gate is the router's probability **before** top-k. llama.cpp's qwen3moe graph renormalises
the gates of the chosen experts whatever the config says. With {top_k} expert(s) per token that computes another model, and
no error says so (with one expert, every gate would be 1). Do not convert this folder to GGUF. And do not train it further
with `norm_topk_prob: true`: with one expert that cuts the router off from the language-model loss.
"""


def card(trained: Trained, config: Mapping[str, Any], bits_per_byte: float | None) -> str:
    """README.md of an export with this config.json."""
    net, K = trained.model.config, trained.model.k_per_layer
    dense, int8 = net.n_experts == 1, config["model_type"].startswith(KIND)
    end = trained.tokenizer.id_to_token(trained.end_of_text)
    ledger = net.ledger(K)
    return CARD.format(
        library="sigma_lite" if int8 else "transformers",
        kind=config["model_type"],
        title=f"A {'dense' if dense else 'mixture-of-experts'} language model",
        layers=net.n_layers,
        width=net.d_model,
        experts="dense" if dense else f"{net.n_experts} experts in each, of which {K[0]} per token",
        total=ledger.total,
        active=ledger.active,
        step=trained.step,
        length=trained.length,
        heldout="" if bits_per_byte is None else f" Held-out text costs {bits_per_byte:.4f} bits per byte.",
        loading=LOADING_INT8 if int8 else LOADING.format(end=end, dtype=config["dtype"]),
        traps="" if dense or int8 or net.renormalise else NO_GGUF.format(top_k=K[0]),
    )
