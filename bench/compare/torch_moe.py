#!/usr/bin/env python3
"""The layer in PyTorch, for steelyard_compare: reads commands and numbers, answers with seconds and numbers.

Two ways of computing the experts: "loop", over the experts that have tokens, as in Hugging Face's models, and
"grouped", torch's grouped_mm over tokens sorted by expert. The router is a linear layer with softmax, top-k and
renormalised weights; in training the load-balancing loss is added as there. Float or bfloat16; nothing is compiled.
"""

import ctypes
import os
import sys
import time

import torch
import torch.nn.functional as F

COEFFICIENT = 0.008  # of the load-balancing loss: Steelyard's default
source = sys.stdin.buffer
sink = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what others print must not get into the answers
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def openblas():
    """OpenBLAS, where this PyTorch computes with one: it has threads of its own, which torch.set_num_threads misses."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "openblas" in line or "libblas" in line}
    for library in map(ctypes.CDLL, sorted(paths)):
        if hasattr(library, "openblas_set_num_threads"):
            return library
    return None


def answer(text):
    sink.write(f"{text}\n".encode())
    sink.flush()


def receive(*shape):
    tensor = torch.empty(shape, dtype=torch.float32)
    memory = memoryview(tensor.numpy()).cast("B")
    done = 0
    while done < len(memory):
        count = source.readinto(memory[done:])
        if not count:
            sys.exit("torch_moe.py: the input ended in a tensor")
        done += count
    return tensor


def send(tensor):
    tensor = tensor.detach().float().contiguous()
    answer(tensor.numel())
    sink.write(memoryview(tensor.numpy()).cast("B"))
    sink.flush()


class Layer:
    def __init__(self, experts, width, hidden, dtype):
        self.experts, self.hidden, self.dtype = experts, hidden, dtype
        self.router = receive(experts, width).requires_grad_()
        gate, up = receive(experts, hidden, width), receive(experts, hidden, width)
        self.gate_up = torch.cat([gate, up], dim=1).to(dtype)
        del gate, up
        self.down = receive(experts, width, hidden).to(dtype)
        # Parameters of both ways are views of the same memory: one for each expert, or one for all.
        self.one_gate_up = [w.requires_grad_() for w in self.gate_up.unbind()]
        self.one_down = [w.requires_grad_() for w in self.down.unbind()]
        self.all_gate_up = self.gate_up.detach().requires_grad_()
        self.all_down = self.down.detach().requires_grad_()

    def begin(self, sets, tokens, top_k, train):
        self.top_k, self.train = top_k, train
        self.bias = receive(self.experts)
        width = self.router.shape[1]
        self.x = receive(sets, tokens, width).to(self.dtype)
        self.dy = receive(tokens, width).to(self.dtype)
        self.forget()

    def forget(self):
        for tensor in [self.router, self.all_gate_up, self.all_down, *self.one_gate_up, *self.one_down]:
            tensor.grad = None

    def route(self, x):
        probs = torch.softmax(F.linear(x.float(), self.router, self.bias), dim=-1)
        weight, expert = torch.topk(probs, self.top_k, dim=-1)
        return probs, (weight / weight.sum(dim=-1, keepdim=True)).to(self.dtype), expert

    def loop(self, x, weight, expert):
        y = torch.zeros_like(x)
        chosen = F.one_hot(expert, self.experts).permute(2, 1, 0)
        for e in torch.nonzero(chosen.sum(dim=(1, 2))).flatten().tolist():
            k, token = torch.where(chosen[e])
            gate, up = F.linear(x[token], self.one_gate_up[e]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.one_down[e])
            y.index_add_(0, token, rows * weight[token, k, None])
        return y

    def grouped(self, x, weight, expert):
        order = torch.argsort(expert.flatten(), stable=True)
        token = order // self.top_k
        ends = torch.cumsum(torch.bincount(expert.flatten(), minlength=self.experts), 0).to(torch.int32)
        gate, up = grouped_mm(x[token], self.all_gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = grouped_mm(F.silu(gate) * up, self.all_down.transpose(1, 2), offs=ends)
        y = torch.zeros_like(x)
        return y.index_add_(0, token, rows * weight.flatten()[order, None])

    def forward(self, way, x):
        self.way = way
        probs, weight, expert = self.route(x)
        self.y = getattr(self, way)(x, weight, expert)
        return probs, expert

    def step(self, way):
        self.forget()  # as zero_grad does
        self.leaf = self.x[0].detach().requires_grad_()
        probs, expert = self.forward(way, self.leaf)
        share = torch.bincount(expert.flatten(), minlength=self.experts).float() / expert.numel()
        loss = COEFFICIENT * self.experts * (share * probs.mean(dim=0)).sum()
        torch.autograd.backward([self.y, loss], [self.dy, None])

    def outcome(self, sampled):
        send(self.y)
        if not self.train:
            return
        send(self.leaf.grad)
        send(self.router.grad)
        single = self.way == "loop"
        nothing = torch.zeros_like
        def grad(ones, whole, e):
            if not single:
                return whole.grad[e]
            return nothing(ones[e]) if ones[e].grad is None else ones[e].grad
        gate_up = [grad(self.one_gate_up, self.all_gate_up, e) for e in sampled]
        send(torch.stack([g[:self.hidden] for g in gate_up]))
        send(torch.stack([g[self.hidden:] for g in gate_up]))
        send(torch.stack([grad(self.one_down, self.all_down, e) for e in sampled]))


def main():
    blas = openblas()
    if blas and blas.openblas_get_parallel() == 1 and "OMP_WAIT_POLICY" not in os.environ:
        # Two sets of threads that spin as they wait would be in each other's way: begin again with one that sleeps.
        os.dup2(sink.fileno(), 1)
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    answer(f"{torch.__version__}")
    answer("grouped" if grouped_mm else "no grouped_mm")
    layer = None
    while line := source.readline().split():
        command, arguments = line[0].decode(), [word.decode() for word in line[1:]]
        if command == "model":
            layer = None  # before the next one needs its memory
            experts, width, hidden = map(int, arguments[:3])
            layer = Layer(experts, width, hidden, torch.bfloat16 if arguments[3] == "bf16" else torch.float32)
            answer("ready")
        elif command == "batch":
            sets, tokens, top_k, threads, train = map(int, arguments)
            torch.set_num_threads(threads)
            if blas:
                blas.openblas_set_num_threads(threads)
            layer.begin(sets, tokens, top_k, bool(train))
            answer("ready")
        elif command == "forward":
            start = time.perf_counter()
            with torch.inference_mode(not layer.train), torch.set_grad_enabled(layer.train):
                layer.forward(arguments[0], layer.x[int(arguments[1])])
            answer(time.perf_counter() - start)
        elif command == "train":
            start = time.perf_counter()
            layer.step(arguments[0])
            answer(time.perf_counter() - start)
        elif command == "outcome":
            layer.outcome([int(word) for word in arguments])


if __name__ == "__main__":
    main()
