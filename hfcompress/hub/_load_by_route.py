"""Started as a script in a fresh process by `verify.py`: loads a folder by some routes and compares outputs.

Only the routes "load", "auto" and "peft" may import hfcompress; the others prove that it is not needed.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Arguments: folder, JSON list of routes, path of the JSON to write."""
    folder, routes, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    ours = {"load", "auto", "peft"} & set(routes)
    if ours:
        import hfcompress
    import torch
    import transformers
    from safetensors import safe_open

    with safe_open(f"{folder}/hfcompress_probe.safetensors", "pt") as file:
        probe = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wanted = (file.metadata() or {}).get("device", "cpu")
    inputs = {name[len("input.") :]: value for name, value in probe.items() if name.startswith("input.")}
    base, adapter = folder, f"{folder}/adapter_config.json"
    if os.path.isfile(adapter) and not os.path.isfile(f"{folder}/config.json"):
        with open(adapter, encoding="utf-8") as text:
            base = json.load(text)["base_model_name_or_path"]
    config = transformers.AutoConfig.from_pretrained(base)
    name = config.architectures[0]

    def auto_class():  # type: ignore[no-untyped-def]
        listed = [auto for auto, cls in (getattr(config, "auto_map", None) or {}).items() if cls.endswith(f".{name}")]
        for auto in [*listed, *sorted(dir(transformers))]:
            mapping = getattr(getattr(transformers, auto, None), "_model_mapping", None)
            covered = getattr(mapping, "_model_mapping", {}).get(config.model_type, ()) if mapping is not None else ()
            if name in ((covered,) if isinstance(covered, str) else covered):
                return getattr(transformers, auto)
        return getattr(transformers, name)

    def loaded(route: str):  # type: ignore[no-untyped-def]
        if route == "load":
            return hfcompress.load(folder)
        if route == "peft":
            import peft

            return peft.PeftModel.from_pretrained(auto_class().from_pretrained(base), folder)
        return auto_class().from_pretrained(folder, **({"trust_remote_code": True} if route == "remote" else {}))

    results: dict[str, dict[str, float | str]] = {}
    for route in routes:
        try:
            model = loaded(route).eval()
            if (
                wanted == "cuda"
                and torch.cuda.is_available()
                and getattr(model, "quantization_method", None) in (None, "torchao")
            ):
                model = model.to("cuda")
            device = next(model.parameters()).device
            with torch.no_grad():
                outputs = model(**{k: v.to(device) for k, v in inputs.items()})
            names = ("logits", "start_logits", "logits_per_image", "last_hidden_state")
            values = next(outputs[key] for key in names if key in outputs)
            values = values[:, -1] if values.dim() == 3 and values.shape[-1] > 1000 else values
            results[route] = {"difference": float((values.float().cpu() - probe["output"]).abs().max())}
        except Exception as error:  # noqa: BLE001 (whatever happened is the result)
            results[route] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    if not ours and "hfcompress" in sys.modules:
        results = {route: {"error": "hfcompress was imported, so nothing is proven"} for route in routes}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
