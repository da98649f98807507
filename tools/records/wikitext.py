"""WikiText-2 (validation) by both protocols, for our own small llama, which was trained on stories and plays.

lines: the first 100 lines that are not blank, each alone, at most 512 tokens, no BOS, as in the table of record (GPT-2
40.64, the 253M model 27.03). sliding: every token once, with half the context before it. The table itself, on a GPU:

mlx-training train language/modern_llm_253m dataset.path=TEXT model.tokenizer=GPT2_FILES
mlx-training evaluate runs/modern_llm_253m --data wiki.valid.txt --protocol lines
mlx-training evaluate runs/modern_llm_253m --data wiki.valid.txt --protocol sliding --stride 512
"""

from tools.records import families
from tools.records.lab import Lab, table


def make(lab: Lab) -> list[str]:
    """Evaluate twice."""
    run = Lab("families").train("llama", families.config(lab, "llama"))
    rows = []
    for protocol in ("lines", "sliding"):
        scores = lab.evaluate(run, "--data", lab.data("wikitext2/valid.txt"), "--protocol", protocol)
        rows.append((protocol, scores["tokens"], *(scores[key] for key in ("perplexity", "loss", "bits_per_byte"))))
    return table(("protocol", "tokens", "perplexity", "nats/token", "bits/byte"), rows)
