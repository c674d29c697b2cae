"""The published hypernetwork written out naively from the specification, on published tensors.

Shares no code with ``d2l``: plain loops over chunks, layers, heads and ranks, in float64.
"""

import torch

HEADS, KV_HEADS, WIDTH = 16, 4, 128


def options(
    *, kind="per_layer_activations", modules=("down_proj",), n_layers=3, d=6, d_model=10, r=2,
    latents=3, blocks=2, self_blocks=0, shared=False, mlps=1, per_layer=True, bias=True,
) -> dict:  # fmt: skip
    """Make published options in the form that the golden data has."""
    widths = {"down_proj": (12, 7), "q_proj": (7, 9), "up_proj": (5, 12)}
    return {
        "lora_r": r,
        "lora_alpha": 2 * r**1.5,
        "lora_dropout": 0.0,
        "target_modules_sorted": sorted(modules),
        "latent_size": d,
        "feature_sizes": [{m: widths[m][0] for m in modules}, {m: widths[m][1] for m in modules}],
        "aggregator": {
            "aggregator_type": "perceiver",
            "num_layers": n_layers,
            "num_modules": len(modules),
            "num_extra_modules": 0,
            "output_size": d,
            "feature_size": d_model,
            "pooling_type": "mean",
            "num_latent_factor": 8,
            "lora_r": r,
            "per_rank_gen": True,
            "n_latent_queries": latents,
            "num_blocks": blocks,
            "num_self_attn_per_block": self_blocks,
            "shared_weights": shared,
            "layer_to_layer_ctx_encoder": kind == "per_layer_activations",
        },
        "num_pre_head_layers": mlps,
        "per_layer_processing": per_layer,
        "per_rank_gen": True,
        "use_bias": bias,
        "ctx_encoder_args": {
            "ctx_encoder_model_name_or_path": None,
            "ctx_encoder_type": kind,
            "layer_idx": None,
            "quantize_ctx_encoder": False,
            "ctx_encoder_last_layer": None,
        },
    }


def state(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw float32 tensors under every published key, shared ones under each of their indices."""
    g = torch.Generator().manual_seed(seed)
    agg, d, r = config["aggregator"], config["latent_size"], config["lora_r"]
    D, L, M = agg["feature_size"], agg["num_layers"], agg["num_modules"]
    d_in, d_out = config["feature_sizes"]
    F = max(d_in[m] + d_out[m] for m in d_in)
    out: dict[str, torch.Tensor] = {}

    def draw(key, *shape, mean=0.0):
        out[key] = mean + 0.3 * torch.randn(shape, generator=g)

    def gated(prefix, a, b, c):
        draw(f"{prefix}.gate_proj.weight", b, a)
        draw(f"{prefix}.up_proj.weight", b, a)
        draw(f"{prefix}.down_proj.weight", c, b)

    def block(prefix, cross):
        norms = ["input_latents", "post_attention", "pre_ff", "post_ff"]
        for norm in norms + ["input_context"] * cross:
            draw(f"{prefix}.{norm}_layernorm.weight", d, mean=1.0)
        draw(f"{prefix}.self_attn.q_proj.weight", HEADS * WIDTH, d)
        draw(f"{prefix}.self_attn.k_proj.weight", KV_HEADS * WIDTH, d)
        draw(f"{prefix}.self_attn.v_proj.weight", KV_HEADS * WIDTH, d)
        draw(f"{prefix}.self_attn.o_proj.weight", d, HEADS * WIDTH)
        gated(f"{prefix}.mlp", d, 4 * d, d)

    root, per_block = "aggregator.perceiver", 1 + agg["num_self_attn_per_block"]
    gated(f"{root}.modality_projection", D, 4 * D, d)
    n_out = M * r if agg["layer_to_layer_ctx_encoder"] else L * M * r
    for name, n in (("encoder", agg["n_latent_queries"]), ("decoder", n_out)):
        draw(f"{root}.{name}.latents_q", n, d)
        draw(f"{root}.{name}.layernorm.weight", d, mean=1.0)
    block(f"{root}.decoder.layers.0", True)
    for i in range(agg["num_blocks"] * per_block):
        which, at = divmod(i, per_block)
        source = i
        if agg["shared_weights"] and which:
            source = at if at else min(which, 1) * per_block
        prefix = f"{root}.encoder.layers.{i}."
        if source == i:
            block(prefix[:-1], at == 0)
        else:
            origin = f"{root}.encoder.layers.{source}."
            for key in [k for k in out if k.startswith(origin)]:
                out[prefix + key.removeprefix(origin)] = out[key].clone()
    for j in range(config["num_pre_head_layers"]):
        if config["per_layer_processing"]:
            root, slots = f"layers.{j}.layers", (0, 1, 3, 4)
            shapes = ((L, d, 4 * d), (1, L, 1, 1, 4 * d), (L, 4 * d, d), (1, L, 1, 1, d))
        else:
            root, slots = f"layers.{j}.mlp", (0, 2, 5, 6)
            shapes = ((4 * d, d), (4 * d,), (d, 4 * d), (d,))
        for slot in (slots[0], slots[3]):
            draw(f"{root}.{slot}.weight", d, mean=1.0)
            draw(f"{root}.{slot}.bias", d)
        for slot, weight, offset in ((slots[1], *shapes[:2]), (slots[2], *shapes[2:])):
            draw(f"{root}.{slot}.weight", *weight)
            draw(f"{root}.{slot}.bias", *offset)
    draw("head.weight", *((L, d, F) if M == 1 else (L, M, d, F)))
    for m in d_in:
        draw(f"scaler_A.{m}", 1, L, r, 1, mean=1.0)
        draw(f"scaler_B.{m}", 1, L, r, 1)
        if config["use_bias"]:
            draw(f"bias_A.{m}", L, r, d_in[m])
            draw(f"bias_B.{m}", L, r, d_out[m])
    return out


def factors(config: dict, tensors: dict[str, torch.Tensor], features: list[list[torch.Tensor]]):
    """Compute {module: (A, B)}, each (chunk, layer, r, d), from features[chunk][layer]."""
    w = {k: t.double() for k, t in tensors.items()}
    agg, r = config["aggregator"], config["lora_r"]
    L, modules = agg["num_layers"], config["target_modules_sorted"]
    d_in, d_out = config["feature_sizes"]
    out = {m: ([], []) for m in modules}
    for chunk in features:
        read = [perceive(w, agg, f) for f in chunk]
        for m, module in enumerate(modules):
            A, B = torch.zeros(L, r, d_in[module]), torch.zeros(L, r, d_out[module])
            A, B = A.double(), B.double()
            for layer in range(L):
                for rank in range(r):
                    if agg["layer_to_layer_ctx_encoder"]:
                        x = read[layer][m * r + rank]
                    else:
                        x = read[0][(layer * len(modules) + m) * r + rank]
                    for j in range(config["num_pre_head_layers"]):
                        x = x + mlp(w, config, j, layer, x)
                    head = w["head.weight"][layer]
                    flat = (x / x.norm()) @ (head if len(modules) == 1 else head[m])
                    A[layer, rank] = flat[: d_in[module]] * w[f"scaler_A.{module}"][0, layer, rank]
                    stop = d_in[module] + d_out[module]
                    B[layer, rank] = (
                        flat[d_in[module] : stop] * w[f"scaler_B.{module}"][0, layer, rank]
                    )
            out[module][0].append(A)
            out[module][1].append(B)
    return {m: (torch.stack(a), torch.stack(b)) for m, (a, b) in out.items()}


def perceive(w, agg, feature):
    root = "aggregator.perceiver"
    context = gated(w, f"{root}.modality_projection", feature)
    latents = w[f"{root}.encoder.latents_q"]
    per_block = 1 + agg["num_self_attn_per_block"]
    for i in range(agg["num_blocks"] * per_block):
        source = context if i % per_block == 0 else None
        latents = block(w, f"{root}.encoder.layers.{i}", latents, source)
    latents = rms(latents, w[f"{root}.encoder.layernorm.weight"])
    out = block(w, f"{root}.decoder.layers.0", w[f"{root}.decoder.latents_q"], latents)
    return rms(out, w[f"{root}.decoder.layernorm.weight"])


def block(w, prefix, latents, context):
    h = rms(latents, w[f"{prefix}.input_latents_layernorm.weight"])
    source = h
    if context is not None:
        source = rms(context, w[f"{prefix}.input_context_layernorm.weight"])
    q, k, v = (
        t @ w[f"{prefix}.self_attn.{name}_proj.weight"].T
        for t, name in ((h, "q"), (source, "k"), (source, "v"))
    )
    heads = []
    for j in range(HEADS):
        kv = j // (HEADS // KV_HEADS)
        mine, theirs = slice(j * WIDTH, (j + 1) * WIDTH), slice(kv * WIDTH, (kv + 1) * WIDTH)
        heads.append(torch.softmax(q[:, mine] @ k[:, theirs].T / WIDTH**0.5, 1) @ v[:, theirs])
    attended = torch.cat(heads, 1) @ w[f"{prefix}.self_attn.o_proj.weight"].T
    latents = latents + rms(attended, w[f"{prefix}.post_attention_layernorm.weight"])
    inner = gated(w, f"{prefix}.mlp", rms(latents, w[f"{prefix}.pre_ff_layernorm.weight"]))
    return latents + rms(inner, w[f"{prefix}.post_ff_layernorm.weight"])


def gated(w, prefix, x):
    gate = x @ w[f"{prefix}.gate_proj.weight"].T
    up = x @ w[f"{prefix}.up_proj.weight"].T
    return (gate / (1 + torch.exp(-gate)) * up) @ w[f"{prefix}.down_proj.weight"].T


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def layer_norm(x, weight, bias):
    return weight * (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() + bias


def mlp(w, config, j, layer, x):
    if config["per_layer_processing"]:
        p = f"layers.{j}.layers."
        W1, W2 = w[p + "1.weight"][layer], w[p + "3.weight"][layer]
        b1, b2 = w[p + "1.bias"][0, layer, 0, 0], w[p + "3.bias"][0, layer, 0, 0]
        first, last = p + "0", p + "4"
    else:
        p = f"layers.{j}.mlp."
        W1, W2 = w[p + "2.weight"].T, w[p + "5.weight"].T
        b1, b2, first, last = w[p + "2.bias"], w[p + "5.bias"], p + "0", p + "6"
    hidden = layer_norm(x, w[first + ".weight"], w[first + ".bias"]) @ W1 + b1
    out = (hidden / (1 + torch.exp(-hidden))) @ W2 + b2
    return layer_norm(out, w[last + ".weight"], w[last + ".bias"])
