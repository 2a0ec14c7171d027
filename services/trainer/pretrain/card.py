"""Writes the model card: README.md, evaluation.json and data-manifest.json, all from measured files.

Called last. Every figure comes from `evaluation.json` (which holds the run record, measurement and baselines together)
or from the exported config; only the explanations around them are prose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.trainer.pretrain.corpus import NEAR_DUPLICATE_JACCARD, SHINGLE_WORDS
from services.trainer.pretrain.export import write_text
from services.trainer.pretrain.record import Run

BAR_CELLS = 32


def write(
    out: Path, run: Run, measurement: Mapping[str, Any], baselines: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Writes the three files into `out`, beside the exported model."""
    if measurement["held_out_digest"] != baselines["held_out_digest"]:
        raise ValueError("measurement and baselines were made on different held-out text; measure both again")
    config = json.loads((out / "config.json").read_text())
    evaluation = {"training": asdict(run), "measurement": dict(measurement), "baselines": dict(baselines)}
    write_text(out / "evaluation.json", json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "data-manifest.json", json.dumps(manifest, indent=1) + "\n")
    sections = (
        _introduction(measurement),
        _architecture(config, measurement),
        _data(manifest, run),
        _training(run),
        _held_out(measurement, baselines, run.corpus["held_out_bytes"]),
        _sparsity(config, measurement["gates"]),
        _samples(measurement["samples"]),
        _limits(manifest, measurement),
        _licence(manifest),
    )
    write_text(out / "README.md", "\n\n".join(sections) + "\n")


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """A bar of `cells` characters, `share` of them filled."""
    full = round(min(1.0, max(0.0, share)) * cells)
    return "█" * full + "░" * (cells - full)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _introduction(measurement: Mapping[str, Any]) -> str:
    return f"""\
---
license: apache-2.0
language: [en]
tags: [code, python, glm, sparse]
library_name: transformers
pipeline_tag: text-generation
---

# glm-tiny

A GLM-architecture language model of {measurement["parameters"] / 1e6:.1f} million parameters, trained from scratch on
Python's standard library. Its feed-forward gates use ReLU: for one token of held-out text,
{measurement["gates"]["zero_share"]:.0%} of them are exactly zero. It exists to exercise sparse serving with a real
model, real text and real activations, small enough to ship with the code. It is not an assistant. `make model` makes
it anew.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/glm-tiny")
model = AutoModelForCausalLM.from_pretrained("models/glm-tiny")
ids = tokenizer("def parse_header(line):\\n", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))
```

Every figure below is generated from `evaluation.json`; weights `{measurement["weights"]}`."""


def _architecture(config: Mapping[str, Any], measurement: Mapping[str, Any]) -> str:
    rows = (
        ("class", f"`{config['architectures'][0]}`"),
        ("parameters", f"{measurement['parameters']:,}"),
        ("layers", config["num_hidden_layers"]),
        ("hidden size", config["hidden_size"]),
        ("feed-forward units per layer", config["intermediate_size"]),
        ("feed-forward gate", config["hidden_act"]),
        ("attention heads (query / key-value)", f"{config['num_attention_heads']} / {config['num_key_value_heads']}"),
        ("head size", config["head_dim"]),
        ("rotary share of a head", config["partial_rotary_factor"]),
        ("vocabulary (byte-level BPE)", f"{config['vocab_size']:,}"),
        ("context, tokens", f"{config['max_position_embeddings']:,}"),
        ("head tied to embedding", config["tie_word_embeddings"]),
        ("weights", config["dtype"]),
    )
    return "## Architecture\n\n" + table(("", ""), rows)


def _data(manifest: Mapping[str, Any], run: Run) -> str:
    rows = [
        (side, f"{len(manifest[key]):,}", f"{run.corpus[f'{key}_bytes']:,}")
        for side, key in (("training", "train"), ("held out", "held_out"))
    ]
    packages = ", ".join(f"`{name}`" for name in manifest["held_out_packages"])
    return f"""\
## Data

The source files of CPython {manifest["python"]}'s standard library and its test-suite, as installed on the training
machine. The split is by top-level package, never by line. Held out: {packages}.

Dropped, {len(manifest["dropped"])} files in all: tests named after a held-out package; files with a word
{SHINGLE_WORDS}-gram Jaccard similarity of {NEAR_DUPLICATE_JACCARD:g} or more to another (bottom-k sketches); files that
are mostly tables. Licence headers are cut off.

{table(("side", "files", "bytes"), rows)}

The training stream also holds chat exchanges made from documented functions of the training side: the summary line
asks, the function's source answers. It is {run.corpus["train_tokens"]:,} tokens long. `data-manifest.json` lists every
file's SHA-256, its side, and why a dropped file was dropped."""


def _training(run: Run) -> str:
    plan, machine = run.plan, run.machine
    lengths = ", ".join(f"{length} from {start:.0%}" for start, length in plan["lengths"])
    rows = (
        ("tokens trained on", f"{run.tokens:,} ({run.tokens / run.corpus['train_tokens']:.2f} passes)"),
        ("time", f"{run.spent_s / 60:.0f} min (allowed: {plan['minutes']:g})"),
        ("tokens per second", f"{run.tokens / max(run.spent_s, 1e-9):,.0f}"),
        ("machine", f"{machine['processor']}, {machine['cores']} cores; device: {machine['device']}"),
        ("software", f"Python {machine['python']}, torch {machine['torch']}, {machine['system']}"),
        ("hidden matrices", f"Muon, rate {plan['muon_rate']:g}, weight decay {plan['weight_decay']:g}"),
        ("embedding and norms", f"AdamW, rate {plan['adam_rate']:g}"),
        (
            "schedule over progress",
            f"warm-up to {run.schedule['warm_up_until']:.0%}, linear decay to 0 from {run.schedule['decay_from']:.0%}",
        ),
        ("batch, tokens", f"{plan['batch_tokens']:,}"),
        ("sequence length by progress", lengths),
        ("arithmetic", "bf16 autocast over fp32 weights"),
        ("seed", plan["seed"]),
    )
    return f"""\
## Training

{table(("", ""), rows)}

Progress is the larger of tokens seen / {plan["tokens"]:,} and minutes spent / {plan["minutes"]:g}."""


def _held_out(measurement: Mapping[str, Any], baselines: Mapping[str, Any], available_bytes: int) -> str:
    held, known = measurement["held_out"], measurement["train_sample"]
    figures = [("**glm-tiny**", held["bits_per_byte"], "trained on it")]
    for name, result in baselines["results"].items():
        order = f" (n = {result['order']})" if "order" in result else ""
        figures.append((name + order, result["bits_per_byte"], result["note"]))
    figures.sort(key=lambda row: row[1])
    worst = figures[-1][1]
    is_all = held["bytes"] == available_bytes
    extent = "all of it" if is_all else f"whole files chosen by hash, of {available_bytes:,} held-out bytes"
    rows = [(name, f"{value:.3f}", f"`{bar(value / worst, 20)}`", note) for name, value, note in figures]
    packages = [
        (f"`{name}`", f"{f['bytes']:,}", f"{f['tokens']:,}", f"{f['bits_per_byte']:.3f}")
        for name, f in measurement["packages"].items()
    ]
    return f"""\
## Held-out text: bits per UTF-8 byte

Lower is better. The same {held["bytes"]:,} bytes for every row: {held["documents"]} files, {extent}.
glm-tiny reads each file in windows of {measurement["window_tokens"]} tokens with a stride of
{measurement["stride_tokens"]}; compressors read all files as one stream.

{table(("", "bits/byte", "", "what it knows of the training text"), rows)}

Perplexity per token: {held["perplexity_per_token"]:.2f}. On {known["bytes"]:,} bytes of its own training text glm-tiny
needs {known["bits_per_byte"]:.3f} bits per byte.

{table(("package", "bytes", "tokens", "bits/byte"), packages)}"""


def _sparsity(config: Mapping[str, Any], gates: Mapping[str, Any]) -> str:
    layers = list(enumerate(gates["zero_share_by_layer"]))
    rows = [
        (index, f"{share:.1%}", gates["units_never_active_by_layer"][index], config["intermediate_size"])
        for index, share in layers
    ]
    picture = "\n".join(f"layer {index}  {bar(share)}  {share:6.1%}" for index, share in layers)
    return f"""\
## Sparsity of the feed-forward gates

Share of gate activations that are exactly zero, over {gates["positions"]:,} held-out positions:
{gates["zero_share"]:.1%} in all.

{table(("layer", "exactly zero", "units never active", "of"), rows)}

```
{picture}
```"""


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    parts = ["## Samples", "Prompts are taken from held-out files in the order of their hash: nobody chose them."]
    for sample in samples:
        how = f"temperature {sample['temperature']:g}, seed {sample['seed']}" if sample["temperature"] else "greedy"
        facts = (
            "ended by itself" if sample["has_ended"] else "cut at the length limit",
            "parses as Python" if sample["is_python"] else "does not parse as Python",
        )
        fence = "~~~~"
        parts.append(
            f"**{sample['kind'].capitalize()}** ({sample['source']}; {how}; {', '.join(facts)})\n\n"
            f"{fence}text\n{sample['prompt']}\n{fence}\n\n{fence}python\n{sample['text'].strip(chr(10))}\n{fence}"
        )
    return "\n\n".join(parts)


def _limits(manifest: Mapping[str, Any], measurement: Mapping[str, Any]) -> str:
    samples = measurement["samples"]
    parsing = sum(1 for sample in samples if sample["is_python"])
    near = [path for path in manifest["train"] if _names_held_out(path, manifest["held_out_packages"])]
    close = (
        "The names of these training-side test files begin with that of a held-out package but are one word with more, "
        "so the filter did not drop them; they may call held-out code, and contain none: "
        + ", ".join(f"`{path}`" for path in near)
        + "."
        if near
        else "No training-side test file has a name that begins with that of a held-out package."
    )
    return f"""\
## Limits

- It continues Python in the manner of the standard library. It does not know what it says: {parsing} of
  {len(samples)} samples above parse, and parsing is not working.
- English appears only as comments, docstrings and documentation-like requests; other languages hardly at all.
- System prompts, tools and turns after the first are understood by the chat template but were not trained.
- Nothing was done about safety; do not put its output in front of people as advice, and do not run its code.
- {close}
- Both sides of the split are by the same project, in one style, and refer to each other. Text from elsewhere will
  cost more bits."""


def _licence(manifest: Mapping[str, Any]) -> str:
    return f"""\
## Licence

The weights, configuration and tokenizer are Apache-2.0. The training text is CPython {manifest["python"]}'s standard
library, © Python Software Foundation and contributors, under the PSF Licence Agreement (some files carry further
permissive notices). None of that text is distributed here except as hashes in `data-manifest.json` and as the short
prompts under Samples; the model may repeat passages of it, and those stay under their own licence."""


def _names_held_out(path: str, packages: Sequence[str]) -> bool:
    words = path.removesuffix(".py").rsplit("/", 1)[-1].removeprefix("test_").split("_")
    return path.startswith("test/") and any(
        word != package and word.startswith(package) for word in words for package in packages
    )
