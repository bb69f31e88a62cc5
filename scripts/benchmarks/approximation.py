"""The matrix benchmark against the published loop: unbatched, composed, full SVDs.

Both run in turn, target by target, on the same number of threads. The published loop has five
methods; ours has eight, closed forms and more measures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import write_report
from torch import Tensor, nn

from vlkr.analysis.benchmark import approximate
from vlkr.analysis.matrices import DEFAULT_MATRICES, make_matrix
from vlkr.analysis.methods import AUTHORS_METHODS, DEFAULT_METHODS, authors_method, authors_rounded

SAME = ["lora", "sinlora", "kradapter:balanced", "randlora", "krona"]


def published_loop(target: Tensor, iterations: int) -> list[tuple[float, float]]:
    """The five methods as the published script runs them, written out; its two figures for each."""
    rows, columns = target.shape
    half = target.half()

    def spectrum(matrix: Tensor) -> Tensor:
        sigma: Tensor = torch.linalg.svd(matrix)[1]
        p = sigma / sigma.sum() + 1e-10
        -(p * p.log()).sum().exp()
        return sigma

    expected = spectrum(half.float())
    figures = []
    for name in AUTHORS_METHODS:
        adapter = authors_method(name, columns, rows).make(1)
        compose = _published_composition(name, adapter)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
        for _ in range(iterations):
            approximation = compose()
            loss = torch.norm(approximation - half, p="fro")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found = spectrum(approximation.detach())
        figures.append((((found - expected) ** 2).sqrt().mean().item(), loss.item()))
    return figures


def _published_composition(name: str, adapter: nn.Module) -> Callable[[], Tensor]:
    """How the script composes a change from its factors."""
    p = dict(adapter.named_parameters())
    if name == "LoRA":
        return lambda: p["lora_B"] @ p["lora_A"]
    if name == "SinLoRA":
        return lambda: torch.sin(20 * p["lora_B"] @ p["lora_A"]) * 1.0
    if name == "KRAdapter":
        return lambda: (p["v"][0].unsqueeze(1) * p["u"][0].unsqueeze(2)).flatten(1).T * 1.0
    if name == "RandLoRA":
        bases = adapter.B.permute(1, 0, 2).contiguous()
        return lambda: (
            bases.permute(1, 0, 2).flatten(1)
            @ (
                p["randlora_lambda"][:, :, None] * adapter.A * p["randlora_gamma"][:, None, :]
            ).flatten(0, 1)
        )
    left, right = p["left"], p["right"]
    size = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    return lambda: (left[:, None, :, None] * right[None, :, None, :]).reshape(size)[
        : adapter.out_features, : adapter.in_features
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(DEFAULT_MATRICES))
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="of ours; the loop runs one")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/approximation"))
    options = parser.parse_args()
    lists = {"published loop, 5 methods": None, "vlkr, the same 5": SAME}
    lists["vlkr, the whole table"] = list(DEFAULT_METHODS)
    wall, processor = (dict.fromkeys(lists, 0.0) for _ in range(2))
    published_loop(torch.randn(144, 110), 2)
    for target in options.targets:
        matrix = authors_rounded(make_matrix(target, 1024, 768, seed=1))
        for name, methods in lists.items():
            seeds = 1 if methods is None else options.seeds
            started, used = time.perf_counter(), time.process_time()
            if methods is None:
                published_loop(matrix, options.iterations)
            else:
                approximate(
                    targets=[target],
                    methods=methods,
                    seeds=seeds,
                    iterations=options.iterations,
                    device="cpu",
                )
            wall[name] += (time.perf_counter() - started) / seeds
            processor[name] += (time.process_time() - used) / seeds
        print(target, {n: f"{w:.1f} s ({processor[n]:.1f})" for n, w in wall.items()}, flush=True)
    first = next(iter(lists))
    rows = [["", "seconds per seed", "ratio", "processor seconds", "ratio"]]
    rows += [
        [
            name,
            f"{wall[name]:.1f}",
            f"{wall[name] / wall[first]:.2f}",
            f"{processor[name]:.1f}",
            f"{processor[name] / processor[first]:.2f}",
        ]
        for name in lists
    ]
    figures = {"wall": wall, "processor": processor, "options": {**vars(options), "output": ""}}
    title = f"Matrix benchmark, {len(options.targets)} targets, {options.iterations} iterations"
    write_report(title, rows, figures, options.output)


if __name__ == "__main__":
    main()
