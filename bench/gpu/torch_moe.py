#!/usr/bin/env python3
"""Peers on a GPU, by PyTorch: the loop over experts of Hugging Face's models, torch._grouped_mm, and ScatterMoE where
python finds it.

All are given the choices: what is timed is experts and combine, forward and with backward, in bf16. Their results are
compared with each other. Writes JSON in the form of steelyard_gpu_bench.
"""
import argparse
import json

import torch
import torch.nn.functional as F

try:
    import scattermoe
except ImportError:
    scattermoe = None


def routing(tokens, experts, top_k, zipf):
    logits = torch.randn(tokens, experts, device="cuda")
    if zipf:
        logits -= torch.log(torch.arange(1, experts + 1, device="cuda", dtype=torch.float32))
    weight, chosen = torch.topk(torch.softmax(logits, -1), top_k)
    return (weight / weight.sum(-1, keepdim=True)).bfloat16(), chosen


def loop(x, gate, up, down, weight, chosen):
    y = torch.zeros_like(x)
    mask = F.one_hot(chosen, gate.shape[0]).permute(2, 1, 0)  # [E, K, T]
    for e in range(gate.shape[0]):
        k, t = torch.where(mask[e])
        if t.numel() == 0:
            continue
        rows = x[t]
        inner = F.silu(rows @ gate[e].T) * (rows @ up[e].T)
        y.index_add_(0, t, (inner @ down[e].T) * weight[t, k, None])
    return y


def grouped(x, gate, up, down, weight, chosen):
    top_k, experts = chosen.shape[1], gate.shape[0]
    order = torch.argsort(chosen.flatten(), stable=True)
    offsets = torch.cumsum(torch.bincount(chosen.flatten(), minlength=experts), 0).to(torch.int32)
    rows = x[order // top_k]
    product = lambda a, b: torch._grouped_mm(a, b.transpose(-2, -1), offs=offsets)
    out = product(F.silu(product(rows, gate)) * product(rows, up), down)
    out = out * weight.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return out[back].view(x.shape[0], top_k, -1).sum(1)


def scatter(x, gate_up, down, weight, chosen):
    """ScatterMoE's GLUMLP, without the compiler that it sorts with: gate_up [E, 2 h, d] has up first."""
    expert, order = torch.sort(chosen.flatten())
    offsets = torch.cumsum(torch.bincount(expert, minlength=down.shape[0]), 0)
    product = lambda a, b, k, **how: scattermoe.parallel_linear(a, b.permute(0, 2, 1), k, expert, order, offsets, **how)
    up, gate = product(x, gate_up, chosen.shape[1], grouped_out=True).chunk(2, -1)
    return product(F.silu(gate) * up, down, 1, grouped_in=True, gates=weight)


def time(call, repeats):
    times = []
    for i in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def run(case):
    name, tokens, d, h, experts, top_k, zipf = case
    torch.manual_seed(1)
    make = lambda *shape: (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).bfloat16().requires_grad_()
    x = torch.randn(tokens, d, device="cuda").bfloat16().requires_grad_()
    weights = make(experts, h, d), make(experts, h, d), make(experts, d, h)
    weight, chosen = routing(tokens, experts, top_k, zipf)
    weight.requires_grad_()
    dy = torch.randn_like(x)
    result = dict(name=name, tokens=tokens, width=d, hidden=h, experts=experts, top_k=top_k, zipf=zipf)
    flops, repeats = 6 * tokens * top_k * h * d, 5 if tokens >= 4096 else 9
    outputs, alive = {}, True
    peers = {"loop": loop, "grouped_mm": grouped}
    if scattermoe is not None:
        peers["scattermoe"] = scatter
    for peer, call in peers.items():
        try:
            own = weights
            if call is scatter:
                own = torch.cat((weights[1].detach(), weights[0].detach()), 1).requires_grad_(), weights[2]
            with torch.no_grad():
                outputs[peer] = call(x, *own, weight, chosen)
                few = 3 if call is loop else repeats
                forward = time(lambda: call(x, *own, weight, chosen), few)

            def both():
                call(x, *own, weight, chosen).backward(dy)

            total = time(both, few)
            result[peer] = dict(forward_ms=forward, both_ms=total, forward_flops=flops / forward * 1e3,
                                backward_flops=2 * flops / (total - forward) * 1e3)
            line = f"forward {forward:9.3f} ms {flops / forward / 1e9:4.0f} TFLOP/s  with backward {total:9.3f} ms"
        except Exception as failure:  # one peer that cannot is no reason to lose the other
            result[peer] = dict(failed=str(failure)[:200])
            line = f"failed: {str(failure)[:80]}"
            alive = still_works()
        print(f"{name:28s} T {tokens:5d} {'Zipf' if zipf else '    '} torch {peer:10s} {line}", flush=True)
        if not alive:
            return result, False
        for tensor in (x, weight, *own):
            tensor.grad = None
        own = None
        torch.cuda.empty_cache()
    for peer, output in outputs.items():
        other = outputs.get("loop", output).float()
        off = (output.float() - other).norm() / other.norm()
        assert off < 2e-2, f"{peer} differs from the loop by {off}"
    return result, True


def still_works():
    """After some errors nothing works on the GPU any more in this process."""
    try:
        torch.cuda.synchronize()
        return True
    except Exception:
        return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    cases = [("grid", 40960, 768, 256, 128, 8, False), ("grid", 24576, 1536, 1024, 32, 2, False),
             ("grid", 32768, 4096, 1024, 128, 8, False), ("grid", 32768, 4096, 2048, 64, 4, False)]
    models = [("Qwen3-30B-A3B", 2048, 768, 128, 8), ("OLMoE-1B-7B", 2048, 1024, 64, 8),
              ("DeepSeek-V2-Lite", 2048, 1408, 64, 6), ("gpt-oss-20b without biases", 2880, 2880, 32, 4),
              ("Mixtral-8x7B", 4096, 14336, 8, 2), ("DeepSeek-V3", 7168, 2048, 256, 8)]
    for name, d, h, experts, top_k in models:
        for tokens in (16, 32768) if options.quick else (1, 4, 16, 64, 512, 4096, 16384, 32768):
            cases.append((name, tokens, d, h, experts, top_k, False))
    results = []
    for case in cases:
        needed = 12 * case[4] * case[2] * case[3] + case[1] * case[5] * (40 * case[3] + 20 * case[2])
        if needed > 0.9 * torch.cuda.mem_get_info()[0]:
            print(f"{case[0]:28s} T {case[1]:5d} skipped: it needs some {needed / 1e9:.0f} GB", flush=True)
            continue
        result, alive = run(case)
        results.append(result)
        if options.out:  # each time: a peer may take the process with it
            with open(options.out, "w") as file:
                json.dump(dict(torch=torch.__version__, cases=results), file, indent=1)
        if not alive:
            print("a peer's error took the GPU from this process: the cases behind are left out", flush=True)
            break


if __name__ == "__main__":
    main()
