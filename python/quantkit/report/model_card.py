"""The README.md of an output: what it is, how it was made, how to serve it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .plan_view import schemes
from .table import size

if TYPE_CHECKING:
    from ..plan import Plan


def model_card(plan: Plan) -> str:
    """Markdown with the hub's front matter."""
    path = Path(plan.config.model.model_path)
    base = path.name if path.exists() else str(path)  # a hub id stays whole, a local folder is nobody's business
    kept = f"{len(plan.ignore)} Linears kept in full precision" if plan.ignore else "none kept in full precision"
    dataset, sizes = plan.config.dataset, plan.estimate
    calibration = ""
    if plan.statistics is not None:
        data = plan.statistics.contents
        calibration = f"\n- calibration: {data.rows} rows, {data.tokens} tokens, all through the full-precision model"
    elif dataset is not None and plan.recipe.needs_data:
        count = "all" if dataset.num_samples < 0 else f"up to {dataset.num_samples}"
        calibration = f"\n- calibration: {count} rows of at most {dataset.max_seq_length} tokens"
    tags = dict.fromkeys(group.scheme.name.lower() for group in plan.groups)
    listed = "\n".join(f"- {line}" for line in schemes(plan))
    return f"""---
base_model: {base}
base_model_relation: quantized
tags: [{plan.format.NAME}, quantkit{"".join(f", {tag}" for tag in tags)}]
---

# {plan.config.stem}

`{base}` quantized with quantkit: {plan.recipe.name}.

{listed}
- {len(plan.modules)} Linears quantized, {kept}
- size: {size(sizes.source_bytes)} -> {size(sizes.output_bytes)}
- {sizes.bits_per_weight:.2f} bits per quantized weight, scales included{calibration}

```
vllm serve <this folder>
```

`quantkit_config.json` holds every option that was in force.
"""
