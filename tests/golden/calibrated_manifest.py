"""Manifests as calibration writes them, for checkpoints that were rounded to nearest or that exist only as a config."""

import json
from pathlib import Path
from typing import Any

from minibble.quantize.config import ModelConfig
from minibble.quantize.inventory import inventory

SAMPLES, SEQ_LEN = 8, 512
CALIBRATION = {
    "text": "stories.txt", "sha256": "5e" * 32, "samples": SAMPLES, "seq_len": SEQ_LEN, "tokens": SAMPLES * SEQ_LEN,
    "seed": 0,
}  # fmt: skip
SETTINGS = {"method": "gptq", "group_size": 128, "damp": 0.01, "act_order": True, "sweeps": 6, "shard_size": 10**9}


def expert_tokens(config: ModelConfig) -> list[list[int]]:
    """Uneven counts that add up to the routed tokens of each layer; in layer 1 expert 0 gets 3 tokens."""
    routed, experts = SAMPLES * SEQ_LEN * config.experts_per_token, config.num_experts
    rows = []
    for layer in range(config.num_hidden_layers):
        weights = [1 + (3 * expert + layer) % experts for expert in range(experts)]
        row = [routed * weight // sum(weights) for weight in weights]
        if layer == 1:
            row[0] = 3
        row[-1] += routed - sum(row)
        rows.append(row)
    return rows


def calibrated(config: ModelConfig, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """`manifest`, or the least there can be, with the keys of a calibration.

    Output errors grow with the layer. The expert with 3 tokens fell back to nearest rounding, expert 1 of layer 0
    was shrunk much, the others a little.
    """
    tokens, quantized = expert_tokens(config), {}
    for spec in inventory(config):
        if spec.role not in ("attention", "expert") or spec.layer is None:
            continue
        seen = SAMPLES * SEQ_LEN if spec.expert is None else tokens[spec.layer][spec.expert]
        record = {
            "relative_error": round(0.009 + 1e-5 * spec.layer, 6),
            "output_error": round(1e-3 * (1 + spec.layer) + 1e-5 * (spec.expert or 0), 6),
            "tokens": seen,
            "damp": 0.01,
        }
        if seen == 3:
            record |= {"output_error": 0.0125, "fallback": "3 tokens, fewer than 4: nearest rounding"}
        elif (spec.layer, spec.expert) == (0, 1):
            record["shrinkage"] = 0.6
        elif spec.expert is not None:
            record["shrinkage"] = 0.02
        quantized[spec.name] = record
    new = {"calibration": CALIBRATION, "settings": SETTINGS, "quantized": quantized, "expert_tokens": tokens}
    return {"manifest_version": 1, "shards": {}} | (manifest or {}) | new


def calibrate_folder(folder: Path) -> dict[str, Any]:
    """Give the checkpoint in `folder` such a manifest; returns it."""
    file = folder / "minibble.json"
    manifest = calibrated(ModelConfig.from_file(folder / "config.json"), json.loads(file.read_text()))
    file.write_text(json.dumps(manifest))
    return manifest
